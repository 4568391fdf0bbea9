"""A worker on trial: an embedder that misbehaves on order, shards to embed, and waiting for the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import numpy as np

from embedmill.dataset.dataset import Dataset
from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import (
    EmbedmillError,
)
from embedmill.messages import Task
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts
from tests.invariants import check_dataset
from worker.embedders.null import NullEmbedder, hash_vectors
from worker.service import Worker

Hook = Callable[[list[str]], Awaitable[None]]


class TestedEmbedder:
    """null/3 with an occasion to misbehave: `before` each request, and `change` its vectors."""

    __test__ = False

    def __init__(
        self,
        *,
        before: Hook | None = None,
        change: Callable[[list[str], np.ndarray], np.ndarray] | None = None,
        max_inputs: int = 4,
        concurrency: int = 1,
        spec: EmbedderSpec | None = None,
    ) -> None:
        self.spec = spec or NullEmbedder(3).spec
        self.limits = BatchLimits(max_inputs, 10_000, padded=False, concurrency=concurrency)
        self.requests: list[list[str]] = []
        self._before = before
        self._change = change

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        self.requests.append(list(texts))
        if self._before is not None:
            await self._before(list(texts))
        vectors = hash_vectors(texts, 3)
        if self._change is not None:
            vectors = self._change(list(texts), vectors)
        return Embedding(vectors, sum(map(len, texts)))

    async def aclose(self) -> None:
        pass

    @property
    def times(self) -> Counter[str]:
        """How often each text was sent."""
        return Counter(text for request in self.requests for text in request)


def task(url: str, dataset_id: str, shard: int, *, rows: int) -> Task:
    return Task(url, dataset_id, shard, "main", rows, 100, fingerprint=NullEmbedder(3).spec.fingerprint)


def texts_of(shard: int, rows: int = 8) -> list[str]:
    return [f"text {row} of shard {shard}" for row in range(rows)]


async def owe(dataset: Dataset, queue: Queue, *contents: list[str]) -> None:
    """Admit these shards and enqueue their tasks."""
    for shard, texts in enumerate(contents, start=len(dataset.admitted())):
        admit_texts(dataset, shard, texts)
    await reconcile(dataset, queue)


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 10) -> None:
    with anyio.fail_after(within_s):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def work_off(
    queue: Queue, embedder: TestedEmbedder, *, shards_in_flight: int = 2, patient: bool = False
) -> Worker:
    """Run a worker until nothing is open, or until it gives up by itself."""
    worker = Worker(queue, embedder, budget=Unlimited(), shards_in_flight=shards_in_flight, grace_s=1, patient=patient)
    done = anyio.Event()

    async def nothing_open() -> bool:
        return done.is_set() or (await queue.depth()).open == 0

    async def stop_at_the_end() -> None:
        await until(nothing_open, within_s=20)
        worker.stop()

    error: EmbedmillError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(stop_at_the_end)
        try:
            await worker.run()
        except EmbedmillError as raised:
            error = raised
        done.set()
    if error is not None:
        raise error
    return worker


def check(dataset: Dataset) -> None:
    dataset.publish_shape()
    check_dataset(dataset.url)


def statuses(dataset: Dataset, shard: int = 0) -> list[int]:
    marker = Dataset.open(dataset.url).marker(shard)
    assert marker is not None
    return [int(status) for status in marker.statuses]


def kept_rows(dataset: Dataset) -> list[Path]:
    return sorted((Path(dataset.url) / "checkpoints").glob("*/*"))


async def at_least(read: Callable[[], int], count: int) -> bool:
    return read() >= count
