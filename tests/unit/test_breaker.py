"""The breaker's scripts under a clock of the test's own, as fakeredis reads it, and what it costs while all is well."""

from __future__ import annotations

import anyio
import pytest

from embedmill import connection as connections
from embedmill.connection import FAKE_URL, Connection
from scheduler.breaker import Breaker
from tests.mutants import script_mutant

KEY = "{embedmill:2:t}:breaker:k:0"
CLOSED, OPEN, PROBE = 0, 1, 2


class Fleet:
    """The scripts as processes call them, with 5 s at first, 60 s at most and probes of 20 s."""

    def __init__(self, connection):
        self.connection = connection

    async def ask(self, op):
        return tuple(await self.connection.script("scheduler/breaker_pass", [KEY], [op, 20_000, 60_000]))

    async def tell(self, *outcomes, op="", before=0):
        for outcome in outcomes:
            told = await self.connection.script("scheduler/breaker_note", [KEY], [op, outcome, before, 5_000, 60_000])
        return tuple(told)


@pytest.fixture
def fleet(connection):
    return Fleet(connection)


async def opens_at_once_when_five_in_a_row_fail(fleet):
    assert await fleet.tell(*["failed"] * 4) == (CLOSED, 0)
    assert await fleet.ask("a") == (CLOSED, 1)
    assert await fleet.tell("failed") == (OPEN, 5_000)
    assert await fleet.ask("a") == (OPEN, 5_000)


async def opens_when_half_of_the_last_twenty_fail(fleet):
    assert await fleet.tell(*["failed", "good"] * 9, "good") == (CLOSED, 0)
    assert await fleet.tell("failed") == (OPEN, 5_000)


async def stays_closed_while_fewer_fail(fleet):
    for _ in range(40):
        assert await fleet.tell("failed", "good", "good") == (CLOSED, 0)
    # What went well untold stands before each failure.
    for _ in range(40):
        assert await fleet.tell("failed", before=3) == (CLOSED, 0)


async def one_probe_decides_for_all(fleet, clock):
    await fleet.tell(*["failed"] * 5)
    clock.now_s += 5
    assert await fleet.ask("a") == (PROBE, 20_000)
    assert await fleet.ask("b") == (OPEN, 1_000)
    assert await fleet.tell("good") == (OPEN, 0), "what was sent before it opened closes nothing"
    assert await fleet.tell("good", op="b") == (OPEN, 0)
    assert await fleet.tell("good", op="a") == (CLOSED, 0)
    assert await fleet.ask("b") == (CLOSED, 0)


async def probes_that_fail_double_the_time_up_to_a_minute(fleet, clock):
    await fleet.tell(*["failed"] * 5)
    for wait_s in (10, 20, 40, 60, 60):
        clock.now_s += 60
        assert await fleet.ask("a") == (PROBE, 20_000)
        assert await fleet.tell("failed", op="a") == (OPEN, wait_s * 1000)
        assert await fleet.ask("b") == (OPEN, wait_s * 1000)
    clock.now_s += 60
    assert (await fleet.ask("a"))[0] == PROBE
    await fleet.tell("good", op="a")
    assert await fleet.tell(*["failed"] * 5) == (OPEN, 5_000), "success does not begin anew"


async def a_probe_of_the_dead_is_given_to_another(fleet, clock):
    await fleet.tell(*["failed"] * 5)
    clock.now_s += 5
    assert (await fleet.ask("dies"))[0] == PROBE
    clock.now_s += 15
    assert (await fleet.ask("b"))[0] == OPEN
    assert (await fleet.ask("dies"))[0] == PROBE, "asked again, it is kept"
    clock.now_s += 15
    assert (await fleet.ask("b"))[0] == OPEN
    clock.now_s += 6
    assert (await fleet.ask("b"))[0] == PROBE
    assert await fleet.tell("failed", op="dies") == (OPEN, 0), "it has no say any more"
    assert (await fleet.ask("b"))[0] == PROBE


async def a_probe_that_says_nothing_is_given_back(fleet, clock):
    await fleet.tell(*["failed"] * 5)
    clock.now_s += 5
    assert (await fleet.ask("limited"))[0] == PROBE
    assert await fleet.tell("unclear", op="limited") == (OPEN, 0)
    assert (await fleet.ask("b"))[0] == PROBE


async def a_clock_that_is_set_back_holds_nobody_longer_than_a_minute(fleet, clock):
    await fleet.tell(*["failed"] * 5)
    clock.now_s -= 86_400
    assert await fleet.ask("a") == (OPEN, 60_000)


