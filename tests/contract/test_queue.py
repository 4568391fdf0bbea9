"""What the queue promises, on every server that it runs on."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import anyio
import pytest

from embedmill.connection import Connection
from embedmill.errors import ConfigurationError, Overloaded
from scheduler.queue import Depth, Extended, Queue
from tests.contract.queue_bench import LEASE_S, PREFIX, Bench, letter, only, shards, task, tasks


async def test_enqueuing_again_adds_nothing_wherever_the_task_is(bench: Bench) -> None:
    queue = bench.queue
    assert await queue.enqueue(tasks(3)) == 3
    held, later = await queue.lease("w", count=2)
    await queue.retry(later, delay_s=5)
    assert await queue.enqueue([*tasks(3), *tasks(3)]) == 0
    assert await queue.depth() == Depth(0, 1, 1, 1, 0)
    assert await queue.extend([held]) == Extended()
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
        assert await bench.queue.extend([lease]) == Extended()
        assert await bench.queue.lease("other") == []


async def test_extending_an_expired_lease_that_nobody_took_keeps_it(bench: Bench) -> None:
    await bench.queue.enqueue([task(1)])
    lease = await only(bench.queue.lease("w"))
    await bench.elapse(2 * LEASE_S)
    assert await bench.queue.extend([lease]) == Extended()
    assert await bench.queue.lease("other") == []


async def test_a_released_task_is_the_first_again_and_its_delivery_does_not_count(bench: Bench) -> None:
    await bench.queue.enqueue(tasks(3))
    for _ in range(4):
        lease = await only(bench.queue.lease("w"))
        assert (lease.task.shard, lease.deliveries, lease.attempts) == (0, 1, 0)
        assert await bench.queue.release(lease)
        assert (await bench.queue.extend([lease])).lost == {lease.task.id}


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
    stored = await bench.connection.command("HGETALL", f"{PREFIX}:dead:d0:bulk")
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
    assert (await bench.queue.extend([old])).lost == {old.task.id}
    await bench.queue.enqueue([task(1)])
    new = await only(bench.queue.lease("w"))
    assert (await bench.queue.extend([old, new])).lost == {old.task.id}
    assert not await bench.queue.release(old)
    assert not await bench.queue.retry(old, delay_s=1)
    assert (await bench.queue.depth()).leased == 1


async def test_a_command_whose_reply_was_lost_can_be_repeated(bench: Bench) -> None:
    queue = bench.queue
    assert [await queue.enqueue(tasks(3)) for _ in range(2)] == [3, 0]
    extended, released, retried = await queue.lease("w", count=3)
    assert [await queue.extend([extended], progressed=[extended.task.id]) for _ in range(2)] == [Extended(), Extended()]
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
