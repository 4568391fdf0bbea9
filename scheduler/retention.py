"""What Redis keeps of jobs that have ended: their record, for a while, and then nothing."""

from __future__ import annotations

import logging

import anyio

from embedmill.errors import EmbedmillError

from .queue import Queue

KEEP_DAYS = 7.0
_EVERY_S = 600.0
_log = logging.getLogger("embedmill.scheduler")


async def drop_regularly(queue: Queue, stopping: anyio.Event, *, keep_days: float = KEEP_DAYS) -> None:
    """`drop_finished_jobs` every ten minutes, until `stopping` is set. Trouble is logged: nothing depends on it."""
    while not stopping.is_set():
        try:
            for job in await drop_finished_jobs(queue, keep_days=keep_days):
                _log.info("the record of job %s is dropped: it had no task for %g days", job, keep_days)
        except EmbedmillError as error:
            _log.warning("records of finished jobs stay for now: %s", error)
        with anyio.move_on_after(_EVERY_S):
            await stopping.wait()


async def drop_finished_jobs(queue: Queue, *, keep_days: float = KEEP_DAYS) -> list[str]:
    """Forget the records (and cached dead letters) of jobs that have had no task for so long; `DATASET:JOB` of each.

    A job comes back with its next task. Paused jobs stay: without a record they would not be held up.
    """
    dropped = []
    for job in await queue.jobs():
        if job.tasks or job.paused:
            continue
        if await queue.forget_idle(job.dataset_id, job.job, idle_s=keep_days * 86_400):
            dropped.append(f"{job.dataset or job.dataset_id}:{job.job}")
    return dropped
