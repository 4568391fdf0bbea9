"""What the queue promises of leases and tasks, as scenarios: the right scripts pass each of them, on every server, and each
known fault of tests/mutants.py fails the one that it is listed with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

from scheduler.queue import Depth, Extended
from tests.contract.queue_bench import LEASE_S, Bench, only, shards, task, tasks

Scenario = Callable[[Bench], Awaitable[None]]


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


async def expired_leases_all_come_back_beside_one_that_lives(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(4))
    await queue.lease("dead", count=3)
    await bench.elapse(LEASE_S - 1)
    living = await only(queue.lease("living"))
    await bench.elapse(1)
    assert shards(await queue.lease("w", count=9)) == [0, 1, 2]
    assert await queue.extend([living]) == Extended()


async def a_lease_from_before_redis_lost_everything_is_lost(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    old = await only(queue.lease("old"))
    await bench.connection.command("FLUSHALL")
    await queue.enqueue([task(1)])
    new = await only(queue.lease("new"))
    assert int(new.epoch) > int(old.epoch)
    assert (await queue.extend([old, new])).lost == {old.task.id}
    assert not await queue.release(old)
    assert (await queue.depth()).leased == 1


async def deliveries_count_until_there_is_progress(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    seen = []
    for progressed in (False, False, True, False):
        lease = await only(queue.lease("w"))
        seen.append(lease.deliveries)
        await queue.extend([lease], progressed=[lease.task.id] if progressed else [])
        await bench.elapse(LEASE_S)
    assert seen == [1, 2, 3, 1]


async def a_known_task_is_not_added_again(bench: Bench) -> None:
    queue = bench.queue
    assert await queue.enqueue(tasks(3)) == 3
    held, later = await queue.lease("w", count=2)
    await queue.retry(later, delay_s=5)
    assert await queue.enqueue([*tasks(3), *tasks(3)]) == 0
    assert await queue.depth() == Depth(0, 1, 1, 1, 0)
    assert await queue.extend([held]) == Extended()


async def a_clock_that_was_set_back_delays_what_is_due_by_no_more_than_it_was_given_for(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(3))
    dead, later, living = await queue.lease("w", count=3)
    await queue.retry(later, delay_s=10)
    await bench.elapse(-3600)
    assert await queue.lease("w", count=9) == []
    await bench.elapse(10)
    assert shards(await queue.lease("w", count=9)) == [later.task.shard]
    assert await queue.extend([living]) == Extended()
    await bench.elapse(LEASE_S - 10)
    assert shards(await queue.lease("w", count=9)) == [dead.task.shard]
    assert await queue.extend([living]) == Extended()


async def bulk_of_one_embedder_has_its_turns_whatever_others_take(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="a", fingerprint="fa") for shard in range(100))
    await queue.enqueue(task(shard, lane="live", job="b live", fingerprint="fb") for shard in range(100, 120))
    await queue.enqueue([task(200, job="b", fingerprint="fb")])
    given: list[int] = []
    for _ in range(9):
        for fingerprint in ("fa", "fb", "fa"):
            given += shards(await queue.lease("w", fingerprint=fingerprint))
    assert 200 in given


async def what_expired_and_what_is_due_comes_back_when_a_full_worker_extends(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(3))
    _, later = await queue.lease("dead", count=2)
    await queue.retry(later, delay_s=5)
    await bench.elapse(LEASE_S - 1)
    living = await only(queue.lease("full"))
    await bench.elapse(1)
    assert await queue.extend([living]) == Extended()
    assert await queue.depth() == Depth(0, 2, 1, 0, 0)


async def what_is_released_is_not_charged(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="released") for shard in range(30))
    await queue.enqueue(task(shard, job="worked") for shard in range(100, 130))
    for _ in range(2):
        for lease in await queue.lease("w", count=10):
            if lease.task.job == "released":
                await queue.release(lease)
            else:
                await queue.finish(lease.task)
    jobs = [lease.task.job for lease in await queue.lease("w", count=10)]
    assert jobs[:5] == ["released"] * 5
    assert Counter(jobs)["worked"] <= 3


async def only_what_is_leased_can_be_dropped(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(2))
    held, released = await queue.lease("w", count=2)
    await queue.release(released)
    assert not await queue.drop(released)
    assert await queue.drop(held)
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)


SCENARIOS: list[Scenario] = [
    an_old_lease_cannot_extend_a_later_one,
    an_old_lease_can_neither_release_nor_retry_a_later_one,
    a_finished_task_is_nowhere,
    what_a_dead_worker_held_comes_back,
    expired_leases_all_come_back_beside_one_that_lives,
    a_lease_from_before_redis_lost_everything_is_lost,
    deliveries_count_until_there_is_progress,
    a_known_task_is_not_added_again,
    a_clock_that_was_set_back_delays_what_is_due_by_no_more_than_it_was_given_for,
    bulk_of_one_embedder_has_its_turns_whatever_others_take,
    what_expired_and_what_is_due_comes_back_when_a_full_worker_extends,
    what_is_released_is_not_charged,
    only_what_is_leased_can_be_dropped,
]
