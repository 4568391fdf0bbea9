"""The queue rebuilt from the dataset: every admitted shard without a marker is a task, whatever Redis remembers.

So are the states of jobs: a paused job is paused in the queue, a cancelled one has no tasks there, and one that goes on is
not held up by a pause that only Redis remembers.
"""

from __future__ import annotations

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.messages import Task

from .queue import Queue

_BLOCK = 256


async def reconcile(dataset: Dataset, queue: Queue) -> int:
    """Enqueue what the dataset owes and the queue does not have; how many tasks were added. Repeating it is harmless.

    Shards of jobs that are paused or cancelled stay out.
    """
    jobs = {job.id: job for job in await to_thread.run_sync(dataset.jobs)}
    owed = await to_thread.run_sync(_owed_by_running, dataset, jobs)
    if await _tell_states(dataset, queue, jobs) == len(owed):
        # The everyday case at a large backlog. Should a task of a committed shard stand in for a missing one, its worker
        # finds the marker and ends it, and the next look sees the difference.
        return 0
    added = 0
    for start in range(0, len(owed), _BLOCK):
        block = {f"{dataset.info.id}:{shard}": shard for shard in owed[start : start + _BLOCK]}
        missing = [block[id_] for id_ in await queue.unknown(list(block))]
        added += await queue.enqueue(await to_thread.run_sync(make_tasks, dataset, missing))
    return added


def owed_by_running_jobs(dataset: Dataset) -> list[int]:
    """Shards that somebody should embed now. Blocking."""
    return _owed_by_running(dataset, {job.id: job for job in dataset.jobs()})


def make_tasks(dataset: Dataset, shards: list[int]) -> list[Task]:
    """The tasks of these shards, in the lanes of their jobs. Blocking."""
    jobs = {job.id: job for job in dataset.jobs()} if shards else {}
    info, tasks = dataset.info, []
    for shard in shards:
        admission = dataset.admission(shard)
        lane = jobs.get(admission.job, Job(admission.job)).lane
        size = admission.rows, admission.text_bytes
        tasks.append(Task(dataset.url, info.id, shard, admission.job, *size, lane, info.embedder.fingerprint))
    return tasks


def _owed_by_running(dataset: Dataset, jobs: dict[str, Job]) -> list[int]:
    owed = dataset.owed()
    idle = {job.id for job in jobs.values() if job.state != "running"}
    return [shard for shard in owed if dataset.admission(shard).job not in idle] if idle else owed


async def _tell_states(dataset: Dataset, queue: Queue, jobs: dict[str, Job]) -> int:
    """Make the queue hold up, let go or forget the jobs as their records say; how many tasks it has of those that go on."""
    known = {depth.job: depth for depth in await queue.jobs() if depth.dataset_id == dataset.info.id}
    for job in jobs.values():
        depth = known.get(job.id)
        held = depth is not None and depth.paused
        if job.state == "paused" and not held:
            await queue.pause(dataset.info.id, job.id)
        elif job.state == "running" and held:
            await queue.resume(dataset.info.id, job.id)
        elif job.state == "cancelled" and depth is not None and depth.tasks:
            await queue.forget(dataset.info.id, job.id)
    idle = {job.id for job in jobs.values() if job.state != "running"}
    return sum(depth.tasks for depth in known.values() if depth.job not in idle)