SCENARIOS = [
    opens_at_once_when_five_in_a_row_fail,
    opens_when_half_of_the_last_twenty_fail,
    stays_closed_while_fewer_fail,
    one_probe_decides_for_all,
    probes_that_fail_double_the_time_up_to_a_minute,
    a_probe_of_the_dead_is_given_to_another,
    a_probe_that_says_nothing_is_given_back,
    a_clock_that_is_set_back_holds_nobody_longer_than_a_minute,
]
MUTANTS = [
    ("breaker_note", "IN_A_ROW, KEPT_MS = 20, 10, 5,", "IN_A_ROW, KEPT_MS = 20, 10, 6,"),
    ("breaker_note", "failed >= SHARE", "failed > SHARE"),
    ("breaker_note", "string.rep('0', math.min(before, LAST))", "''"),
    ("breaker_note", "op == '' or op ~= probe", "op == ''"),
    ("breaker_note", "redis.call('DEL', KEYS[1])", "redis.call('HDEL', KEYS[1], 'probe')"),
    ("breaker_note", "2 * tonumber(open_ms)", "tonumber(open_ms)"),
    ("breaker_note", "math.min(longest, 2 *", "math.max(longest, 2 *"),
    ("breaker_note", "  redis.call('HDEL', KEYS[1], 'probe', 'probe_until')\n  return {1, 0}", "  return {1, 0}"),
    ("breaker_pass", "probe ~= op and left > 0", "false"),
    ("breaker_pass", "probe ~= op and left > 0", "probe and probe ~= op"),
    ("breaker_pass", "math.min(tonumber(until_ms) - now, longest)", "tonumber(until_ms) - now"),
]


async def run(scenario, fleet, clock):
    await (scenario(fleet, clock) if "clock" in scenario.__code__.co_varnames else scenario(fleet))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_the_breaker(scenario, fleet, clock):
    await run(scenario, fleet, clock)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1][:30]}")
async def test_a_known_bad_breaker_is_noticed(mutant, clock):
    noticed = False
    with script_mutant(*mutant)():
        for scenario in SCENARIOS:
            connection = Connection(FAKE_URL)
            try:
                await run(scenario, Fleet(connection), clock)
            except AssertionError:
                noticed = True
            finally:
                await connection.aclose()
    assert noticed


async def test_every_key_of_it_lies_in_the_namespaces_slot_and_expires(connection):
    breaker = Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1")
    for _ in range(5):
        await breaker.note("", "failed")
    (key,) = await connection.command("KEYS", "*")
    assert key.startswith("{embedmill:2:t}:breaker:k:")
    assert 0 < int(await connection.command("PTTL", key)) <= 3_600_000


@pytest.fixture
def calls(monkeypatch):
    """The scripts that are run, by name."""
    names = []
    script = connections.Connection.script

    async def counted(self, name, *arguments):
        names.append(name.removeprefix("scheduler/breaker_"))
        return await script(self, name, *arguments)

    monkeypatch.setattr(connections.Connection, "script", counted)
    return names


async def test_while_all_is_well_redis_is_asked_once_in_a_while_and_told_nothing(connection, calls):
    breaker = Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1")
    for _ in range(1000):
        assert await breaker.admit() == ""
        await breaker.note("", "good")
    assert calls == ["pass"]
    await breaker.note("", "failed")
    for _ in range(100):
        await breaker.note("", "good")
    assert calls == ["pass", "note", "note"], "a failure, and the first that went well after it"


async def test_another_process_learns_of_an_open_breaker_and_waits_for_the_probe(connection, caplog):
    ours, theirs = (
        Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1", first_s=0.3, look_every_s=0)
        for _ in range(2)
    )
    for _ in range(5):
        await ours.note("", "failed", said="Jina answered 503")
    assert ours.is_open
    assert "503" in ours.trouble
    admitted = []

    async def enter(breaker):
        op = await breaker.admit()
        admitted.append(op)
        if op:
            await anyio.sleep(0.2)
            assert len(admitted) == 1, "more than one probe"
            await breaker.note(op, "good")

    began = anyio.current_time()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for breaker in (ours, theirs, ours, theirs, theirs):
                group.start_soon(enter, breaker)
    assert anyio.current_time() - began >= 0.5
    assert sorted(map(bool, admitted)) == [False] * 4 + [True]
    assert (ours.is_open, theirs.is_open, ours.trouble) == (False, False, "")
    assert caplog.text.count("fails again and again") == caplog.text.count("answers again") == 2
