"""Tasks that wait for a worker with another model: said once, with the command that would take them."""

from __future__ import annotations

import logging
import time

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.embedder import EmbedderSpec, is_local
from embedmill.errors import EmbedmillError
from scheduler.queue import JobDepth, Queue

_LOOK_EVERY_S = 15.0
_log = logging.getLogger("embedmill.worker")


class OtherPools:
    """What an idle worker sees waiting, that is not for its model."""

    def __init__(self, queue: Queue, fingerprint: str) -> None:
        self._queue = queue
        self._fingerprint = fingerprint
        self._said: set[tuple[str, str]] = set()
        self._looked_at_s = float("-inf")

    async def look(self) -> None:
        """Log each job that waits for others, where none is ready for us; at most every 15 s. Raises TransientError."""
        if time.monotonic() - self._looked_at_s < _LOOK_EVERY_S:
            return
        self._looked_at_s = time.monotonic()
        waiting = [job for job in await self._queue.jobs() if job.ready and not job.paused]
        if any(job.fingerprint == self._fingerprint for job in waiting):
            return
        for job in waiting:
            if (job.dataset_id, job.job) not in self._said:
                self._said.add((job.dataset_id, job.job))
                _log.warning("%s", await to_thread.run_sync(_describe, job))


def _describe(job: JobDepth) -> str:
    waiting = f"{job.ready} shards of {job.dataset} (job {job.job}) wait for a worker with another model"
    try:
        spec = Dataset.open(job.dataset).info.embedder
    except (EmbedmillError, OSError):
        return f"{waiting}, which cannot be read from here"
    return f"{waiting}: start `{start_command(spec)}`"


def start_command(spec: EmbedderSpec) -> str:
    """The command for a worker that embeds so."""
    parts = ["embedmill worker --model", spec.model]
    if not is_local(spec.model):
        parts.append(f"--dimensions {spec.dimensions}")
    task = spec.options.get("task")
    if isinstance(task, str):
        parts.append(f"--task {task}")
    if spec.late_chunking:
        parts.append("--late-chunking")
    return " ".join(parts)
