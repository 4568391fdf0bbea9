"""The worker: takes tasks, keeps their leases alive, and hands back what it cannot finish.

Redis owns the lease. A worker that is told that a lease is lost drops the work at once; that it was late to notice is
harmless, since everything it writes is created once, whoever creates it.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import DATASET_KEY, Job
from embedmill.dataset.store import open_store
from embedmill.embedder import Embedder
from embedmill.errors import (
    ConfigurationError,
    CorruptStore,
    EmbedmillError,
    JobFatalError,
    NoBalance,
    StorageError,
    TransientError,
)
from embedmill.messages import Task
from scheduler.budget import RequestBudget
from scheduler.queue import Lease, Queue

from .commit import dead_letters
from .embedding import ShardEmbedding, Tools
from .requesting import Requester, WorkerCounts

_log = logging.getLogger("embedmill.worker")
_IDLE_S = 1.0
_STOPS_ALL = (JobFatalError, StorageError, CorruptStore, ConfigurationError)


@dataclass(slots=True)
class _Held:
    """A lease that is ours, the work under it, and the way to stop that work."""

    lease: Lease
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    work: ShardEmbedding | None = None
    settled: bool = False


def pause_job(dataset: Dataset, job: str, reason: str) -> None:
    """Note in the dataset that a job stands still, and why. Blocking."""
    known = dataset.job(job) or Job(job, created_at=now_iso())
    dataset.write_job(replace(known, state="paused", reason=reason))


def _stands_still(dataset: Dataset, job: str) -> bool:
    """Paused or cancelled: the scheduler queues its shards again when it goes on."""
    known = dataset.job(job)
    return known is not None and known.state != "running"


def worker_name() -> str:
    """Unique per start of a process, so that a restarted worker is never taken for its former self."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Worker:
    """Embeds shards until it is stopped. One per process; `run` may be called once.

    `on_open` is called in a thread with each dataset before anything of it is embedded; what it raises stops the worker.
    """

    def __init__(
        self,
        queue: Queue,
        embedder: Embedder,
        *,
        budget: RequestBudget,
        shards_in_flight: int = 2,
        grace_s: float = 5.0,
        on_open: Callable[[Dataset], None] | None = None,
    ) -> None:
        self._on_open = on_open
        self._queue = queue
        self._grace_s = grace_s
        self._slots = shards_in_flight
        self._datasets: dict[str, Dataset] = {}
        self._held: dict[str, _Held] = {}
        self._wake = anyio.Event()
        self._fatal: EmbedmillError | None = None
        self._tools = Tools(
            embedder=embedder,
            requester=Requester(embedder, budget, WorkerCounts()),
            worker=worker_name(),
            permits=anyio.CapacityLimiter(embedder.limits.concurrency),
            draining=anyio.Event(),
        )

    @property
    def counts(self) -> WorkerCounts:
        return self._tools.counts

    def stop(self) -> None:
        """Take no more tasks, finish the requests in flight within the grace time, hand the rest back."""
        self._tools.draining.set()
        self._wake.set()

    async def run(self, *, on_commit: Callable[[int], None] | None = None) -> None:
        """Work until `stop`. Raises what makes going on useless: a bad key, no balance, a full disk, a corrupt store."""
        async with anyio.create_task_group() as background:
            background.start_soon(self._listen)
            background.start_soon(self._extend_regularly)
            background.start_soon(self._tools.requester.budget.keep_alive)
            try:
                async with anyio.create_task_group() as work:
                    while not self._tools.draining.is_set():
                        await self._take(work, on_commit)
                    with anyio.move_on_after(self._grace_s):
                        while self._held:
                            await self._pause(self._grace_s)
                    work.cancel_scope.cancel()
            finally:
                background.cancel_scope.cancel()
        if self._fatal is not None:
            raise self._fatal

    async def _take(self, work: anyio.abc.TaskGroup, on_commit: Callable[[int], None] | None) -> None:
        free = self._slots - len(self._held)
        leases: list[Lease] = []
        if free > 0:
            try:
                with anyio.CancelScope(shield=True):
                    leases = await self._queue.lease(self._tools.worker, count=free)
            except TransientError as error:
                _log.warning("no tasks for now: %s", error)
        for lease in leases:
            self._drop_former(lease)
            held = self._held[lease.epoch] = _Held(lease)
            work.start_soon(self._work, held, on_commit)
        if not leases:
            await self._pause(_IDLE_S)

    def _drop_former(self, lease: Lease) -> None:
        """A task that expired under us and came back to us: the work under its former lease ends."""
        for former in self._held.values():
            if former.lease.task.id == lease.task.id:
                former.settled = True
                former.scope.cancel()

    async def _pause(self, timeout_s: float) -> None:
        """Sleep until there may be something to do."""
        with anyio.move_on_after(timeout_s):
            await self._wake.wait()
        if not self._tools.draining.is_set():
            self._wake = anyio.Event()
        else:
            await anyio.sleep(0.02)

    async def _listen(self) -> None:
        seen = "0"
        while True:
            newest = await self._queue.wait_for_work(seen, timeout_s=_IDLE_S)
            if newest != seen:
                seen = newest
                self._wake.set()

    async def _extend_regularly(self) -> None:
        while True:
            await anyio.sleep(self._queue.lease_s / 4)
            held = [h for h in self._held.values() if not h.settled]
            if not held:
                continue
            progressed = [h.lease.task.id for h in held if h.work and h.work.progressed()]
            try:
                lost = await self._queue.extend([h.lease for h in held], progressed=progressed)
            except TransientError as error:
                _log.warning("leases were not extended: %s", error)
                continue
            for h in held:
                if h.lease.task.id in lost and not h.settled:
                    h.settled = True
                    h.scope.cancel()

    async def _work(self, held: _Held, on_commit: Callable[[int], None] | None) -> None:
        lease = held.lease
        with held.scope:
            try:
                await self._embed(held, on_commit)
            except TransientError as error:
                await self._later(held, error)
            except _STOPS_ALL as error:
                await self._pause_job(lease, error)
                self._give_up(error)
            except Exception as error:
                _log.exception("shard %s", lease.task.shard)
                self._give_up(EmbedmillError(f"shard {lease.task.shard} failed in an unforeseen way: {error!r}"))
            finally:
                await self._let_go(held)

    async def _embed(self, held: _Held, on_commit: Callable[[int], None] | None) -> None:
        task = held.lease.task
        dataset = await to_thread.run_sync(self._dataset, task)
        if dataset is None or await to_thread.run_sync(_stands_still, dataset, task.job):
            reason = "its dataset is gone" if dataset is None else "its job stands still"
            _log.warning("the task of shard %d of %s is dropped: %s", task.shard, task.dataset, reason)
            with anyio.CancelScope(shield=True):
                await self._queue.drop(held.lease)
            held.settled = True
            return
        held.work = ShardEmbedding(self._tools, dataset, task.shard)
        marker = await held.work.run()
        if marker is None:
            return
        with anyio.CancelScope(shield=True):
            await self._queue.finish(task, dead=dead_letters(marker, task))
            held.settled = True
            self._tools.counts.shards += 1
        if on_commit is not None:
            on_commit(task.shard)

    async def _later(self, held: _Held, error: TransientError) -> None:
        lease = held.lease
        delay_s = min(60.0, error.retry_after_s or 2.0 ** min(lease.attempts, 6))
        self._tools.counts.last_trouble = f"{error}; shard {lease.task.shard} goes on in {delay_s:.0f} s"
        _log.warning("%s", self._tools.counts.last_trouble)
        with suppress(TransientError), anyio.CancelScope(shield=True):
            await self._queue.retry(lease, delay_s=delay_s)
        held.settled = True

    async def _let_go(self, held: _Held) -> None:
        """Hand back what is not settled: drained, cancelled or failed."""
        del self._held[held.lease.epoch]
        self._wake.set()
        if not held.settled:
            with suppress(TransientError), anyio.move_on_after(3, shield=True):
                await self._queue.release(held.lease)

    async def _pause_job(self, lease: Lease, error: EmbedmillError) -> None:
        """An empty account stops the job for everybody, until somebody starts it again; a bad key may be ours only."""
        dataset = self._datasets.get(lease.task.dataset)
        if isinstance(error, NoBalance) and dataset is not None:
            await to_thread.run_sync(pause_job, dataset, lease.task.job, str(error))

    def _give_up(self, error: EmbedmillError) -> None:
        if self._fatal is None:
            self._fatal = error
        self.stop()

    def _dataset(self, task: Task) -> Dataset | None:
        """The dataset that a task is about; None where it is gone or another one stands in its place."""
        known = self._datasets.get(task.dataset)
        if known is None or known.info.id != task.dataset_id:
            self._datasets.pop(task.dataset, None)
            if not open_store(task.dataset).exists(DATASET_KEY):
                return None
            known = Dataset.open(task.dataset)
            if known.info.id != task.dataset_id:
                return None
            known.require(self._tools.embedder.spec)
            if self._on_open is not None:
                self._on_open(known)
            self._datasets[task.dataset] = known
        return known
