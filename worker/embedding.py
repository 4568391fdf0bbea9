"""One leased shard, from its documents to its marker.

Whatever happens on the way, what was paid for is kept: results go to checkpoints every two seconds, and once more when the
work is cancelled, drained or fails.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import numpy as np
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED, Failure, Marker
from embedmill.dataset.passages import ShardOrigin
from embedmill.embedder import Embedder, Embedding
from embedmill.errors import CorruptStore, EmbedmillError, InputRejected, JobFatalError, RequestTooLarge, StorageError

from .checkpoints import Checkpoint
from .commit import commit_shard
from .gate import inspect
from .packing import pack
from .requesting import Requester, WorkerCounts
from .results import Increment, ShardResults
from .spend import SpendLog

CHECKPOINT_EVERY_S = 2.0
_GATE_TRIES = 4
_log = logging.getLogger("embedmill.worker")


@dataclass(slots=True)
class Tools:
    """What every shard of a worker shares. `permits` bounds the requests in flight of the whole worker."""

    embedder: Embedder
    requester: Requester
    worker: str
    permits: anyio.CapacityLimiter
    draining: anyio.Event

    @property
    def counts(self) -> WorkerCounts:
        return self.requester.counts


class ShardEmbedding:
    """The work on one shard. `progressed` is true once the checkpoint grew since it was last asked."""

    def __init__(self, tools: Tools, dataset: Dataset, shard: int) -> None:
        self._tools = tools
        self._dataset = dataset
        self._shard = shard
        self._attempt = uuid.uuid4().hex[:12]
        self._checkpoint = Checkpoint(dataset, shard, attempt=self._attempt)
        self._spend = SpendLog(dataset, worker=tools.worker, key_id=tools.requester.budget.key_id)
        self._grown = False
        self._ids: list[tuple[str, int]] = []
        self._texts: list[str] = []
        self._tokens: dict[int, int] = {}
        self._trouble: EmbedmillError | None = None
        self._origin: ShardOrigin
        self._results: ShardResults

    def progressed(self) -> bool:
        grown, self._grown = self._grown, False
        return grown

    async def run(self) -> Marker | None:
        """Embed what is owed and commit; the marker, or None when the worker was drained before the end.

        Raises TransientError (try the shard later), JobFatalError, StorageError, CorruptStore.
        """
        marker = await to_thread.run_sync(self._dataset.marker, self._shard)
        if marker is None:
            await to_thread.run_sync(self._prepare)
            await self._embed_owed()
            if self._results.owed():
                return None
            marker = await self._commit()
        await to_thread.run_sync(self._checkpoint.sweep)
        return marker

    def _prepare(self) -> None:
        table, self._origin = self._dataset.documents(self._shard, columns=["id", "version", "text", "deleted"])
        columns: dict[str, list[Any]] = table.to_pydict()
        self._ids = list(zip(columns["id"], columns["version"], strict=True))
        self._texts = [text or "" for text in columns["text"]]
        self._results = ShardResults(table.num_rows, self._dataset.info.dimensions)
        self._results.delete(row for row, deleted in enumerate(columns["deleted"]) if deleted)
        adopted = self._checkpoint.adopt(self._results)
        adopted += self._adopt_stored() + self._carry_over()
        self._tools.counts.adopted += adopted

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
        if not owed:
            return
        limits = self._tools.embedder.limits
        texts = [self._texts[row] for row in owed]
        tokens = await to_thread.run_sync(self._tools.embedder.estimate_tokens, texts)
        self._tokens = dict(zip(owed, tokens, strict=True))
        batches = [[owed[position] for position in batch] for batch in pack(tokens, limits=limits)]
        if limits.padded:
            # Long and short batches mixed, so that speed and remaining time are honest from the start.
            random.Random(self._shard).shuffle(batches)
        waiting = iter(batches)
        try:
            async with anyio.create_task_group() as work:
                work.start_soon(self._keep_regularly)
                async with anyio.create_task_group() as runners:
                    for _ in range(min(limits.concurrency, len(batches))):
                        runners.start_soon(self._run_batches, waiting)
                work.cancel_scope.cancel()
        finally:
            if self._results.owed():
                with anyio.CancelScope(shield=True):
                    await self._keep()
        if self._trouble is not None:
            raise self._trouble

    async def _run_batches(self, waiting: Iterator[list[int]]) -> None:
        """Work off batches. Trouble in one lets the others finish what they have sent: it is paid for."""
        while True:
            async with self._tools.permits:
                stopping = self._trouble is not None or self._tools.draining.is_set()
                batch = None if stopping else next(waiting, None)
                if batch is None:
                    return
                try:
                    await self._embed(batch)
                except EmbedmillError as error:
                    self._trouble = self._trouble or error

    async def _embed(self, rows: list[int], *, tries: int = _GATE_TRIES, since_s: float | None = None) -> None:
        """Embed rows in one request; bisect when their content is refused, until the bad passage is alone.

        A row whose vector does not pass the gate is asked for again by itself, so many `tries` in all. since_s: when the
        first complaint came that led here; nothing is buried before the provider has done something else well since.
        """
        texts = [self._texts[row] for row in rows]
        began_s = time.monotonic()
        try:
            embedding = await self._tools.requester.ask(
                texts,
                est_tokens=sum(self._tokens[row] for row in rows),
                on_waste=lambda answer: self._add([], answer, []),
            )
        except InputRejected as error:
            await self._bisect(rows, error, tries=tries, since_s=since_s or began_s)
            return
        report = inspect(
            embedding.vectors, texts, dimensions=self._results.dimensions, dtype=np.dtype(self._dataset.info.dtype)
        )
        good = [position for position in range(len(rows)) if position not in report.bad]
        self._add([rows[position] for position in good], embedding, good)
        for position, cause in report.bad.items():
            if tries <= 1:
                await self._tools.requester.require_well(since_s=since_s or began_s, complaint=cause)
                self._fail(rows[position], code="gate", cause=cause)
            else:
                await self._embed([rows[position]], tries=tries - 1, since_s=since_s or began_s)

    async def _bisect(self, rows: list[int], refusal: InputRejected, *, tries: int, since_s: float) -> None:
        if len(rows) > 1:
            middle = len(rows) // 2
            await self._embed(rows[:middle], tries=tries, since_s=since_s)
            await self._embed(rows[middle:], tries=tries, since_s=since_s)
            return
        if isinstance(refusal, RequestTooLarge):
            raise JobFatalError(f"{refusal}; nothing is lost, run again with other limits") from refusal
        await self._tools.requester.require_well(since_s=since_s, complaint=str(refusal))
        self._fail(rows[0], code=refusal.code, cause=str(refusal))

    def _add(self, rows: list[int], embedding: Embedding, positions: list[int]) -> None:
        row_of = dict(zip(positions, rows, strict=True))
        truncated = tuple(row_of[position] for position in embedding.truncated if position in row_of)
        increment = Increment(
            rows=np.array(rows, dtype=np.int32),
            vectors=embedding.vectors[positions] if positions else np.empty((0, self._results.dimensions), np.float32),
            truncated=truncated,
            billed_tokens=embedding.billed_tokens,
            requests=1,
        )
        counts = self._tools.counts
        counts.embedded += self._results.add(increment)
        counts.tokens += embedding.billed_tokens
        counts.requests += 1
        counts.truncated += len(truncated)

    def _fail(self, row: int, *, code: str, cause: str) -> None:
        id_, version = self._ids[row]
        none = np.empty((0, self._results.dimensions), np.float32)
        failure = Failure(row, id_, version, code, cause)
        self._results.add(Increment(np.empty(0, np.int32), none, failures=(failure,)))
        self._tools.counts.failed += 1

    async def _keep_regularly(self) -> None:
        while True:
            await anyio.sleep(CHECKPOINT_EVERY_S)
            try:
                await self._keep()
            except StorageError as error:
                self._trouble = self._trouble or error
                return

    async def _keep(self) -> None:
        increment = self._results.take_unkept()
        if increment.empty:
            return

        def keep() -> None:
            self._checkpoint.keep(increment)
            self._spend.add(self._shard, increment)

        try:
            await to_thread.run_sync(keep)
        except BaseException:
            self._results.put_back(increment)
            raise
        self._grown = True

    async def _commit(self) -> Marker:
        unkept = self._results.take_unkept()

        def commit() -> Marker:
            try:
                self._spend.add(self._shard, unkept)
                return commit_shard(
                    self._dataset,
                    self._shard,
                    self._results,
                    origin=self._origin,
                    passages=self._ids,
                    attempt=self._attempt,
                    worker=self._tools.worker,
                )
            except EmbedmillError:
                # Paid for all the same: whoever tries again takes it over.
                self._checkpoint.keep(unkept)
                raise

        with anyio.CancelScope(shield=True):
            marker = await to_thread.run_sync(commit)
        return marker  # noqa: RET504
