"""What a scheduler does for a dataset that others have left, as scenarios; see queue_scenarios.py."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, Marker, checkpoints_folder
from scheduler.queue import Queue
from scheduler.service import run_scheduler
from tests.contract.queue_bench import Bench
from tests.contract.queue_scenarios import Scenario
from tests.datasets import admit_texts, small_dataset
from worker.checkpoints import Checkpoint
from worker.results import Increment

_WITHIN_S = 2.0


async def what_is_owed_and_not_queued_is_queued(bench: Bench) -> None:
    async with _served(bench.queue) as dataset:
        await _until(lambda: _ready(bench.queue, 1))
    assert [lease.task.dataset_id for lease in await bench.queue.lease("w", count=9)] == [dataset.info.id]


async def what_a_worker_left_of_a_committed_shard_is_swept(bench: Bench) -> None:
    async with _served(bench.queue) as dataset:
        await _until(lambda: _swept(dataset))
        left = [len(dataset.store.names(checkpoints_folder(shard))) for shard in range(2)]
    assert left == [0, 1]


@asynccontextmanager
async def _served(queue: Queue) -> AsyncIterator[Dataset]:
    """A dataset with a committed and an owed shard, a checkpoint of each, and a scheduler beside it."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = small_dataset(Path(folder) / "d")
        for shard in range(2):
            admit_texts(dataset, shard, ["text"])
            row = Increment(np.array([0], np.int32), np.ones((1, dataset.info.dimensions), np.float32))
            Checkpoint(dataset, shard, attempt="dead").keep(row)
        statuses = np.array([DELETED], np.uint8)
        dataset.commit(Marker(0, statuses, dataset.info.embedder.fingerprint, "dead", "w", "now"))
        stopping = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run_scheduler([dataset], queue, stopping=stopping, every_s=0.05))
            yield dataset
            stopping.set()


async def _ready(queue: Queue, tasks: int) -> bool:
    return (await queue.depth()).ready_bulk == tasks


async def _swept(dataset: Dataset) -> bool:
    return not dataset.store.names(checkpoints_folder(0))


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Or until time is up: what has not come by then is missed by the assertion that follows."""
    with anyio.move_on_after(_WITHIN_S):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.02)


SCENARIOS: list[Scenario] = [
    what_is_owed_and_not_queued_is_queued,
    what_a_worker_left_of_a_committed_shard_is_swept,
]
