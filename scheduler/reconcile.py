"""The queue rebuilt from the dataset: every admitted shard without a marker is a task, whatever Redis remembers."""

from __future__ import annotations

from collections.abc import Mapping

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.messages import Task

from .queue import Queue

_BLOCK = 64


async def reconcile(dataset: Dataset, queue: Queue) -> int:
    """Enqueue what the dataset owes and the queue does not have; how many tasks were added. Repeating it is harmless.

    Shards of jobs that are paused or cancelled stay out.
    """
    owed = await to_thread.run_sync(dataset.owed)
    jobs = {job.id: job for job in await to_thread.run_sync(dataset.jobs)} if owed else {}
    added = 0
    for start in range(0, len(owed), _BLOCK):
        tasks = await to_thread.run_sync(_tasks, dataset, owed[start : start + _BLOCK], jobs)
        added += await queue.enqueue(tasks)
    return added


def _tasks(dataset: Dataset, shards: list[int], jobs: Mapping[str, Job]) -> list[Task]:
    tasks = []
    for shard in shards:
        table, origin = dataset.documents(shard, columns=["text"])
        job = jobs.get(origin.job, Job(origin.job))
        if job.state == "running":
            tasks.append(Task(dataset.url, dataset.info.id, shard, origin.job, table.num_rows, table.nbytes, job.lane))
    return tasks
