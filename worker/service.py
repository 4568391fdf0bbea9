"""The worker: takes tasks, keeps their leases alive, and hands back what it cannot finish.

Redis owns the lease. A worker that is told that a lease is lost drops the work at once; that it was late to notice is
harmless, since everything it writes is created once, whoever creates it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.dataset.submissions import Submissions
from embedmill.embedder import Embedder
from embedmill.errors import (
    BatchHeld,
    BatchPending,
    CapReached,
    ConfigurationError,
    CorruptStore,
    EmbedderFailed,
    EmbedmillError,
    InvalidKey,
    JobFatalError,
    NoBalance,
    PassageTooLarge,
    RateLimited,
    StorageError,
    TransientError,
)
from embedmill.failpoints import afailpoint
from embedmill.messages import job_key
from scheduler.budget import RequestBudget
from scheduler.caps import UNCAPPED, Cap, Caps
from scheduler.queue import Queue

from .batch_lanes import BatchLanes
from .commit import dead_letters
from .embedding import ShardEmbedding, Tools
from .leases import Held, Leases, end_process
from .opening import OpenDatasets, Troubles
from .pools import OtherPools
from .requesting import Requester, WorkerCounts
from .spend import LoggedCap

_log = logging.getLogger("embedmill.worker")
_IDLE_S = 1.0
_BROKEN_AFTER = 5
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
# What pauses the job of a shard, and no other one.
_OF_ONE_JOB = (CapReached, PassageTooLarge, BatchHeld)
# When a shard in such trouble is looked at again while other batches of its job are under way.
_OTHERS_AGAIN_S = 300.0
_OF_ONE_DATASET = (StorageError, CorruptStore, ConfigurationError)


def pause_job(dataset: Dataset, job: str, reason: str, *, reached: int = 0) -> bool:
    """Note in the dataset that a job stands still, and why; reached: its cap, where that is why. Blocking.

    Whether it goes on all the same: its cap was raised meanwhile.
    """

    def pause(known: Job) -> Job:
        """What somebody stopped on purpose stays as it is."""
        if known.state != "running" or (reached and known.max_tokens != reached):
            return known
        caps = {**known.caps, "reached": reached} if reached else known.caps
        return replace(known, state="paused", reason=reason, stopped_by="worker", caps=caps)

    return dataset.change_job(job, pause).state == "running"


def _stands_still(dataset: Dataset, job: str) -> bool:
    """Paused or cancelled: the scheduler queues its shards again when it goes on."""
    known = dataset.job(job)
    return known is not None and known.state != "running"


async def _fetches_others(dataset: Dataset, job: str) -> bool:
    """Whether a job has batches that can be fetched once they are done, as far as anybody knows."""
    with suppress(StorageError, CorruptStore):
        places = await to_thread.run_sync(Submissions(dataset).open_of, job)
        return any(place.accepted and not place.held for place in places)
    return False


def worker_name() -> str:
    """Unique per start of a process, so that a restarted worker is never taken for its former self."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Worker:
    """Embeds shards until it is stopped. One per process; `run` may be called once.

    `on_open` is called in a thread with each dataset before anything of it is embedded. patient: a dataset that cannot be
    read or written (what `on_open` raises included) is tried again later while others go on, so is a shard that fails in an
    unforeseen way, and a model that hangs ends the process; else trouble with a dataset ends `run`, and a queue that forgets
    how often a task was delivered is made up for by notes in the dataset.
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
        patient: bool = False,
    ) -> None:
        self._queue = queue
        self._grace_s = grace_s
        self._slots = shards_in_flight
        self._patient = patient
        self._wake = anyio.Event()
        self._fatal: EmbedmillError | None = None
        self._failed_unforeseen: set[str] = set()
        self._waiting_to_stop: set[str] = set()
        self._tools = Tools(
            embedder=embedder,
            requester=Requester(embedder, budget, WorkerCounts()),
            worker=worker_name(),
            permits=anyio.CapacityLimiter(embedder.limits.concurrency * max(1, len(budget.key_ids))),
            draining=anyio.Event(),
        )
        self._datasets = OpenDatasets(embedder, on_open)
        self._batches = BatchLanes(self._tools.requester, worker=self._tools.worker)
        self._troubles = Troubles()
        self._caps = Caps(queue.connection, namespace=queue.namespace, alone=not patient)
        self._others = OtherPools(queue, embedder.spec.fingerprint)
        budget.remember_by(self._datasets.busy)
        self._leases = Leases(queue, self._tools, on_hung=end_process if patient else self._note_trouble)

    @property
    def counts(self) -> WorkerCounts:
        return self._tools.counts

    def compare_with_quote(self, quoted_tokens: Callable[[Sequence[str]], NDArray[np.float64]]) -> None:
        """Count in `counts.quoted_tokens`, too, what these say for every passage that is embedded from now on."""
        self._tools.requester.quoted_tokens = quoted_tokens
        self.counts.quoted_tokens = 0.0

    def cap_of(self, dataset: Dataset, job: str) -> Cap:
        """The cap of a job, with the spend log of this worker, for a request that is for no shard."""
        return LoggedCap(self._caps.of(dataset, job), self._tools.spending.log(dataset, job), shard=None)

    def stop(self) -> None:
        """Take no more tasks, finish the requests in flight within the grace time, hand the rest back."""
        self._tools.draining.set()
        self._wake.set()

    async def run(self, *, on_commit: Callable[[int], None] | None = None) -> None:
        """Work until `stop`. Raises what makes going on useless: a bad key, no balance, an embedder that fails with any
        text, and unless patient a full disk or a corrupt store."""
        async with anyio.create_task_group() as background:
            background.start_soon(self._listen)
            background.start_soon(self._leases.keep)
            background.start_soon(self._tools.requester.budget.keep_alive)
            background.start_soon(self._caps.keep_alive)
            try:
                async with anyio.create_task_group() as work:
                    while not self._tools.draining.is_set():
                        await self._take(work, on_commit)
                    with anyio.move_on_after(self._grace_s):
                        while len(self._leases):
                            await self._pause(self._grace_s)
                    work.cancel_scope.cancel()
            finally:
                background.cancel_scope.cancel()
                await self._batches.aclose()
                await self._tools.spending.write()
        if self._fatal is not None:
            raise self._fatal

    async def _take(self, work: anyio.abc.TaskGroup, on_commit: Callable[[int], None] | None) -> None:
        self._tools.fit_permits()
        free = self._slots - len(self._leases)
        taken = 0
        try:
            if free > 0:
                with anyio.CancelScope(shield=True):
                    fingerprint = self._tools.embedder.spec.fingerprint
                    leases = await self._queue.lease(self._tools.worker, count=free, fingerprint=fingerprint)
                for lease in leases:
                    work.start_soon(self._work, self._leases.add(lease), on_commit)
                taken = len(leases)
                if not len(self._leases):
                    await self._others.look()
        except TransientError as error:
            _log.warning("no tasks for now: %s", error)
        if not taken:
            await self._pause(_IDLE_S)

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

    async def _work(self, held: Held, on_commit: Callable[[int], None] | None) -> None:
        with held.scope:
            try:
                await afailpoint("worker.after_lease")
                await self._embed(held, on_commit)
            except BatchPending as pending:
                self._tools.counts.last_trouble = str(pending)
                await self._put_off(held, pending.retry_after_s or _IDLE_S)
            except TransientError as error:
                await self._later(held, error, counted=not isinstance(error, RateLimited))
            except EmbedderFailed as error:
                await self._suspect(held, error)
            except JobFatalError as error:
                await self._stop_job(held, error)
            except _OF_ONE_DATASET as error:
                if self._patient:
                    await self._put_off(held, self._troubles.add(held.lease.task, error))
                else:
                    self._give_up(error)
            except Exception as error:
                await self._unforeseen(held, error)
            finally:
                await self._let_go(held)

    async def _embed(self, held: Held, on_commit: Callable[[int], None] | None) -> None:
        task = held.lease.task
        wait_s = self._troubles.delay_s(task)
        if wait_s > 0:
            await self._put_off(held, wait_s)
            return
        dataset = await to_thread.run_sync(self._datasets.get, task)
        await afailpoint("worker.after_open")
        if dataset is None or await to_thread.run_sync(_stands_still, dataset, task.job):
            reason = "its dataset is gone" if dataset is None else "its job stands still"
            _log.warning("the task of shard %d of %s is dropped: %s", task.shard, task.dataset, reason)
            with anyio.CancelScope(shield=True):
                await self._queue.drop(held.lease)
            held.settled = True
            return
        deliveries = held.lease.deliveries if self._patient else None
        batches = await self._batches.lane(dataset, task.shard)
        held.work = ShardEmbedding(
            self._tools,
            dataset,
            task.shard,
            deliveries=deliveries,
            attempts=held.lease.attempts,
            lane=task.lane,
            batches=batches,
            cap=self._caps.of(dataset, task.job),
        )
        marker = await held.work.run()
        if marker is None:
            return
        self._troubles.over(task)
        self._failed_unforeseen.clear()
        with anyio.CancelScope(shield=True):
            await self._queue.finish(task, dead=dead_letters(marker, task))
            held.settled = True
            self._tools.counts.shards += 1
            await to_thread.run_sync(self._datasets.keep_learned, task)
        await afailpoint("worker.after_finish")
        if on_commit is not None:
            on_commit(task.shard)

    async def _later(self, held: Held, error: EmbedmillError, *, counted: bool) -> None:
        lease = held.lease
        backoff_s = _FIRST_RETRY_S * 2 ** min(lease.attempts, 20)
        asked_s = (error.retry_after_s if isinstance(error, TransientError) else None) or 0.0
        delay_s = min(_LONGEST_RETRY_S, max(asked_s, backoff_s) if counted else asked_s or backoff_s)
        self._note_trouble(f"{error}; shard {lease.task.shard} goes on in {delay_s:.0f} s")
        with suppress(TransientError), anyio.CancelScope(shield=True):
            await self._queue.retry(lease, delay_s=delay_s, counted=counted)
        held.settled = True

    async def _suspect(self, held: Held, error: EmbedderFailed) -> None:
        """A passage may be at fault, which counts against its shard, or this process, which others replace."""
        shard = held.lease.task.shard
        _log.error("shard %d of %s", shard, held.lease.task.dataset, exc_info=error)
        try:
            await self._tools.requester.require_well(
                since_s=time.monotonic(),
                complaint=str(error),
                lane=held.lease.task.lane,
                cap=held.work.cap if held.work is not None else UNCAPPED,
            )
        except EmbedderFailed:
            self._give_up(EmbedmillError(f"shard {shard} failed in an unforeseen way, and so does any text: {error}"))
        except TransientError:
            await self._later(held, error, counted=False)
        except JobFatalError as fatal:
            await self._stop_job(held, fatal)
        except EmbedmillError as other:
            self._give_up(other)
        else:
            await self._later(held, error, counted=True)

    async def _unforeseen(self, held: Held, error: Exception) -> None:
        """The shard waits and others go on, until several shards in a row fail so: then it is this process."""
        task = held.lease.task
        _log.error("shard %d of %s", task.shard, task.dataset, exc_info=error)
        trouble = EmbedmillError(f"shard {task.shard} failed in an unforeseen way: {error!r}")
        self._failed_unforeseen.add(task.id)
        if self._patient and len(self._failed_unforeseen) < _BROKEN_AFTER:
            await self._later(held, trouble, counted=True)
        else:
            self._give_up(trouble)

    async def _put_off(self, held: Held, delay_s: float) -> None:
        """The dataset is in trouble, not the shard, or the shard's batches are not done yet."""
        with suppress(TransientError), anyio.CancelScope(shield=True):
            await self._queue.retry(held.lease, delay_s=delay_s, counted=False)
        held.settled = True

    async def _let_go(self, held: Held) -> None:
        """Hand back what is not settled: drained, halted, cancelled or failed."""
        self._leases.remove(held)
        self._wake.set()
        if not held.settled:
            with suppress(TransientError), anyio.move_on_after(3, shield=True):
                await afailpoint("worker.before_release")
                await self._queue.release(held.lease)

    async def _stop_job(self, held: Held, error: JobFatalError) -> None:
        """A key that is refused, an empty account, a cap, a passage that no limit allows and a batch that is held stop the
        job for everybody, until somebody starts it again; a key does not, while other workers have others. A patient worker
        goes on with other jobs where those may succeed. What stops one job only waits until its batches are fetched, which
        nobody would do while it is paused."""
        task = held.lease.task
        dataset = self._datasets.known(task)
        pauses = isinstance(error, _OF_ONE_JOB)
        if pauses and dataset is not None and held.work is not None and await _fetches_others(dataset, task.job):
            # A cap is the whole job's, other trouble the shard's.
            said = job_key(task.dataset_id, task.job) if isinstance(error, CapReached) else task.id
            if said not in self._waiting_to_stop:
                self._waiting_to_stop.add(said)
                self._note_trouble(
                    f"{error}; job {task.job} of {task.dataset} is paused once its other batches are fetched"
                )
            await self._put_off(held, _OTHERS_AGAIN_S)
            return
        self._waiting_to_stop.clear()
        if isinstance(error, (InvalidKey, NoBalance)):
            pauses = not await self._others_have_other_keys()
        if pauses and dataset is not None:
            reached = error.limit if isinstance(error, CapReached) else 0
            goes_on = False
            try:
                goes_on = await to_thread.run_sync(partial(pause_job, dataset, task.job, str(error), reached=reached))
            except StorageError as storage:
                _log.warning("job %s was not paused: %s", task.job, storage)
            if not goes_on:
                with suppress(TransientError):
                    await self._queue.pause(task.dataset_id, task.job)
        if self._patient and isinstance(error, _OF_ONE_JOB):
            self._note_trouble(f"job {task.job} of {task.dataset} is paused: {error}")
        else:
            self._give_up(error)

    async def _others_have_other_keys(self) -> bool:
        """Whether a worker for this model lives that may go on where ours cannot."""
        budget, model = self._tools.requester.budget, self._tools.embedder.spec.model
        try:
            reports = await self._queue.workers()
        except TransientError:
            return False
        return any(
            report.record.get("model") == model
            and report.age_s < self._queue.lease_s
            and not set(report.record.get("keys", ())) <= set(budget.key_ids)
            for report in reports
        )

    def _give_up(self, error: EmbedmillError) -> None:
        if self._fatal is None:
            self._fatal = error
        self.stop()

    def _note_trouble(self, message: str) -> None:
        self._tools.counts.last_trouble = message
        _log.warning("%s", message)
