"""Whose turn it is: lanes, jobs within a lane, jobs that stand still, and what can be seen of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest

from embedmill.messages import Lane
from scheduler.queue import Depth, Extended, Lease, Queue
from tests.contract.queue_bench import DATASET_ID, NAMESPACE, PREFIX, Bench, letter, only, shards, task, tasks


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


async def test_bulk_is_served_after_its_patience_however_slow_the_turns_are(bench: Bench) -> None:
    queue = Queue(bench.connection, namespace=NAMESPACE, bulk_patience_s=60)
    await queue.enqueue([*tasks(3), *(task(shard, lane="live") for shard in range(100, 110))])
    assert [(await only(queue.lease("w"))).task.lane for _ in range(3)] == ["live"] * 3
    served_ms = int(await bench.connection.command("HGET", f"{PREFIX}:meta", "bulk_served:"))
    await bench.connection.command("HSET", f"{PREFIX}:meta", "bulk_served:", served_ms - 60_000)
    assert [(await only(queue.lease("w"))).task.lane for _ in range(3)] == ["bulk", "live", "live"]


async def lease_all(queue: Queue, count: int) -> list[Lease]:
    return [await only(queue.lease("w")) for _ in range(count)]


async def test_jobs_take_turns_by_their_tokens_and_not_by_their_number_of_tasks(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="large", tokens=400) for shard in range(100))
    await queue.enqueue(task(shard, job="small", tokens=100) for shard in range(100, 200))
    served: Counter[str] = Counter()
    for lease in await lease_all(queue, 50):
        served[lease.task.job] += lease.task.cost
    assert abs(served["large"] - served["small"]) <= 400


async def test_a_job_that_comes_late_neither_waits_for_the_first_nor_catches_up(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="early") for shard in range(40))
    await lease_all(queue, 20)
    await queue.enqueue(task(shard, job="late") for shard in range(100, 140))
    jobs = [lease.task.job for lease in await lease_all(queue, 20)]
    assert Counter(jobs[:4]) == {"early": 2, "late": 2}
    assert Counter(jobs) == {"early": 10, "late": 10}


async def test_a_job_of_one_task_is_served_at_once_beside_one_of_thousands(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="thousands") for shard in range(1000))
    await lease_all(queue, 5)
    await queue.enqueue([task(5000, job="one")])
    assert 5000 in shards(await lease_all(queue, 2))


async def test_a_job_whose_tasks_are_all_leased_or_delayed_holds_nobody_up(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1, job="stuck"), task(2, job="stuck")])
    first, second = await queue.lease("w", count=2)
    await queue.retry(second, delay_s=100)
    await queue.enqueue(task(shard, job="healthy") for shard in range(10, 20))
    assert [lease.task.job for lease in await lease_all(queue, 10)] == ["healthy"] * 10
    assert await queue.extend([first]) == Extended()


async def test_tasks_wait_for_a_worker_with_their_embedder(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1, job="a", fingerprint="jina"), task(2, job="b", fingerprint="minilm")])
    assert shards(await queue.lease("w", count=5, fingerprint="minilm")) == [2]
    assert await queue.lease("w", count=5, fingerprint="minilm") == []
    assert {(job.job, job.fingerprint, job.ready) for job in await queue.jobs()} == {
        ("a", "jina", 1),
        ("b", "minilm", 0),
    }
    assert shards(await queue.lease("w", count=5, fingerprint="jina")) == [1]


async def test_a_worker_without_a_fingerprint_takes_the_tasks_of_all(bench: Bench) -> None:
    await bench.queue.enqueue([task(1, job="a", fingerprint="jina"), task(2, job="b", fingerprint="minilm")])
    assert sorted(shards(await bench.queue.lease("w", count=5))) == [1, 2]


async def test_a_paused_job_is_not_handed_out_and_its_holders_are_told(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(3))
    held = await only(queue.lease("w"))
    assert [await queue.pause(DATASET_ID, "bulk") for _ in range(2)] == [True, False]
    assert await queue.lease("w", count=5) == []
    assert await queue.extend([held]) == Extended(halted=frozenset({held.task.id}))
    assert await queue.release(held)
    assert await queue.lease("w", count=5) == []
    assert await queue.depth() == Depth(0, 3, 0, 0, 0)
    assert [await queue.resume(DATASET_ID, "bulk") for _ in range(2)] == [True, False]
    again = await queue.lease("w", count=5)
    assert shards(again) == [0, 1, 2]
    assert [lease.deliveries for lease in again] == [1, 1, 1]


@pytest.mark.parametrize("first", ["pause", "enqueue"])
async def test_a_paused_job_stays_paused_whatever_is_added_or_comes_back(bench: Bench, first: str) -> None:
    queue = bench.queue
    if first == "enqueue":
        await queue.enqueue([task(1)])
        await queue.lease("dead")
    await queue.pause(DATASET_ID, "bulk")
    await queue.enqueue([task(2)])
    await bench.elapse(100)
    assert await queue.lease("w", count=5) == []
    await queue.enqueue([task(3, lane="live")])
    assert shards(await queue.lease("w", count=5)) == [3]


async def test_a_forgotten_job_is_gone_with_its_leases_and_the_others_stay(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([*tasks(4), task(9, job="other")])
    held, later = [lease for lease in await queue.lease("w", count=3) if lease.task.job == "bulk"]
    await queue.retry(later, delay_s=5)
    assert await queue.forget(DATASET_ID, "bulk") == 4
    assert (await queue.extend([held])).lost == {held.task.id}
    assert [job.job for job in await queue.jobs()] == ["other"]
    await bench.elapse(100)
    assert shards(await queue.lease("w", count=5)) == [9]
    assert await queue.forget(DATASET_ID, "bulk") == 0


async def test_a_large_job_is_forgotten_in_blocks_between_which_nobody_gets_its_tasks(bench: Bench) -> None:
    queue, execute, blocks = bench.queue, bench.connection.script, 0
    await queue.enqueue([*tasks(2500), *(task(shard, job="other") for shard in range(5000, 5020))])
    for lease in (await queue.lease("w", count=1500))[::2]:
        await queue.retry(lease, delay_s=5)
    others = next(job for job in await queue.jobs() if job.job == "other")

    async def watched(name: str, keys: Sequence[str], arguments: Sequence[Any] = ()) -> Any:
        nonlocal blocks
        reply = await execute(name, keys, arguments)
        if name == "scheduler/forget":
            blocks += 1
            assert reply[0] <= 1000
            assert "bulk" not in {lease.task.job for lease in await queue.lease("w", count=1)}
        return reply

    with mock.patch.object(bench.connection, "script", watched):
        assert await queue.forget(DATASET_ID, "bulk") == 2500
    assert blocks > 5
    (left,) = await queue.jobs()
    assert (left.job, left.tasks, left.rows) == ("other", others.tasks, others.rows)
    assert len(await bench.connection.command("KEYS", f"{PREFIX}:task:*")) == others.tasks
    assert await queue.enqueue([task(7)]) == 1
    assert not next(job for job in await queue.jobs() if job.job == "bulk").paused


async def test_a_job_that_is_half_forgotten_is_paused_and_can_be_forgotten_again(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(1200))
    await bench.connection.script("scheduler/forget", [PREFIX], [f"{DATASET_ID}:bulk", 0, "ready", "0"])
    (job,) = await queue.jobs()
    assert (job.paused, job.ready) == (True, 700)
    assert await queue.lease("w") == []
    assert await queue.forget(DATASET_ID, "bulk") == 700
    assert await queue.jobs() == []


async def test_a_large_queue_is_cleared_in_blocks(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([*tasks(4500), *(task(shard, job=f"job {shard}") for shard in range(5000, 5020))])
    await queue.lease("w", count=100)
    forgotten, more = await bench.connection.script("scheduler/clear", [PREFIX])
    assert 0 < forgotten <= 2000
    assert more == 1
    assert await queue.clear() == 4520 - forgotten
    assert await bench.connection.command("KEYS", f"{PREFIX}*") == []


async def test_a_job_whose_tasks_only_bounce_does_not_hold_up_another(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, job="bounces") for shard in range(40))
    await queue.enqueue(task(shard, job="works") for shard in range(100, 140))
    worked = 0
    for _ in range(20):
        lease = await only(queue.lease("w"))
        worked += lease.task.job == "works"
        await queue.retry(lease, delay_s=1, counted=False)
        await bench.elapse(1)
    assert worked == 10


async def test_only_a_job_that_has_been_idle_long_enough_is_retired(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    assert not await queue.forget_idle(DATASET_ID, "bulk", idle_s=0.001)
    await queue.finish(task(1), dead=[letter(1, 0)])
    assert not await queue.forget_idle(DATASET_ID, "bulk", idle_s=60)
    touched_ms = int(await bench.connection.command("HGET", f"{PREFIX}:job:{DATASET_ID}:bulk", "touched"))
    await bench.connection.command("HSET", f"{PREFIX}:job:{DATASET_ID}:bulk", "touched", touched_ms - 60_000)
    assert await queue.forget_idle(DATASET_ID, "bulk", idle_s=60)
    assert await queue.jobs() == []
    assert (await queue.depth()).dead == 0


async def test_what_a_job_has_in_the_queue_adds_up(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(task(shard, tokens=50) for shard in range(5))
    _, later = await queue.lease("w", count=2)
    await queue.retry(later, delay_s=5)
    await queue.finish(task(4), dead=[letter(4, 1)])
    since_ms = int(await bench.connection.command("HGET", f"{PREFIX}:task:{task(2).id}", "since"))
    await bench.connection.command("HSET", f"{PREFIX}:task:{task(2).id}", "since", since_ms - 5000)
    (job,) = await queue.jobs()
    assert (job.job, job.dataset, job.lane, job.paused) == ("bulk", "/data/wiki über", "bulk", False)
    assert (job.ready, job.leased, job.delayed, job.tasks, job.rows, job.tokens, job.dead) == (2, 1, 1, 4, 40, 200, 1)
    assert 5 <= job.oldest_s < 30


@pytest.mark.parametrize("lanes", [("bulk", "live"), ("live", "bulk")])
async def test_a_job_may_change_its_lane(bench: Bench, lanes: tuple[Lane, Lane]) -> None:
    queue = bench.queue
    await queue.enqueue([task(1, lane=lanes[0], job="moved")])
    await queue.enqueue([task(2, lane=lanes[1], job="moved")])
    assert [(job.lane, job.ready) for job in await queue.jobs()] == [(lanes[1], 2)]
    assert shards(await queue.lease("w", count=5)) == [1, 2]
    assert await queue.lease("w") == []


async def test_workers_are_seen_while_they_speak(bench: Bench) -> None:
    queue = bench.queue
    await queue.report("w1", {"embedded": 5, "model": "null/384"})
    await queue.report("w2", {"embedded": 7})
    await queue.report("w1", {"embedded": 6, "model": "null/384"})
    assert {worker.owner: worker.record["embedded"] for worker in await queue.workers()} == {"w1": 6, "w2": 7}
    assert all(worker.age_s < 30 for worker in await queue.workers())
    await queue.report("w2", None)
    await bench.connection.command("ZINCRBY", f"{PREFIX}:seen", -301_000, "w1")
    await queue.report("w3", {})
    assert [worker.owner for worker in await queue.workers()] == ["w3"]


async def test_clearing_leaves_no_key(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([*tasks(6), task(9, lane="live")])
    leases = await queue.lease("w", count=4)
    await queue.retry(leases[0], delay_s=5)
    await queue.finish(leases[1].task, dead=[letter(1, 1)])
    await queue.pause(DATASET_ID, "paused")
    await queue.report("w", {})
    assert await queue.clear() == 6
    assert await bench.connection.command("KEYS", f"{PREFIX}*") == []


async def test_a_broken_record_of_a_task_does_not_stop_the_queue(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue(tasks(3))
    await bench.connection.command("DEL", f"{PREFIX}:task:{task(0).id}")
    assert shards(await queue.lease("w", count=5)) == [1, 2]


async def test_a_dead_letter_that_was_seen_to_no_longer_counts(bench: Bench) -> None:
    queue = bench.queue
    await queue.enqueue([task(1)])
    letters = [letter(1, 0), letter(1, 1)]
    await queue.finish(task(1), dead=letters)
    await queue.forget_dead(DATASET_ID, "bulk", [letters[0].key])
    await queue.forget_dead(DATASET_ID, "bulk", [])
    assert (await queue.depth()).dead == 1
