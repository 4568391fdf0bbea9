"""The budget's scripts under a clock of the test's own: fakeredis reads `time.time`."""

import heapq
import random

import pytest

from embedmill.errors import RateLimited
from scheduler.budget import key_id
from tests.budget_bench import Asker


async def simulate(clock, asker, *, seconds, slots, tokens, latency_s, bias, seed=7):
    """Keep `slots` requests going; when each arrived (within 200 ms of its start) and what it held."""
    rng = random.Random(seed)
    arrivals = []
    began = clock.now_s
    queue = [(clock.now_s, number, "ask", None) for number in range(slots)]
    while queue and (event := heapq.heappop(queue))[0] < began + seconds:
        clock.now_s, number, what, grant = event
        if what == "settle":
            await asker.settle(grant, grant.actual_tokens)
            what = "ask"
        if what == "ask":
            actual = rng.randint(*tokens)
            estimate = max(1, round(actual * bias * rng.uniform(0.8, 1.2)))
            status, wait_s, _, granted = await asker.reserve(estimate)
            if status == 1:
                granted.actual_tokens = actual
                arrived = clock.now_s + wait_s + rng.uniform(0, 0.2)
                arrivals.append((arrived, actual))
                heapq.heappush(queue, (arrived + latency_s * rng.uniform(0.5, 1.5), number, "settle", granted))
            else:
                heapq.heappush(queue, (clock.now_s + max(wait_s, 0.001), number, "ask", None))
    return sorted(one for one in arrivals if one[0] < began + seconds)


def peak(arrivals, window_s, measure):
    """The most that any closed window of that length holds."""
    highest, first, held = 0, 0, 0
    for arrived, held_tokens in arrivals:
        held += measure(held_tokens)
        while arrivals[first][0] < arrived - window_s:
            held -= measure(arrivals[first][1])
            first += 1
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"tpm": 100_000, "rpm": 100, "concurrency": 2}, (4_000, 8_000)),
        ({"tpm": 1_000_000, "rpm": 120}, (100, 2_000)),
        ({"tpm": 400_000}, (2_000, 6_000)),
    ],
)
@pytest.mark.parametrize(("bias", "allowed"), [(1.25, 1.0), (1.0, 1.01)], ids=["upper bounds", "unbiased estimates"])
async def test_no_window_passes_a_limit_and_the_quota_is_used(clock, connection, limits, tokens, bias, allowed):
    asker = Asker(connection, **limits)
    arrivals = await simulate(clock, asker, seconds=180, slots=8, tokens=tokens, latency_s=1.0, bias=bias)
    sent, used = len(arrivals), sum(held for _, held in arrivals)
    assert peak(arrivals, 60, lambda held: held) <= limits["tpm"] * allowed
    assert peak(arrivals, 60, lambda _: 1) <= limits.get("rpm", 10**9)
    assert max(used / (limits["tpm"] * 3), sent / (limits.get("rpm", 10**9) * 3)) > 0.9


async def test_asking_again_for_one_op_gives_the_same_grant_and_reserves_nothing(clock, connection):
    asker = Asker(connection, rpm=60, concurrency=5)
    first = await asker.reserve(1, op="a")
    for _ in range(3):
        assert (await asker.reserve(1, op="a"))[:2] == first[:2]
    assert await asker.held() == 1


