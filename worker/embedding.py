"""One leased shard, from its documents to its marker.

Whatever happens on the way, what was paid for is kept: results go to checkpoints at least every two seconds, those that
somebody is paid for up to ten times a second, and once more when the work is cancelled, drained or fails.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED, Marker
from embedmill.dataset.passages import ShardOrigin
from embedmill.embedder import Embedder, EmbedsTogether
from embedmill.errors import CorruptStore, EmbedmillError, StorageError
from embedmill.failpoints import afailpoint, failpoint
from embedmill.messages import Lane, job_key
from scheduler.caps import UNCAPPED, Cap

from .attempts import naming_the_unforeseen
from .batch_lane import BatchLane
from .checkpoints import Checkpoint
from .commit import commit_shard
from .isolation import Trials
from .packing import pack
from .requesting import Requester, WorkerCounts
from .results import Increment, ShardResults
from .shard_requests import ShardRequests
from .spend import LoggedCap, SpendFiles
from .together import TogetherRequests
from .trials import FAILURES_TO_SUSPECT, SUSPECT_AFTER, Note, TrialNotes, suspects
from .windows import WindowPlan, documents_of

CHECKPOINT_EVERY_S = 2.0
# What is paid for is kept soon, as long as keeping takes a twentieth of the time.
_PAID_CHECKPOINT_S, _KEEPING_SHARE = 0.1, 0.05
# Who is killed again and again, soon after its start, gets on all the same.
_FIRST_CHECKPOINT_S = 0.5
_log = logging.getLogger("embedmill.worker")


@dataclass(slots=True)
class Tools:
    """What every shard of a worker shares. `permits` bounds the requests in flight of the whole worker; counted: passages
    with a vector of shards that are not committed, by their place, as far as this process has counted them."""

    embedder: Embedder
    requester: Requester
    worker: str
    permits: anyio.CapacityLimiter
    draining: anyio.Event
    counted: dict[tuple[str, int], int] = field(default_factory=dict)
    spending: SpendFiles = field(init=False)
    _trials: anyio.Lock = field(default_factory=anyio.Lock)

    def __post_init__(self) -> None:
        self.spending = SpendFiles(self.worker)

    @property
    def counts(self) -> WorkerCounts:
        return self.requester.counts

    def fit_permits(self) -> None:
        """As many as all keys allow together: keys come and go."""
        wanted = self.embedder.limits.concurrency * max(1, len(self.requester.budget.key_ids))
        if wanted != self.permits.total_tokens:
            self.permits.total_tokens = wanted

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold every permit, so that nothing else of this process is in flight."""
        async with self._trials:
            held: list[object] = []
            try:
                while len(held) < self.permits.total_tokens:
                    borrower = object()
                    await self.permits.acquire_on_behalf_of(borrower)
                    held.append(borrower)
                yield
            finally:
                for borrower in held:
                    self.permits.release_on_behalf_of(borrower)


