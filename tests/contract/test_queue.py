"""What the queue promises, on fakeredis and on a real server, against a model, and against scripts with a known fault.

Time passes by moving every due time back: the same as a later clock, on a server whose clock cannot be set.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from typing import TypeVar

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import ConfigurationError, Overloaded
from embedmill.messages import DeadLetter, Lane, Task
from scheduler.queue import Depth, Lease, Queue

LEASE_S = 30.0
PREFIX = "{embedmill:1:tested}"
T = TypeVar("T")
Scenario = Callable[["Bench"], Awaitable[None]]


@dataclass(frozen=True)
class Bench:
    """A queue on an empty server, and its time."""

    connection: Connection

    @property
    def queue(self) -> Queue:
        return Queue(self.connection, namespace="tested", lease_s=LEASE_S)

    async def elapse(self, seconds: float) -> None:
        for name in ("leased", "delayed"):
            key = f"{PREFIX}:{name}"
            for id_ in await self.connection.command("ZRANGE", key, 0, -1):
                await self.connection.command("ZINCRBY", key, -seconds * 1000, id_)

    async def announced(self) -> int:
        return int(await self.connection.command("XLEN", f"{PREFIX}:announced"))


@pytest.fixture
def bench(connection: Connection) -> Bench:
    return Bench(connection)


def task(shard: int, *, lane: Lane = "bulk") -> Task:
    return Task("/data/wiki über", "d0", shard, "main", 10, 100, lane)


def tasks(count: int, *, lane: Lane = "bulk") -> list[Task]:
    return [task(shard, lane=lane) for shard in range(count)]


def shards(leases: Iterable[Lease]) -> list[int]:
    return [lease.task.shard for lease in leases]


def letter(shard: int, row: int) -> DeadLetter:
    return DeadLetter("/data/wiki", "main", f"id{row}", 1, shard, row, "gate", "the vector is zero")


async def only(leases: Awaitable[list[Lease]]) -> Lease:
    (lease,) = await leases
    return lease


# Each of these is a contract test below, and what a faulty script must fail.


async def an_old_lease_cannot_extend_a_later_one(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    old = await only(queue.lease("old"))
    await bench.elapse(LEASE_S)
    new = await only(queue.lease("new"))
    assert await queue.extend([old]) == {old.task.id}
    await bench.elapse(LEASE_S - 1)
    assert await queue.extend([old], progressed=[old.task.id]) == {old.task.id}
    await bench.elapse(1)
    assert (await only(queue.lease("third"))).deliveries == 3
    assert await queue.extend([new]) == {new.task.id}


async def an_old_lease_can_neither_release_nor_retry_a_later_one(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    old = await only(queue.lease("old"))
    await bench.elapse(LEASE_S)
    new = await only(queue.lease("new"))
    assert not await queue.release(old)
    assert not await queue.retry(old, delay_s=5)
    assert (await queue.depth()).leased == 1
    assert await queue.lease("third") == []
    assert await queue.extend([new]) == set()


async def a_finished_task_is_nowhere(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(4))
    leased, delayed, expired = await queue.lease("w", count=3)
    await queue.retry(delayed, delay_s=5)
    await bench.elapse(LEASE_S)
    assert await queue.extend([leased]) == set()
    for finished in (leased.task, delayed.task, expired.task, task(3)):
        assert await queue.finish(finished)
    assert await queue.depth() == Depth(0, 0, 0, 0, 0)
    await bench.elapse(10 * LEASE_S)
    assert await queue.lease("w", count=9) == []


async def what_a_dead_worker_held_comes_back(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(2))
    dead = await queue.lease("dead", count=2)
    assert await queue.lease("w") == []
    await bench.elapse(LEASE_S - 1)
    assert await queue.lease("w") == []
    await bench.elapse(1)
    again = await queue.lease("w", count=5)
    assert shards(again) == shards(dead) == [0, 1]
    assert [lease.deliveries for lease in again] == [2, 2]
    assert all(int(new.epoch) > int(old.epoch) for new, old in zip(again, dead, strict=True))


SCENARIOS: list[Scenario] = [
    an_old_lease_cannot_extend_a_later_one,
    an_old_lease_can_neither_release_nor_retry_a_later_one,
    a_finished_task_is_nowhere,
    what_a_dead_worker_held_comes_back,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_lease_keeps_its_promises_when(bench: Bench, scenario: Scenario) -> None:
    await scenario(bench)


@dataclass(frozen=True)
class Fault:
    """A script with `text` replaced, and the scenario that must notice."""

    script: str
    text: str
    replacement: str
    noticed_by: Scenario


FAULTS = {
    "extend without a fence": Fault(
        "extend", "redis.call('HGET', key, 'epoch') == ARGV[i + 1] and ", "", an_old_lease_cannot_extend_a_later_one
    ),
    "hand back without a fence": Fault(
        "give_back",
        "redis.call('HGET', key, 'epoch') ~= epoch or ",
        "",
        an_old_lease_can_neither_release_nor_retry_a_later_one,
    ),
    "finish leaves the lease": Fault(
        "finish", "redis.call('ZREM', prefix .. ':leased', id)\n", "", a_finished_task_is_nowhere
    ),
    "lease without reclaim": Fault("lease", "\nback(leased)\n", "\n", what_a_dead_worker_held_comes_back),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_faulty_script_is_noticed(bench: Bench, fault: Fault) -> None:
    source = resources.files("scheduler").joinpath(f"scripts/{fault.script}.lua").read_text(encoding="utf-8")
    assert source.count(fault.text) == 1
    connection = bench.connection
    faulty = connection._commands.register_script(source.replace(fault.text, fault.replacement))
    connection._scripts[f"scheduler/{fault.script}"] = faulty
    with pytest.raises(AssertionError):
        await fault.noticed_by(bench)


async def test_enqueuing_again_adds_nothing_wherever_the_task_is(bench: Bench) -> None:
    queue = bench.queue
    assert await queue.enqueue(tasks(3)) == 3
    held, later = await queue.lease("w", count=2)
    await queue.retry(later, delay_s=5)
    assert await queue.enqueue([*tasks(3), *tasks(3)]) == 0
    assert await queue.depth() == Depth(0, 1, 1, 1, 0)
    assert await queue.extend([held]) == set()
    assert await queue.enqueue(task(shard) for shard in range(2, 5)) == 2


async def test_a_task_comes_out_as_it_went_in(bench: Bench) -> None:
    await bench.queue.enqueue([task(7, lane="live")])
    lease = await only(bench.queue.lease("w"))
    assert lease.task == task(7, lane="live")
    assert (lease.deliveries, lease.attempts) == (1, 0)


async def test_tasks_leave_in_the_order_in_which_they_came(bench: Bench) -> None:
    await bench.queue.enqueue([task(5), task(3)])
    await bench.queue.enqueue([task(9), task(1)])
    assert shards(await bench.queue.lease("w", count=3)) == [5, 3, 9]
    assert shards(await bench.queue.lease("w", count=3)) == [1]


async def test_more_tasks_than_one_call_takes_are_all_added(bench: Bench) -> None:
    assert await bench.queue.enqueue(tasks(450)) == 450
    assert shards(await bench.queue.lease("w", count=450)) == list(range(450))


async def test_an_expired_lease_comes_back_in_one_call_however_many_live_ones_there_are(bench: Bench) -> None:
    brief = Queue(bench.connection, namespace="tested", lease_s=5)
    await bench.queue.enqueue(tasks(301))
    assert len(await bench.queue.lease("w", count=150)) == 150
    assert shards(await brief.lease("dead")) == [150]
    assert len(await bench.queue.lease("w", count=150)) == 150
    await bench.elapse(5)
    assert shards(await bench.queue.lease("w", count=9)) == [150]


async def test_many_leases_that_expire_at_once_all_come_back(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(250))
    await bench.queue.lease("dead", count=250)
    await bench.elapse(LEASE_S)
    back = [shard for _ in range(3) for shard in shards(await bench.queue.lease("w", count=250))]
    assert sorted(back) == list(range(250))


async def test_an_extended_lease_stays_as_long_as_it_is_extended(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    lease = await only(bench.queue.lease("w"))
    for _ in range(5):
        await bench.elapse(LEASE_S - 1)
        assert await bench.queue.extend([lease]) == set()
        assert await bench.queue.lease("other") == []


async def test_extending_an_expired_lease_that_nobody_took_keeps_it(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    lease = await only(bench.queue.lease("w"))
    await bench.elapse(2 * LEASE_S)
    assert await bench.queue.extend([lease]) == set()
    assert await bench.queue.lease("other") == []


async def test_a_released_task_is_the_first_again_and_its_delivery_does_not_count(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(3))
    for _ in range(4):
        lease = await only(bench.queue.lease("w"))
        assert (lease.task.shard, lease.deliveries, lease.attempts) == (0, 1, 0)
        assert await bench.queue.release(lease)
        assert await bench.queue.extend([lease]) == {lease.task.id}


async def test_deliveries_count_until_there_is_progress(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    seen = []
    for progressed in (False, False, True, False):
        lease = await only(bench.queue.lease("w"))
        seen.append(lease.deliveries)
        await bench.queue.extend([lease], progressed=[lease.task.id] if progressed else [])
        await bench.elapse(LEASE_S)
    assert seen == [1, 2, 3, 1]


async def test_a_retried_task_comes_back_after_its_delay_with_an_attempt_more(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(2))
    lease = await only(bench.queue.lease("w"))
    assert await bench.queue.retry(lease, delay_s=5)
    assert await bench.queue.depth() == Depth(0, 1, 0, 1, 0)
    await bench.elapse(4)
    assert shards(await bench.queue.lease("w", count=2)) == [1]
    await bench.elapse(1)
    again = await only(bench.queue.lease("w"))
    assert (again.task.shard, again.deliveries, again.attempts) == (0, 1, 1)


async def test_a_finished_task_is_announced_once_and_keeps_its_dead_letters_once(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    await bench.queue.lease("w")
    letters = [letter(1, 3), letter(1, 4)]
    assert await bench.queue.finish(task(1), dead=letters)
    for _ in range(2):
        assert not await bench.queue.finish(task(1), dead=letters)
    assert await bench.announced() == 1
    assert (await bench.queue.depth()).dead == 2
    stored = await bench.connection.command("HGETALL", f"{PREFIX}:dead")
    fields = dict(zip(stored[::2], stored[1::2], strict=True)) if isinstance(stored, list) else stored
    assert {key: json.loads(value)["id"] for key, value in fields.items()} == {
        "/data/wiki#1/3": "id3",
        "/data/wiki#1/4": "id4",
    }


async def test_the_announcement_says_which_shard(bench: Bench) -> None:
    await bench.queue.enqueue([task(8)])
    await bench.queue.finish(task(8))
    ((_, fields),) = await bench.connection.command("XRANGE", f"{PREFIX}:announced", "-", "+")
    record = json.loads(fields[1] if isinstance(fields, list) else fields["shard"])
    assert record == {"v": 1, "dataset": "/data/wiki über", "dataset_id": "d0", "shard": 8}


async def test_finishing_what_redis_forgot_is_harmless(bench: Bench) -> None:
    assert not await bench.queue.finish(task(1), dead=[letter(1, 0)])
    assert await bench.announced() == 0
    assert (await bench.queue.depth()).dead == 1


async def test_live_goes_first_and_bulk_gets_one_in_nine(bench: Bench) -> None:
    await bench.queue.enqueue([task(shard, lane="live") for shard in range(100, 140)])
    await bench.queue.enqueue(tasks(10))
    lanes = [(await only(bench.queue.lease("w"))).task.lane for _ in range(36)]
    assert lanes.count("bulk") == 4
    assert all("bulk" in lanes[start : start + 9] for start in range(27))


async def test_a_lane_that_is_empty_does_not_hold_up_the_other(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(20))
    assert len(await bench.queue.lease("w", count=20)) == 20
    await bench.queue.enqueue([task(shard, lane="live") for shard in range(100, 120)])
    assert len(await bench.queue.lease("w", count=20)) == 20


async def test_a_returned_task_goes_back_into_its_own_lane(bench: Bench) -> None:
    await bench.queue.enqueue([task(1, lane="live"), task(2)])
    first, second = await bench.queue.lease("w", count=2)
    await bench.queue.release(first)
    await bench.queue.retry(second, delay_s=1)
    assert await bench.queue.depth() == Depth(1, 0, 0, 1, 0)
    await bench.elapse(1)
    assert shards(await bench.queue.lease("w", count=2)) == [1, 2]


async def test_epochs_grow_even_when_redis_forgot_its_counter(bench: Bench) -> None:
    epochs = []
    for shard in range(4):
        await bench.queue.enqueue([task(shard)])
        epochs.append(int((await only(bench.queue.lease("w"))).epoch))
        await bench.connection.command("DEL", f"{PREFIX}:meta")
    assert epochs == sorted(set(epochs))


async def test_epochs_grow_even_when_the_clock_of_redis_was_set_back(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(2))
    future = int((await only(bench.queue.lease("w"))).epoch) + 10**12
    await bench.connection.command("HSET", f"{PREFIX}:meta", "epoch", future)
    assert int((await only(bench.queue.lease("w"))).epoch) == future + 1


async def test_leases_from_before_redis_lost_everything_are_lost(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    old = await only(bench.queue.lease("w"))
    await bench.connection.command("FLUSHALL")
    assert await bench.queue.extend([old]) == {old.task.id}
    await bench.queue.enqueue([task(1)])
    new = await only(bench.queue.lease("w"))
    assert await bench.queue.extend([old, new]) == {old.task.id}
    assert not await bench.queue.release(old)
    assert not await bench.queue.retry(old, delay_s=1)
    assert (await bench.queue.depth()).leased == 1


async def test_a_command_whose_reply_was_lost_can_be_repeated(bench: Bench) -> None:
    queue = bench.queue
    assert [await queue.enqueue(tasks(3)) for _ in range(2)] == [3, 0]
    extended, released, retried = await queue.lease("w", count=3)
    assert [await queue.extend([extended], progressed=[extended.task.id]) for _ in range(2)] == [set(), set()]
    assert [await queue.release(released) for _ in range(2)] == [True, False]
    assert [await queue.retry(retried, delay_s=5) for _ in range(2)] == [True, False]
    assert await queue.depth() == Depth(0, 1, 1, 1, 0)
    assert [await queue.finish(extended.task) for _ in range(2)] == [True, False]
    await bench.elapse(5)
    assert [(lease.task.shard, lease.deliveries, lease.attempts) for lease in await queue.lease("w", count=9)] == [
        (1, 1, 0),
        (2, 1, 1),
    ]


async def test_a_lease_expires_by_the_clock_of_the_server(connection: Connection) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.3)
    await queue.enqueue([task(1)])
    await queue.lease("dead")
    with anyio.fail_after(10):
        while not (again := await queue.lease("w")):  # noqa: ASYNC110
            await anyio.sleep(0.02)
    assert again[0].deliveries == 2


async def test_namespaces_do_not_see_each_other(connection: Connection) -> None:
    ours, theirs = Queue(connection, namespace="ours"), Queue(connection, namespace="theirs")
    await ours.enqueue([task(1)])
    assert await theirs.lease("w") == []
    assert (await theirs.depth()).open == 0
    assert (await ours.depth()).open == 1


async def test_waiting_ends_when_a_task_is_added_and_when_a_shard_is_announced(bench: Bench) -> None:
    seen: dict[str, str] = {}

    async def wait(name: str, waiting: Callable[..., Awaitable[str]]) -> None:
        seen[name] = await waiting("0", timeout_s=20)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as work:
            work.start_soon(wait, "work", bench.queue.wait_for_work)
            await anyio.sleep(0.05)
            await bench.queue.enqueue([task(1)])
        async with anyio.create_task_group() as work:
            work.start_soon(wait, "announcement", bench.queue.wait_for_announcement)
            await anyio.sleep(0.05)
            await bench.queue.finish(task(1))
    assert await bench.queue.wait_for_work(seen["work"], timeout_s=0.01) == seen["work"]
    assert await bench.queue.wait_for_announcement(seen["announcement"], timeout_s=0.01) == seen["announcement"]


async def test_a_server_that_stays_away_is_an_overload_without_its_password() -> None:
    connection = Connection("redis://:secret@127.0.0.1:1/0", retry_for_s=0.1)
    try:
        with pytest.raises(Overloaded, match=r"Redis at redis://:\*\*\*@127\.0\.0\.1:1/0 does not answer") as caught:
            await Queue(connection).depth()
        assert "secret" not in str(caught.value)
        with pytest.raises(ConfigurationError, match="cannot reach Redis at"):
            await connection.check()
    finally:
        await connection.aclose()


@dataclass
class Place:
    """What the model knows of one task. due_s: when its lease or its delay ends."""

    lane: Lane
    position: int
    state: str = "ready"
    due_s: float = 0
    epoch: str = "0"
    deliveries: int = 0
    attempts: int = 0


class QueueModel(RuleBasedStateMachine):
    """The queue against a dictionary. Every command may be sent twice, as when its reply was lost."""

    given = Bundle("given")
    twice = st.booleans()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bench = self.run(self._start())
        self.places: dict[int, Place] = {}
        self.now_s = 0.0
        self.turn = self.position = self.announced = 0
        self.last_epoch = 0

    async def _start(self) -> Bench:
        return Bench(Connection(FAKE_URL))

    def run(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self.runner.run(wait())

    def teardown(self) -> None:
        self.run(self.bench.connection.aclose())
        self.runner.close()

    @rule(shard=st.integers(0, 5), lane=st.sampled_from(["live", "bulk"]), again=twice)
    def enqueue(self, shard: int, lane: Lane, again: bool) -> None:
        added = self.run(self.bench.queue.enqueue([task(shard, lane=lane)]))
        assert added == (shard not in self.places)
        if shard not in self.places:
            self.position += 1
            self.places[shard] = Place(lane, self.position)
        if again:
            assert self.run(self.bench.queue.enqueue([task(shard, lane=lane)])) == 0

    @rule(target=given, count=st.integers(1, 3))
    def lease(self, count: int) -> object:
        leases = self.run(self.bench.queue.lease("w", count=count))
        assert [(lease.task.shard, lease.deliveries, lease.attempts) for lease in leases] == [
            (shard, self.places[shard].deliveries, self.places[shard].attempts) for shard in self._lease(count)
        ]
        for lease in leases:
            assert int(lease.epoch) > self.last_epoch
            self.last_epoch = int(lease.epoch)
            self.places[lease.task.shard].epoch = lease.epoch
        return multiple(*leases)

    def _lease(self, count: int) -> list[int]:
        for place in self.places.values():
            if place.state != "ready" and place.due_s <= self.now_s:
                place.state = "ready"
        taken: list[int] = []
        while len(taken) < count:
            self.turn += 1
            ready = [(p.lane, p.position, shard) for shard, p in self.places.items() if p.state == "ready"]
            first = "bulk" if self.turn % 9 == 0 else "live"
            if not ready:
                break
            _, _, shard = min(ready, key=lambda entry: (entry[0] != first, entry[1]))
            place = self.places[shard]
            place.state, place.due_s, place.deliveries = "leased", self.now_s + LEASE_S, place.deliveries + 1
            taken.append(shard)
        return taken

    def _held(self, lease: Lease) -> Place | None:
        place = self.places.get(lease.task.shard)
        return place if place and place.state == "leased" and place.epoch == lease.epoch else None

    @rule(lease=given, progressed=st.booleans(), again=twice)
    def extend(self, lease: Lease, progressed: bool, again: bool) -> None:
        place = self._held(lease)
        for _ in range(1 + again):
            lost = self.run(self.bench.queue.extend([lease], progressed=[lease.task.id] if progressed else []))
            assert lost == (set() if place else {lease.task.id})
        if place:
            place.due_s = self.now_s + LEASE_S
            place.deliveries = 0 if progressed else place.deliveries

    @rule(lease=given, delay_s=st.sampled_from([0, 10, 20]), again=twice)
    def hand_back(self, lease: Lease, delay_s: float, again: bool) -> None:
        queue, place = self.bench.queue, self._held(lease)

        def call() -> Awaitable[bool]:
            return queue.retry(lease, delay_s=delay_s) if delay_s else queue.release(lease)

        assert self.run(call()) == (place is not None)
        if again:
            assert not self.run(call())
        if place:
            place.deliveries = max(0, place.deliveries - 1)
            place.attempts += bool(delay_s)
            place.state, place.due_s = ("delayed", self.now_s + delay_s) if delay_s else ("ready", 0)

    @rule(shard=st.integers(0, 5), again=twice)
    def finish(self, shard: int, again: bool) -> None:
        done = self.run(self.bench.queue.finish(task(shard)))
        assert done == (self.places.pop(shard, None) is not None)
        self.announced += done
        if again:
            assert not self.run(self.bench.queue.finish(task(shard)))

    @rule(seconds=st.sampled_from([10, 30]))
    def elapse(self, seconds: int) -> None:
        self.now_s += seconds
        self.run(self.bench.elapse(seconds))

    @invariant()
    def every_task_is_in_one_place(self) -> None:
        states = [f"ready {p.lane}" if p.state == "ready" else p.state for p in self.places.values()]
        expected = [*(states.count(state) for state in ("ready live", "ready bulk", "leased", "delayed")), 0]
        assert self.run(self.bench.queue.depth()) == Depth(*expected)
        assert self.run(self.bench.announced()) == self.announced


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