async def test_a_request_larger_than_the_burst_passes_and_the_next_one_waits_for_it(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    assert (await asker.reserve(30_000))[:2] == (1, 0)
    _, wait_s, _, _ = await asker.reserve(1_000)
    assert wait_s == pytest.approx(30 / 0.98 - 1, abs=0.01)


async def test_what_no_window_can_hold_is_refused_for_good(clock, connection):
    assert (await Asker(connection, tpm=1_000).reserve(1_001))[:1] == (-1,)
    assert (await Asker(connection, tpm=1_000).reserve(1_000))[:2] == (1, 0)


async def test_without_limits_everything_starts_at_once(clock, connection):
    asker = Asker(connection)
    assert [(await asker.reserve(10**6))[:2] for _ in range(50)] == [(1, 0)] * 50


async def test_settling_gives_back_what_was_not_used(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve(30_000)
    await asker.settle(grant, 1_000)
    assert (await asker.reserve(30_000))[1] == pytest.approx(1 / 0.98 - 1, abs=0.01)


async def test_settling_charges_what_was_underestimated(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve(1_000)
    await asker.settle(grant, 10_000)
    assert (await asker.reserve(1))[1] == pytest.approx(10 / 0.98 - 1, abs=0.01)


async def test_an_unknown_outcome_keeps_the_estimate_charged(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve(30_000)
    await asker.settle(grant)
    assert (await asker.reserve(1))[1] > 25
    assert await asker.held() == 1


async def test_what_was_never_sent_costs_nothing(clock, connection):
    asker = Asker(connection, tpm=60_000, rpm=1, max_wait_s=100)
    for _ in range(5):
        status, wait_s, _, grant = await asker.reserve(30_000)
        assert (status, wait_s) == (1, 0)
        await asker.settle(grant, outcome="unsent")


async def test_settling_twice_changes_nothing(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve(30_000)
    await asker.settle(grant, 20_000)
    before = await connection.command("HGETALL", asker.budget._keys[0])
    await asker.settle(grant, 0)
    assert await connection.command("HGETALL", asker.budget._keys[0]) == before


async def test_a_lost_budget_learns_what_was_spent_where_it_falls_and_one_that_is_there_does_not(clock, connection):
    spent = {"k": [(50.0, 20_000), (10.0, 15_000), (10.1, 15_000)], "other": [(1.0, 60_000)]}
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    await asker.budget.restore(spent)
    # There is room for 9,700 at once; what was sent 50 s ago leaves the window in ten seconds, and makes room for more.
    assert (await asker.reserve(9_000))[:2] == (1, 0)
    _, wait_s, _, grant = await asker.reserve(20_000)
    assert wait_s == pytest.approx(11, abs=1)
    await asker.settle(grant, outcome="unsent")
    before = await connection.command("HGETALL", asker.budget._keys[3])
    await asker.budget.restore(spent)
    assert await connection.command("HGETALL", asker.budget._keys[3]) == before


async def test_a_holder_that_says_that_it_lives_keeps_its_permit(clock, connection):
    asker = Asker(connection, concurrency=1, holder_s=20)
    _, _, _, grant = await asker.reserve()
    for _ in range(5):
        clock.now_s += 15
        assert await connection.script("scheduler/keep", asker.budget._keys[1:2], [20_000, grant.op, "unknown"]) == 1
        assert (await asker.reserve())[0] == 0
    clock.now_s += 21
    assert (await asker.reserve())[0] == 1


async def test_a_dead_holders_permit_comes_back_when_it_expires(clock, connection):
    asker = Asker(connection, concurrency=1, holder_s=180)
    await asker.reserve()
    assert (await asker.reserve())[0] == 0
    clock.now_s += 179
    assert (await asker.reserve())[0] == 0
    clock.now_s += 2
    assert (await asker.reserve())[0] == 1


async def test_a_late_turn_is_not_given_ahead(clock, connection):
    asker = Asker(connection, rpm=6, max_wait_s=5)
    assert (await asker.reserve())[0] == 1
    status, wait_s, _, _ = await asker.reserve()
    assert status == 0
    clock.now_s += wait_s
    assert (await asker.reserve())[:2] == (1, pytest.approx(2.5, abs=0.002))


async def test_a_refusal_closes_the_key_for_everybody_and_longer_each_time(clock, connection):
    ours, theirs = Asker(connection, tpm=10**6, max_wait_s=100), Asker(connection, tpm=10**6, max_wait_s=100)
    waits = []
    for _ in range(3):
        _, wait_s, _, grant = await ours.reserve()
        clock.now_s += wait_s
        await ours.settle(grant, refusal=RateLimited("", limit="tokens"))
        _, wait_s, _, other = await theirs.reserve()
        waits.append(wait_s)
        await theirs.settle(other, outcome="unsent")
    assert waits == pytest.approx([2, 4, 8], abs=0.01)


async def test_the_providers_own_retry_after_is_kept(clock, connection):
    asker = Asker(connection, max_wait_s=100)
    _, _, _, grant = await asker.reserve()
    await asker.settle(grant, refusal=RateLimited("", limit="requests", retry_after_s=17))
    assert (await asker.reserve())[1] == pytest.approx(17, abs=0.01)


async def test_an_announced_lower_limit_is_believed_for_an_hour_and_a_higher_one_never(clock, connection):
    asker = Asker(connection, tpm=1_000_000)
    _, _, _, grant = await asker.reserve()
    await asker.settle(grant, refusal=RateLimited("", limit="tokens", allowed=100_000))
    assert (await asker.reserve(100_001))[0] == -1
    clock.now_s += 3_601
    status, _, _, grant = await asker.reserve(100_001)
    assert status == 1
    await asker.settle(grant, refusal=RateLimited("", limit="tokens", allowed=9_000_000))
    clock.now_s += 600
    assert (await asker.reserve(1_000_001))[0] == -1


async def free_permits(asker):
    grants = []
    while len(grants) < 100 and (reply := await asker.reserve())[0] == 1:
        grants.append(reply[3])
    for grant in grants:
        await asker.settle(grant, outcome="unsent")
    return len(grants)


async def test_a_concurrency_refusal_cuts_permits_and_clean_minutes_bring_them_back(clock, connection):
    asker = Asker(connection, concurrency=4, max_wait_s=60)
    _, _, _, grant = await asker.reserve()
    await asker.settle(grant, refusal=RateLimited("", limit="concurrency", allowed=4))
    assert await free_permits(asker) == 3
    clock.now_s += 61
    assert await free_permits(asker) == 4
    clock.now_s += 600
    assert await free_permits(asker) == 4


async def test_an_announced_concurrency_is_taken_over_and_never_goes_below_one(clock, connection):
    asker = Asker(connection, concurrency=50, max_wait_s=60)
    for expected in (2, 1, 1):
        _, _, _, grant = await asker.reserve()
        await asker.settle(grant, refusal=RateLimited("", limit="concurrency", allowed=2))
        assert await free_permits(asker) == expected
        clock.now_s += 5


async def test_refusals_below_the_limit_slow_the_rate_down(clock, connection):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve()
    await asker.settle(grant, refusal=RateLimited("", limit="tokens", allowed=60_000))
    clock.now_s += 3
    await asker.reserve(20_000)
    assert (await asker.reserve())[1] == pytest.approx(20 / 0.98 / 0.85 - 1, rel=0.01)


@pytest.mark.parametrize("limit", ["address", "unknown"])
async def test_a_refusal_that_names_a_number_for_no_limit_of_ours_slows_down_too(clock, connection, limit):
    asker = Asker(connection, tpm=60_000, max_wait_s=100)
    _, _, _, grant = await asker.reserve()
    await asker.settle(grant, refusal=RateLimited("", limit=limit, allowed=100))
    clock.now_s += 6
    await asker.reserve(20_000)
    assert (await asker.reserve())[1] == pytest.approx(20 / 0.98 / 0.859 - 1, rel=0.01)


def test_a_key_is_not_in_what_stands_for_it():
    assert key_id("jina", "jina_secret") == key_id("jina", "jina_secret")
    assert key_id("jina", "jina_secret") != key_id("jina", "jina_other")
    assert "secret" not in key_id("jina", "jina_secret")
    assert len(key_id("jina", "x")) == 16
