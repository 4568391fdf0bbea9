"""The leases of a worker: what it takes, keeps, loses and hands back."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import anyio
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.embedder import EmbedderSpec
from embedmill.errors import (
    ConfigurationError,
)
from embedmill.messages import Task
from scheduler.budget import Unlimited
from scheduler.queue import Depth, Queue
from tests.datasets import admit_texts
from tests.worker_bench import (
    TestedEmbedder,
    at_least,
    check,
    kept_rows,
    owe,
    task,
    texts_of,
    until,
    work_off,
)
from worker import leases, pools, service
from worker.service import Worker

pytestmark = pytest.mark.server
PREFIX = "{embedmill:2:tested}"


async def test_a_task_of_a_paused_job_is_dropped_and_sends_nothing(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0))
    dataset.write_job(Job("main", state="paused", reason="no balance"))
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    assert embedder.requests == []
    assert dataset.owed() == [0]


async def test_a_task_of_a_dataset_that_is_gone_or_another_is_dropped_and_the_others_go_on(
    dataset: Dataset, queue: Queue, tmp_path: Path
) -> None:
    await queue.enqueue(
        [
            task(str(tmp_path / "gone"), "some id", 0, rows=8),
            task(dataset.url, "of a former dataset here", 0, rows=8),
        ]
    )
    await owe(dataset, queue, texts_of(0))
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert (await queue.depth()).open == 0


async def test_draining_finishes_what_was_sent_and_hands_back_the_rest(dataset: Dataset, queue: Queue) -> None:
    sent, answer = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        await answer.wait()

    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=hold)
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=10)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            worker.stop()
            answer.set()
    assert embedder.requests == [texts_of(0)[:4]]
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    again = TestedEmbedder()
    await work_off(queue, again)
    check(dataset)
    assert again.requests == [texts_of(0)[4:]]


async def test_a_request_that_outlasts_the_grace_time_is_abandoned_and_its_task_handed_back(
    dataset: Dataset, queue: Queue
) -> None:
    sent = anyio.Event()

    async def hold_the_second(request: list[str]) -> None:
        if request != texts_of(0)[:4]:
            sent.set()
            await anyio.sleep_forever()

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=hold_the_second), budget=Unlimited(), grace_s=0.2)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            worker.stop()
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    assert worker.counts.lost_tokens == sum(map(len, texts_of(0)[4:]))
    assert len(kept_rows(dataset)) == 1
    (lease,) = await queue.lease("w")
    assert (lease.deliveries, lease.attempts) == (1, 0)


async def test_a_lost_lease_stops_the_work_and_nothing_is_committed_under_it(
    dataset: Dataset, connection: Connection
) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.4)
    sent, cancelled = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=hold), budget=Unlimited(), grace_s=1)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            await connection.command("ZADD", f"{PREFIX}:leased", 0, "d0:0")
            (stolen,) = await Queue(connection, namespace="tested", lease_s=60).lease("another")
            await cancelled.wait()
            worker.stop()
    assert dataset.owed() == [0]
    assert await queue.depth() == Depth(0, 0, 1, 0, 0)
    assert not (await queue.extend([stolen])).lost
    assert worker.counts.shards == 0


async def test_a_worker_that_takes_its_own_lost_task_again_goes_on_and_commits_it_once(
    dataset: Dataset, queue: Queue, connection: Connection
) -> None:
    waiting, answer = 0, anyio.Event()

    async def hold(_: list[str]) -> None:
        nonlocal waiting
        waiting += 1
        await answer.wait()

    async def both_are_waiting() -> bool:
        return waiting == 2

    async def nothing_open() -> bool:
        return (await queue.depth()).open == 0

    await owe(dataset, queue, texts_of(0, rows=4))
    committed: list[int] = []
    worker = Worker(queue, TestedEmbedder(before=hold, concurrency=4), budget=Unlimited(), grace_s=1)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(worker.run, on_commit=committed.append))
            await until(lambda: at_least(lambda: waiting, 1))
            await connection.command("ZADD", f"{PREFIX}:leased", 0, "d0:0")
            await until(both_are_waiting)
            answer.set()
            await until(nothing_open)
            await owe(dataset, queue, texts_of(1))
            await until(nothing_open)
            worker.stop()
    check(dataset)
    assert committed.count(1) == 1
    assert 0 in committed


async def test_no_more_tasks_are_taken_than_there_are_slots(dataset: Dataset, queue: Queue) -> None:
    sent, answer = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        await answer.wait()

    await owe(dataset, queue, *(texts_of(shard) for shard in range(8)))
    worker = Worker(queue, TestedEmbedder(before=hold), budget=Unlimited(), shards_in_flight=2, grace_s=5)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            await anyio.sleep(0.2)
            leased = (await queue.depth()).leased
            worker.stop()
            answer.set()
    assert leased == 2


async def test_a_worker_takes_no_task_for_another_model_and_says_once_what_would(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pools, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(service, "_IDLE_S", 0.01)
    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(spec=EmbedderSpec("other/3", 3)), budget=Unlimited())

    async def said() -> bool:
        return "start `embedmill worker --model null/3`" in caplog.text

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(said)
        await anyio.sleep(0.1)
        worker.stop()
    assert caplog.text.count("another model") == 1
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)


async def test_a_task_that_lies_about_its_model_ends_an_impatient_worker(dataset: Dataset, queue: Queue) -> None:
    other = EmbedderSpec("other/3", 3)
    admit_texts(dataset, 0, texts_of(0))
    await queue.enqueue([Task(dataset.url, "d0", 0, "main", 8, 100, fingerprint=other.fingerprint)])
    with pytest.raises(ConfigurationError, match="vectors of another embedder"):
        await work_off(queue, TestedEmbedder(spec=other))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)


async def test_a_paused_job_sends_nothing_after_the_request_in_flight_and_is_handed_back_uncounted(
    dataset: Dataset, connection: Connection
) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.4)
    sent, answer = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        await answer.wait()

    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=hold)
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=1)

    async def halted() -> bool:
        return any(held.work is not None and held.work.stopping for held in worker._leases)

    async def handed_back() -> bool:
        return (await queue.depth()).leased == 0

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            await queue.pause("d0", "main")
            await until(halted)
            answer.set()
            await until(handed_back)
            worker.stop()
    assert embedder.requests == [texts_of(0)[:4]]
    assert len(kept_rows(dataset)) == 1
    await queue.resume("d0", "main")
    (lease,) = await queue.lease("w")
    assert (lease.deliveries, lease.attempts) == (1, 0)


async def test_a_worker_reports_what_it_has_done_while_it_lives(dataset: Dataset, connection: Connection) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.2)
    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(), budget=Unlimited(), grace_s=1)

    async def reported() -> bool:
        return [(r.record["embedded"], r.record["shards"]) for r in await queue.workers()] == [(8, 1)]

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(reported)
        (report,) = await queue.workers()
        worker.stop()
    assert report.record["model"] == "null/3"
    assert await queue.workers() == []


async def test_an_event_loop_that_stands_still_is_noticed(
    dataset: Dataset, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.4)

    async def block(_: list[str]) -> None:
        time.sleep(0.3)  # noqa: ASYNC251

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=block), budget=Unlimited(), grace_s=1)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(lambda: at_least(lambda: worker.counts.stalls, 1))
        worker.stop()
    assert "the event loop stood still" in caplog.text


async def test_a_model_that_never_answers_ends_a_patient_worker(
    dataset: Dataset, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.2)
    ended: list[str] = []
    monkeypatch.setattr(leases, "HUNG_AFTER_S", 0.1)
    monkeypatch.setattr(service, "end_process", ended.append)

    async def hang(_: list[str]) -> None:
        await anyio.sleep_forever()

    async def lease_expired() -> bool:
        return bool(await Queue(connection, namespace="tested").lease("another"))

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=hang), budget=Unlimited(), grace_s=0, patient=True, shards_in_flight=1)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(lambda: at_least(lambda: len(ended), 1))
        await until(lease_expired)
        worker.stop()
    assert "has not answered" in ended[0]
