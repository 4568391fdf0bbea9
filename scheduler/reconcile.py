"""The queue rebuilt from the dataset: every admitted shard without a marker is a task, whatever Redis remembers."""

from __future__ import annotations

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.messages import Lane, Task

from .queue import Queue

_BLOCK = 64


async def reconcile(dataset: Dataset, queue: Queue, *, lane: Lane = "bulk") -> int:
    """Enqueue what the dataset owes and the queue does not have; how many tasks were added. Repeating it is harmless."""
    owed = await to_thread.run_sync(dataset.owed)
    added = 0
    for start in range(0, len(owed), _BLOCK):
        tasks = await to_thread.run_sync(_tasks, dataset, owed[start : start + _BLOCK], lane)
        added += await queue.enqueue(tasks)
    return added


def _tasks(dataset: Dataset, shards: list[int], lane: Lane) -> list[Task]:
    tasks = []
    for shard in shards:
        table, origin = dataset.documents(shard, columns=["text"])
        tasks.append(Task(dataset.url, dataset.info.id, shard, origin.job, table.num_rows, table.nbytes, lane))
    return tasks