class ShardEmbedding:
    """The work on one shard. deliveries: of its task, this one included, without progress; from `SUSPECT_AFTER` on it is
    worked in trials. None: the queue does not remember them, so they are counted in the dataset. attempts: of its task that
    failed before; from `FAILURES_TO_SUSPECT` on likewise. lane: in which its requests wait for the budget.
    batches: the way through the provider's batch endpoint, for what is to go there.
    """

    def __init__(
        self,
        tools: Tools,
        dataset: Dataset,
        shard: int,
        *,
        deliveries: int | None,
        attempts: int = 0,
        lane: Lane = "bulk",
        batches: BatchLane | None = None,
        cap: Cap = UNCAPPED,
    ) -> None:
        self._tools = tools
        self._dataset = dataset
        self._shard = shard
        self._deliveries = deliveries
        self._attempts = attempts
        self._lane: Lane = lane
        self._batches = batches
        self._place = (dataset.info.id, shard)
        self._attempt = uuid.uuid4().hex[:12]
        self._checkpoint = Checkpoint(dataset, shard, attempt=self._attempt)
        self._notes = TrialNotes(dataset, shard, attempt=self._attempt)
        log = tools.spending.log(dataset, dataset.admission(shard).job)
        self.cap = LoggedCap(cap, log, shard=shard)
        self._ids: list[tuple[str, int]] = []
        self._texts: list[str] = []
        self._trouble: EmbedmillError | None = None
        self._halted = False
        self._left: list[Note] = []
        self._keeping = anyio.Lock()
        self._progressed = False
        self._origin: ShardOrigin
        self._windows: WindowPlan | None
        self._results: ShardResults
        self._requests: ShardRequests
        self.grown = False
        """The checkpoint grew since somebody set this to False."""

    def halt(self) -> None:
        """Send nothing more; `run` ends as when drained."""
        self._halted = True

    async def run(self) -> Marker | None:
        """Embed what is owed and commit; the marker, or None when the worker was drained or the shard halted before the end.

        Raises TransientError and EmbedderFailed (try the shard later), JobFatalError, StorageError, CorruptStore.
        """
        marker = await to_thread.run_sync(self._dataset.marker, self._shard)
        if marker is None:
            if self._batches is not None:
                await self._batches.look()
            await to_thread.run_sync(self._prepare)
            await afailpoint("worker.after_adopt")
            try:
                await self._embed_owed()
            finally:
                self._tools.counted[self._place] = self._results.embedded
            if self._results.owed():
                return None
            marker = await self._commit()
            del self._tools.counted[self._place]
        await to_thread.run_sync(self._checkpoint.sweep)
        await afailpoint("worker.after_sweep")
        return marker

    def _prepare(self) -> None:
        table, self._origin = self._dataset.documents(
            self._shard, columns=["id", "version", "text", "deleted", "group"]
        )
        columns: dict[str, list[Any]] = table.to_pydict()
        self._ids = list(zip(columns["id"], columns["version"], strict=True))
        self._texts = [text or "" for text in columns["text"]]
        self._results = ShardResults(table.num_rows, self._dataset.info.dimensions)
        self._windows = self._plan_windows(columns)
        job = self._dataset.job(self._origin.job)
        together = ShardRequests if self._windows is None else TogetherRequests
        self._requests = together(
            self._tools.requester,
            self._results,
            ids=self._ids,
            texts=self._texts,
            dtype=self._dataset.info.dtype,
            job=job_key(self._dataset.info.id, self._origin.job),
            lane=self._lane,
            cap=self.cap,
            too_long=job.too_long if job is not None else "truncate",
        )
        self._results.delete(row for row, deleted in enumerate(columns["deleted"]) if deleted)
        adopted = self._checkpoint.adopt(self._results)
        stored = self._adopt_stored()
        adopted += stored + self._carry_over()
        # A shard that comes back to this process brings what this process has counted before.
        self._tools.counts.adopted += max(0, adopted - self._tools.counted.get(self._place, 0))
        self._left = self._notes.left()
        # What is stored stays as it is.
        if self._windows is not None and not stored:
            self._windows.owe_whole(self._results, suspects=suspects(self._left))

    def _plan_windows(self, columns: dict[str, list[Any]]) -> WindowPlan | None:
        """With late chunking, which rows are embedded together. Raises EmbedderFailed."""
        embedder = self._tools.embedder
        if not self._dataset.info.embedder.late_chunking or not isinstance(embedder, EmbedsTogether):
            return None
        documents = documents_of(columns["id"], columns["group"], columns["deleted"])
        with naming_the_unforeseen():
            return WindowPlan(documents, self._texts, embedder, max_inputs=embedder.limits.max_inputs)

    def _adopt_stored(self) -> int:
        """An attempt that died between vectors and marker left them whole."""
        stored = self._dataset.stored_vectors(self._shard, rows=self._results.rows)
        if stored is None:
            return 0
        rows = np.flatnonzero(np.isfinite(stored[0]).all(axis=1)).astype(np.int32)
        return self._results.add(Increment(rows, stored[0][rows].astype(np.float32)), kept=True)

    def _carry_over(self) -> int:
        """Vectors of rows whose text did not change, from the shards that hold them, where those are committed."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row, (shard, old_row) in self._origin.carried.items():
            wanted.setdefault(shard, []).append((row, old_row))
        carried = 0
        for shard, pairs in wanted.items():
            marker = self._dataset.marker(shard)
            if marker is None:
                continue
            embedded = [(row, old_row) for row, old_row in pairs if marker.statuses[old_row] == EMBEDDED]
            try:
                vectors = self._dataset.vectors(shard)
            except CorruptStore as error:
                self._tools.counts.last_trouble = f"{error}; what should be taken over from it is embedded again"
                _log.warning("%s", self._tools.counts.last_trouble)
                continue
            old = vectors[[old_row for _, old_row in embedded]].astype(np.float32)
            rows = np.array([row for row, _ in embedded], np.int32)
            carried += self._results.add(Increment(rows, old), kept=True)
        return carried

    async def _embed_owed(self) -> None:
        owed = self._results.owed()
        if not owed and self._batches is None:
            return
        try:
            async with anyio.create_task_group() as work:
                work.start_soon(self._keep_regularly)
                try:
                    await self._work_off(owed)
                except EmbedmillError as error:
                    self._trouble = self._trouble or error
                work.cancel_scope.cancel()
        except BaseException:
            await self._keep_shielded()
            raise
        # What is whole goes straight into the commit.
        if self._results.owed():
            await self._keep_shielded()
        if self._trouble is not None:
            raise self._trouble

    async def _work_off(self, owed: list[int]) -> None:
        if self._batches is not None:
            await self._batches.work_off(self._requests, keep=self._keep, stopping=lambda: self.stopping)
            owed = self._results.owed()
            if not owed:
                return
        deliveries = self._deliveries or sum(not note.rows for note in self._left) + 1
        if suspects(self._left) or deliveries >= SUSPECT_AFTER or self._attempts >= FAILURES_TO_SUSPECT:
            _log.warning(
                "shard %d of %s is worked in trials: delivery %d without progress, %d failed attempts",
                self._shard,
                self._dataset.url,
                deliveries,
                self._attempts,
            )
            await self._trials().run(owed)
        elif self._deliveries is None:
            async with self._notes.standing(Note(())):
                await self._run_all(owed)
        else:
            await self._run_all(owed)

    def _trials(self) -> Trials:
        return Trials(
            self._tools.requester,
            self._requests,
            self._results,
            self._notes,
            left=self._left,
            ids=self._ids,
            texts=self._texts,
            permits=self._tools.permits,
            alone=self._tools.alone,
            keep=self._keep,
            stopping=lambda: self.stopping,
            draining=self._tools.draining,
            windows=None if self._windows is None else self._windows.owed(self._results),
        )

    @property
    def stopping(self) -> bool:
        """Nothing more is sent: trouble, a job that was halted, or a worker that drains."""
        return self._trouble is not None or self._halted or self._tools.draining.is_set()

    async def _run_all(self, owed: list[int]) -> None:
        limits = self._tools.embedder.limits
        async with self._tools.permits:
            tokens = await self._requests.estimate(owed)
        if self._windows is not None:
            batches = [list(rows) for rows in self._windows.owed(self._results)]
        else:
            batches = [[owed[position] for position in batch] for batch in pack(tokens, limits=limits)]
        if limits.padded:
            # Long and short batches mixed, so that speed and remaining time are honest from the start.
            random.Random(self._shard).shuffle(batches)
        waiting = iter(batches)
        async with anyio.create_task_group() as runners:
            for _ in range(min(int(self._tools.permits.total_tokens), len(batches))):
                runners.start_soon(self._run_batches, waiting)

    async def _run_batches(self, waiting: Iterator[list[int]]) -> None:
        """Work off batches. Trouble in one lets the others finish what they have sent: it is paid for."""
        while True:
            async with self._tools.permits:
                batch = None if self.stopping else next(waiting, None)
                if batch is None:
                    return
                try:
                    await self._requests.embed(batch)
                except EmbedmillError as error:
                    self._trouble = self._trouble or error

    async def _keep_regularly(self) -> None:
        paid = bool(self._tools.requester.budget.key_ids)
        wait_s = _PAID_CHECKPOINT_S if paid else _FIRST_CHECKPOINT_S
        while True:
            await anyio.sleep(wait_s)
            began_s = time.monotonic()
            try:
                await self._keep()
            except StorageError as error:
                self._trouble = self._trouble or error
                return
            keeping_s = time.monotonic() - began_s
            wait_s = max(_PAID_CHECKPOINT_S, keeping_s / _KEEPING_SHARE) if paid else 2 * wait_s
            wait_s = min(CHECKPOINT_EVERY_S, wait_s)

    async def _keep_shielded(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._keep()

    async def _keep(self) -> None:
        async with self._keeping:
            await self._keep_unkept()

    async def _keep_unkept(self) -> None:
        increment = self._results.take_unkept()
        if increment.empty:
            return

        def keep() -> None:
            failpoint("worker.before_checkpoint")
            self._checkpoint.keep(increment)
            failpoint("worker.after_checkpoint")
            if self._deliveries is None and not self._progressed:
                # This delivery was not without progress, and those before it count no more.
                self._notes.forget_deliveries()
                self._progressed = True

        try:
            await to_thread.run_sync(keep)
        except BaseException:
            self._results.put_back(increment)
            raise
        self.grown = True

    async def _commit(self) -> Marker:
        unkept = self._results.take_unkept()

        def commit() -> Marker:
            try:
                return commit_shard(
                    self._dataset,
                    self._shard,
                    self._results,
                    origin=self._origin,
                    passages=self._ids,
                    attempt=self._attempt,
                    worker=self._tools.worker,
                    windows=lambda: () if self._windows is None else self._windows.split(self._results),
                )
            except EmbedmillError:
                # Paid for all the same: whoever tries again takes it over.
                self._checkpoint.keep(unkept)
                raise

        with anyio.CancelScope(shield=True):
            marker = await to_thread.run_sync(commit)
        return marker  # noqa: RET504
