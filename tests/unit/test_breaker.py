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

    async def tell(self, *outcomes, op="", before=0, by="a"):
        for outcome in outcomes:
            arguments = [op, outcome, before, 5_000, 60_000, by]
            told = await self.connection.script("scheduler/breaker_note", [KEY], arguments)
        return tuple(told)

    async def tellers(self):
        return {field[3:] for field in await self.connection.command("HKEYS", KEY) if field.startswith("by:")}


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


async def one_that_fails_alone_stops_nobody(fleet):
    await fleet.tell("good", by="well")
    assert await fleet.tell(*["failed"] * 30, by="unlucky") == (CLOSED, 0)
    assert await fleet.tell("failed", by="well") == (OPEN, 5_000), "now it is the provider"


async def opens_when_more_processes_fail_than_go_well(fleet):
    for name in "cd":
        await fleet.tell("good", by=name)
    for name in "ab":
        assert await fleet.tell(*["failed"] * 30, by=name) == (CLOSED, 0), "as many fail as go well"
    assert await fleet.tell("failed", by="c") == (OPEN, 5_000)


async def who_was_well_long_ago_has_no_say(fleet, clock):
    await fleet.tell("good", by="idle")
    clock.now_s += 6
    assert await fleet.tell(*["failed"] * 10, by="a") == (CLOSED, 0)
    assert await fleet.tellers() == {"idle", "a"}
    clock.now_s += 2
    assert await fleet.tell("failed", by="a") == (OPEN, 5_000)
    assert await fleet.tellers() == {"a"}


async def a_clock_that_is_set_back_lets_the_well_have_no_say_for_ever(fleet, clock):
    await fleet.tell("good", by="idle")
    clock.now_s -= 86_400
    assert await fleet.tell(*["failed"] * 5, by="a") == (OPEN, 5_000)


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
    one_that_fails_alone_stops_nobody,
    opens_when_more_processes_fail_than_go_well,
    who_was_well_long_ago_has_no_say,
    a_clock_that_is_set_back_lets_the_well_have_no_say_for_ever,
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
    ("breaker_note", "return failing > well", "return true"),
    ("breaker_note", "return failing > well", "return failing >= well"),
    ("breaker_note", "return failing > well", "return well == 0"),
    ("breaker_note", "math.abs(now - at)", "now - at"),
    ("breaker_note", "LATELY_MS = 7500", "LATELY_MS = 15000"),
    ("breaker_note", "LATELY_MS = 7500", "LATELY_MS = 5000"),
    ("breaker_note", "redis.call('HDEL', KEYS[1], fields[i])", "local _ = 0"),
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


async def test_while_all_is_well_redis_is_asked_and_told_once_in_a_while(connection, calls, monkeypatch):
    now_s = anyio.current_time()
    monkeypatch.setattr("scheduler.breaker.anyio.current_time", lambda: now_s)
    breaker = Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1")
    for _ in range(1000):
        assert await breaker.admit() == ""
        await breaker.note("", "good")
    assert calls == ["pass", "note"]
    for _ in range(600):
        now_s += 0.1
        assert await breaker.admit() == ""
        await breaker.note("", "good")
    assert 12 <= len(calls) <= 2 + 2 * 12
    calls.clear()
    await breaker.note("", "failed")
    for _ in range(100):
        await breaker.note("", "good")
    assert calls == ["note", "note"], "a failure, and the first that went well after it"


async def test_five_failures_of_one_process_amid_the_successes_of_another_stop_neither(connection):
    well, unlucky = (Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1") for _ in range(2))
    for breaker, health, times in ((well, "good", 250), (unlucky, "failed", 5), (well, "good", 250)):
        for _ in range(times):
            assert await breaker.admit() == ""
            await breaker.note("", health)
    assert not well.is_open
    assert not unlucky.is_open


async def test_who_sent_a_single_request_keeps_nothing_closed(connection):
    tried, fails = (Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1") for _ in range(2))
    await tried.note("", "good")
    for _ in range(5):
        await fails.note("", "failed")
    assert fails.is_open


async def test_when_all_processes_fail_those_that_were_well_a_moment_ago_keep_nothing_open(connection):
    fleet = [Breaker(connection, namespace="t", key_id="k", api_base="http://x/v1") for _ in range(3)]
    for breaker in (*fleet, *fleet):
        await breaker.note("", "good")
    for _ in range(5):
        for breaker in fleet:
            await breaker.note("", "failed", said="503")
    assert all(breaker.is_open for breaker in fleet)


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
    # The second has seen no failure itself.
    assert sum(message.endswith("until a probe goes well") for message in caplog.messages) == 1
