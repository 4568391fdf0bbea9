"""What a worker finds already done, and what two of them leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED
from embedmill.dataset.passages import ShardOrigin
from embedmill.embedder import EmbedderSpec, Embedding, Role
from embedmill.token_estimates import TokenEstimator, read_estimates
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts, passage, small_dataset
from tests.worker_bench import (
    TestedEmbedder,
    at_least,
    check,
    owe,
    statuses,
    task,
    texts_of,
    until,
    work_off,
)
from worker.embedders.null import hash_vectors

pytestmark = pytest.mark.server


async def test_two_workers_on_one_shard_leave_one_marker_that_describes_the_bytes(
    tmp_path: Path, connection: Connection
) -> None:
    spec = EmbedderSpec("noisy/3", 3)
    dataset = small_dataset(tmp_path / "noisy", embedder=spec)
    admit_texts(dataset, 0, texts_of(0))
    queues = [Queue(connection, namespace=name) for name in ("ours", "theirs")]
    for queue in queues:
        await reconcile(dataset, queue)
    waiting = 0

    async def meet(_: list[str]) -> None:
        nonlocal waiting
        waiting += 1
        await until(lambda: at_least(lambda: waiting, 2))

    noises = (1.0, -1.0)
    embedders = [
        TestedEmbedder(before=meet, change=lambda _, v, noise=noise: v * noise, max_inputs=8, spec=spec)  # type: ignore[misc]
        for noise in noises
    ]
    async with anyio.create_task_group() as group:
        for queue, embedder in zip(queues, embedders, strict=True):
            group.start_soon(work_off, queue, embedder)
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8
    found = dataset.vectors(0)
    assert any(np.array_equal(found, hash_vectors(texts_of(0), 3) * np.float32(noise)) for noise in noises)
    assert [(await queue.depth()).open for queue in queues] == [0, 0]


async def test_vectors_that_were_left_without_a_marker_are_adopted_and_not_paid_for_again(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    dataset.create_vectors(0, hash_vectors(texts_of(0), 3))
    embedder = TestedEmbedder()
    worker = await work_off(queue, embedder)
    check(dataset)
    assert embedder.requests == []
    assert worker.counts.adopted == 8


async def test_a_row_that_left_vectors_do_not_have_becomes_a_dead_letter_since_they_cannot_change(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    left = hash_vectors(texts_of(0), 3)
    left[6] = np.nan
    dataset.create_vectors(0, left)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    marker = dataset.marker(0)
    assert marker is not None
    assert [(failure.row, failure.code) for failure in marker.failures] == [(6, "lost_attempt")]


@pytest.mark.parametrize("committed", [True, False])
async def test_a_carried_row_is_not_embedded_again_when_the_older_shard_is_committed(
    dataset: Dataset, queue: Queue, committed: bool
) -> None:
    admit_texts(dataset, 0, texts_of(0))
    origin = ShardOrigin(1, "main", carried={1: (0, 3)})
    admit_texts(dataset, 1, ["new", texts_of(0)[3]], origin=origin)
    if committed:
        await queue.enqueue([task(dataset.url, "d0", 0, rows=8)])
        await work_off(queue, TestedEmbedder())
    await queue.enqueue([task(dataset.url, "d0", 1, rows=2)])
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    assert embedder.requests == [["new"] if committed else ["new", texts_of(0)[3]]]
    assert statuses(dataset, 1) == [EMBEDDED, EMBEDDED]
    np.testing.assert_array_equal(dataset.vectors(1)[1], hash_vectors([texts_of(0)[3]], 3)[0])


async def test_deleted_rows_are_not_sent_and_a_committed_shard_is_only_acknowledged(
    dataset: Dataset, queue: Queue
) -> None:
    rows = [passage("a", "one"), passage("b", "", version=2, deleted=True), passage("c", "three")]
    dataset.append_passages(0, rows, origin=ShardOrigin(0, "main"))
    await reconcile(dataset, queue)
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    check(dataset)
    assert statuses(dataset) == [EMBEDDED, DELETED, EMBEDDED]
    assert await queue.enqueue([task(dataset.url, "d0", 0, rows=3)]) == 1
    await work_off(queue, embedder)
    assert embedder.requests == [["one", "three"]]


async def test_what_is_learned_of_token_counts_goes_on_with_the_next_worker(
    tmp_path: Path, connection: Connection
) -> None:
    class Learning(TestedEmbedder):
        def __init__(self) -> None:
            super().__init__()
            self.estimator = TokenEstimator()

        async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
            embedding = await super().embed(texts, role=role)
            self.estimator.learn(texts, embedding.billed_tokens)
            return embedding

    dataset, queue = small_dataset(tmp_path / "learned"), Queue(connection)
    await owe(dataset, queue, texts_of(0), texts_of(1))
    first = Learning()
    await work_off(queue, first)
    assert first.estimator.bills == 4
    await owe(dataset, queue, texts_of(2))
    second = Learning()
    await work_off(queue, second)
    assert second.estimator.bills == 6
    learned = read_estimates(dataset.store)
    assert learned is not None
    assert learned.bills == 6
    assert second.estimator.error < first.estimator.error
