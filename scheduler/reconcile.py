"""The queue rebuilt from the dataset: every admitted shard without a marker is a task, whatever Redis remembers."""

from __future__ import annotations

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
    added = 0
    for start in range(0, len(owed), _BLOCK):
        block = {f"{dataset.info.id}:{shard}": shard for shard in owed[start : start + _BLOCK]}
        missing = [block[id_] for id_ in await queue.unknown(list(block))]
        added += await queue.enqueue(await to_thread.run_sync(_tasks, dataset, missing))
    return added


def owed_by_running_jobs(dataset: Dataset) -> list[int]:
    """Shards that somebody should embed now. Blocking."""
    owed = dataset.owed()
    idle = {job.id for job in dataset.jobs() if job.state != "running"} if owed else set()
    return [shard for shard in owed if not idle or dataset.origin(shard).job not in idle]


def _tasks(dataset: Dataset, shards: list[int]) -> list[Task]:
    jobs = {job.id: job for job in dataset.jobs()} if shards else {}
    tasks = []
    for shard in shards:
        table, origin = dataset.documents(shard, columns=["text"])
        job = jobs.get(origin.job, Job(origin.job))
        if job.state == "running":
            tasks.append(Task(dataset.url, dataset.info.id, shard, origin.job, table.num_rows, table.nbytes, job.lane))
    return tasks
