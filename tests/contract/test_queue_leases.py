"""What the queue promises of leases, on every server, and against scripts with a known fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from embedmill.connection import Script, script_text
from scheduler.queue import Depth, Extended
from tests.contract.queue_bench import LEASE_S, Bench, only, shards, task, tasks

Scenario = Callable[[Bench], Awaitable[None]]


# Each of these is a contract test below, and what a faulty script must fail.


async def an_old_lease_cannot_extend_a_later_one(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    old = await only(queue.lease("old"))
    await bench.elapse(LEASE_S)
    new = await only(queue.lease("new"))
    assert (await queue.extend([old])).lost == {old.task.id}
    await bench.elapse(LEASE_S - 1)
    assert (await queue.extend([old], progressed=[old.task.id])).lost == {old.task.id}
    await bench.elapse(1)
    assert (await only(queue.lease("third"))).deliveries == 3
    assert (await queue.extend([new])).lost == {new.task.id}


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
    assert await queue.extend([new]) == Extended()


async def a_finished_task_is_nowhere(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(4))
    leased, delayed, expired = await queue.lease("w", count=3)
    await queue.retry(delayed, delay_s=5)
    await bench.elapse(LEASE_S)
    assert await queue.extend([leased]) == Extended()
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
        "extend", "task[1] == ARGV[i + 1] and ", "", an_old_lease_cannot_extend_a_later_one
    ),
    "hand back without a fence": Fault(
        "give_back",
        "redis.call('HGET', key, 'epoch') ~= epoch or ",
        "",
        an_old_lease_can_neither_release_nor_retry_a_later_one,
    ),
    "finish leaves the lease": Fault("finish", "  redis.call('ZREM', leased, id)\n", "", a_finished_task_is_nowhere),
    "lease without reclaim": Fault("lease", "\nback(leased)\n", "\n", what_a_dead_worker_held_comes_back),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_faulty_script_is_noticed(bench: Bench, fault: Fault) -> None:
    source = script_text(f"scheduler/{fault.script}")
    assert source.count(fault.text) == 1
    connection = bench.connection
    faulty = Script(source.replace(fault.text, fault.replacement))
    connection._scripts[f"scheduler/{fault.script}"] = faulty
    with pytest.raises(AssertionError):
        await fault.noticed_by(bench)
