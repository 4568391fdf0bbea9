"""Trouble that stops a worker, and trouble that it works around."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import StoredObject
from embedmill.errors import (
    EmbedmillError,
    InvalidKey,
    NoBalance,
    Overloaded,
    RateLimited,
    StorageError,
)
from scheduler.budget import Unlimited
from scheduler.queue import Depth, Lease, Queue
from scheduler.reconcile import reconcile
from tests.datasets import small_dataset
from tests.worker_bench import (
    TestedEmbedder,
    check,
    kept_rows,
    owe,
    texts_of,
    until,
    work_off,
)
from worker import opening, requesting
from worker.attempts import RetryPolicy, embed_batch
from worker.service import Worker

pytestmark = pytest.mark.server


async def test_a_shard_in_trouble_is_retried_later_while_the_others_go_on(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = partial(embed_batch, policy=RetryPolicy(max_attempts=1))
    monkeypatch.setattr(requesting, "embed_batch", once)
    failures = 0

    async def fail_twice(request: list[str]) -> None:
        nonlocal failures
        if "shard 0" in request[0] and failures < 2:
            failures += 1
            raise Overloaded("503", retry_after_s=0.3)

    await owe(dataset, queue, texts_of(0), texts_of(1), texts_of(2))
    embedder = TestedEmbedder(before=fail_twice)
    worker = await work_off(queue, embedder, shards_in_flight=1)
    check(dataset)
    shards = [request[0][-1] for request in embedder.requests]
    assert shards[0] == shards[-1] == "0"
    assert set(shards[1:-1]) >= {"1", "2"}
    assert worker.counts.failed_requests == 2
    assert "503; shard 0 goes on in" in worker.counts.last_trouble


async def test_a_shard_that_comes_back_counts_no_passage_a_second_time(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requesting, "embed_batch", partial(embed_batch, policy=RetryPolicy(max_attempts=1)))
    requests = 0

    async def fail_the_second(_: list[str]) -> None:
        nonlocal requests
        requests += 1
        if requests == 2:
            raise Overloaded("503", retry_after_s=0.1)

    await owe(dataset, queue, texts_of(0))
    worker = await work_off(queue, TestedEmbedder(before=fail_the_second), shards_in_flight=1)
    check(dataset)
    assert (worker.counts.embedded, worker.counts.adopted) == (len(texts_of(0)), 0)


async def test_a_bad_key_pauses_the_job_and_what_was_paid_for_is_kept(dataset: Dataset, queue: Queue) -> None:
    requests = 0

    async def refuse_the_second(_: list[str]) -> None:
        nonlocal requests
        requests += 1
        if requests == 2:
            raise InvalidKey("the key was refused")

    await owe(dataset, queue, texts_of(0), texts_of(1))
    with pytest.raises(InvalidKey, match="the key was refused"):
        await work_off(queue, TestedEmbedder(before=refuse_the_second), shards_in_flight=1)
    job = dataset.job("main")
    assert job is not None
    assert (job.state, job.reason, job.stopped_by) == ("paused", "the key was refused", "worker")
    assert await queue.lease("w") == []
    assert dataset.owed() == [0, 1]
    assert len(kept_rows(dataset)) == 1
    dataset.change_job("main", lambda known: replace(known, state="running"))
    await queue.resume("d0", "main")
    assert {(lease.deliveries, lease.attempts) for lease in await queue.lease("w", count=2)} == {(1, 0)}
    await queue.clear()
    await reconcile(dataset, queue)
    good = TestedEmbedder()
    worker = await work_off(queue, good)
    check(dataset)
    assert set(good.times) == {*texts_of(0)[4:], *texts_of(1)}
    assert worker.counts.adopted == 4


@pytest.mark.parametrize(("theirs", "state"), [(["ours"], "paused"), (["ours", "another"], "running")])
async def test_a_refused_key_pauses_the_job_unless_another_worker_has_another(
    dataset: Dataset, queue: Queue, theirs: list[str], state: str
) -> None:
    class Keyed(Unlimited):
        key_ids = ("ours",)

    async def refuse(_: list[str]) -> None:
        raise InvalidKey("the key was refused")

    await owe(dataset, queue, texts_of(0))
    await queue.report("another", {"model": "null/3", "keys": theirs})
    await queue.report("of another model", {"model": "other/3", "keys": ["whatever"]})
    worker = Worker(queue, TestedEmbedder(before=refuse), budget=Keyed(), grace_s=1, patient=True)
    with pytest.raises(InvalidKey):
        await worker.run()
    job = dataset.job("main")
    assert (job.state if job is not None else "running") == state
    assert len(await queue.lease("another")) == (state == "running")


async def test_a_full_disk_stops_the_worker_and_the_same_shard_goes_on_later(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StorageError("no space; free some")

    await owe(dataset, queue, texts_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "create_vectors", refuse)
        with pytest.raises(StorageError, match="free some"):
            await work_off(queue, TestedEmbedder())
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    again = TestedEmbedder()
    await work_off(queue, again)
    check(dataset)
    assert again.requests == [], "what was paid for was not kept"


async def test_an_unforeseen_error_becomes_one_of_ours_and_the_task_is_handed_back(
    dataset: Dataset, queue: Queue
) -> None:
    async def break_down(_: list[str]) -> None:
        raise RuntimeError("a bug")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(EmbedmillError, match="shard 0 failed in an unforeseen way"):
        await work_off(queue, TestedEmbedder(before=break_down))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)


async def test_a_dataset_in_trouble_waits_while_a_patient_worker_goes_on_with_others(
    dataset: Dataset, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "_FIRST_DELAY_S", 1.0)
    full = True
    create = Dataset.create_vectors

    def refuse(dataset: Dataset, shard: int, vectors: np.ndarray) -> StoredObject:
        if full and dataset.url.endswith("/full"):
            raise StorageError("no space; free some")
        return create(dataset, shard, vectors)

    monkeypatch.setattr(Dataset, "create_vectors", refuse)
    other = small_dataset(tmp_path / "full", dataset_id="d1")
    await owe(other, queue, texts_of(0), texts_of(1))
    await owe(dataset, queue, texts_of(2), texts_of(3))
    embedder = TestedEmbedder()
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=1, patient=True)

    async def others_are_done() -> bool:
        return not dataset.owed() and (await queue.depth()).delayed == 2

    async def nothing_open() -> bool:
        return (await queue.depth()).open == 0

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(others_are_done)
        full = False
        await until(nothing_open)
        worker.stop()
    check(dataset)
    check(other)
    assert caplog.text.count("no space") == 1
    assert set(embedder.times.values()) == {1}, "what was paid for was not kept"


async def test_a_damaged_shard_holds_up_itself_only(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0), texts_of(1))
    (Path(dataset.url) / "documents" / "00000000.parquet").write_bytes(b"damaged")
    worker = Worker(queue, TestedEmbedder(), budget=Unlimited(), grace_s=1, patient=True, shards_in_flight=1)

    async def the_other_is_done() -> bool:
        return dataset.owed() == [0] and await queue.depth() == Depth(0, 0, 0, 1, 0)

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(the_other_is_done)
        worker.stop()


async def test_an_empty_account_pauses_the_job_in_dataset_and_queue(dataset: Dataset, queue: Queue) -> None:
    async def refuse(_: list[str]) -> None:
        raise NoBalance("the account is empty")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(NoBalance):
        await work_off(queue, TestedEmbedder(before=refuse))
    job = dataset.job("main")
    assert job is not None
    assert (job.state, job.reason) == ("paused", "the account is empty")
    assert await queue.lease("w") == []


async def test_a_refusal_for_rate_spends_no_attempt(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise RateLimited("429", retry_after_s=0.2)

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(), budget=Unlimited(), grace_s=1)

    async def delayed() -> bool:
        return (await queue.depth()).delayed == 1

    with monkeypatch.context() as patch:
        patch.setattr(requesting, "embed_batch", refuse)
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await until(delayed)
            worker.stop()
    (lease,) = await until_leased(queue)
    assert (lease.deliveries, lease.attempts) == (1, 0)


async def until_leased(queue: Queue) -> list[Lease]:
    leases: list[Lease] = []

    async def taken() -> bool:
        leases.extend(await queue.lease("w"))
        return bool(leases)

    await until(taken)
    return leases
