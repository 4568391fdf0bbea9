"""What `status` says of the budgets of API keys."""

import logging

import pytest

from embedmill.commands.fleet import Fleet, Rates, budget_words, fleet_lines, fleet_record
from embedmill.errors import RateLimited
from scheduler.budget import Budget
from scheduler.key_budgets import Limits, read_budgets
from tests.budget_bench import Asker


async def only_budget(connection):
    [budget] = await read_budgets(connection, namespace="t")
    return budget


async def test_a_namespace_without_budgets_has_none(connection):
    assert await read_budgets(connection, namespace="t") == []


async def test_the_last_window_permits_and_limits_are_shown(clock, connection):
    asker = Asker(connection, tpm=60_000, rpm=600, concurrency=10, max_wait_s=100)
    _, _, _, first = await asker.reserve(3_000)
    await asker.settle(first, 2_500)
    _, _, _, _live = await asker.reserve(1_000, lane="live")
    _, wait_s, _, _ = await asker.reserve(30_000, lane="live")
    assert wait_s > 1
    budget = await only_budget(connection)
    assert budget.configured == budget.limits == Limits(600, 60_000, 10)
    assert budget.learned == Limits(0, 0, 0)
    assert (budget.requests + budget.later_requests, budget.tokens + budget.later_tokens) == (3, 33_500)
    assert (budget.permits, budget.live_permits, budget.most_permits) == (2, 2, 10)
    assert (budget.closed_s, budget.factor, budget.window_s) == (0, 1, 60)
    clock.now_s += 61
    later = await only_budget(connection)
    assert (later.requests, later.permits) == (2, 0)
    assert later.live_s == later.idle_s == pytest.approx(61, abs=0.1)


async def test_a_reading_changes_nothing(clock, connection):
    asker = Asker(connection, tpm=60_000)
    await asker.reserve(3_000)

    async def everything():
        keys = sorted(await connection.command("KEYS", "*"))
        return [(key, await connection.command("DUMP", key), await connection.command("PTTL", key)) for key in keys]

    before = await everything()
    await only_budget(connection)
    assert await everything() == before


async def test_what_a_refusal_taught_is_shown_and_closed_keys_and_slow_ones(clock, connection):
    asker = Asker(connection, tpm=2_000_000, rpm=500, concurrency=50)
    _, _, _, grant = await asker.reserve(10)
    await asker.settle(grant, refusal=RateLimited("", limit="tokens", allowed=100_000, retry_after_s=30))
    _, _, _, grant = await asker.reserve(10, op="other")
    budget = await only_budget(connection)
    assert budget.learned.tokens == budget.limits.tokens == 100_000
    assert budget.closed_s == pytest.approx(30, abs=0.1)
    words = budget_words(budget)
    assert "of 100,000 tokens, 1 of 500 requests in the last minute" in words
    assert "closed for 30 s; the provider allows 100,000 tokens, 2,000,000 are configured" in words
    clock.now_s += 31
    _, _, _, grant = await asker.reserve(10)
    await asker.settle(grant, refusal=RateLimited("", limit="tokens", allowed=100_000))
    assert "at 85% of its pace after refusals" in budget_words(await only_budget(connection))


async def test_several_keys_are_shown_the_last_used_first_and_a_day_long(clock, connection):
    for number in range(3):
        clock.now_s += 1
        asker = Asker(connection, rpm=6)
        asker.budget = Budget(connection, namespace="t", key_id=f"k{number}", rpm=6)
        await asker.reserve()
    budgets = await read_budgets(connection, namespace="t")
    assert [budget.key_id for budget in budgets] == ["k2", "k1", "k0"]
    fleet = Fleet([], [], [], budgets)
    lines = [line for line in fleet_lines(fleet, Rates()) if line.startswith("  key")]
    assert lines[0].startswith("  key         k2: 1 tokens, 1 of 6 requests in the last minute; 1 at a time")
    assert [record["key_id"] for record in fleet_record(fleet, Rates())["budgets"]] == ["k2", "k1", "k0"]
    clock.now_s += 86_401
    assert await read_budgets(connection, namespace="t") == []


async def refuse(asker, limit, allowed):
    _, _, _, grant = await asker.reserve(10)
    await asker.settle(grant, refusal=RateLimited("", limit=limit, allowed=allowed, retry_after_s=0))


async def test_a_limit_that_the_provider_names_is_said_once_in_the_fleet_and_again_when_it_changes(
    clock, connection, caplog
):
    ours, theirs = (Asker(connection, tpm=2_000_000, rpm=500, concurrency=50) for _ in range(2))
    with caplog.at_level(logging.WARNING, "embedmill.budget"):
        for asker in (ours, theirs, ours):
            await refuse(asker, "tokens", 200_000)
    assert [record.getMessage() for record in caplog.records] == [
        "the provider allows 200,000 tokens a minute, not 2,000,000 as configured (--tpm): that is used from now on"
    ]
    await refuse(theirs, "tokens", 100_000)
    await refuse(theirs, "concurrency", 2)
    await refuse(theirs, "concurrency", 2)
    said = [record.getMessage() for record in caplog.records][1:]
    assert [line.split(",")[0] for line in said] == [
        "the provider allows 100",
        "the provider allows 2 requests at a time",
    ]


async def test_a_higher_limit_than_configured_is_not_used_and_said_once(clock, connection, caplog):
    asker = Asker(connection, tpm=100_000)
    with caplog.at_level(logging.WARNING, "embedmill.budget"):
        await refuse(asker, "tokens", 2_000_000)
        await refuse(asker, "tokens", 2_000_000)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        "the provider allows 2,000,000 tokens a minute, 100,000 are configured: somebody else may be using this key;"
        " --tpm raises what is used"
    )
    assert (await only_budget(connection)).limits.tokens == 100_000


async def test_the_limit_that_is_configured_is_no_news(clock, connection, caplog):
    with caplog.at_level(logging.WARNING, "embedmill.budget"):
        await refuse(Asker(connection, rpm=100), "requests", 100)
    assert not caplog.records


async def test_a_limit_where_none_is_configured_is_used(clock, connection, caplog):
    with caplog.at_level(logging.WARNING, "embedmill.budget"):
        await refuse(Asker(connection), "requests", 60)
    assert "allows 60 requests a minute, and none is configured (--rpm): that is used" in caplog.text
    assert (await only_budget(connection)).limits.requests == 60
