"""Committed shards into Milvus: read, decide, send, note it down.

The markers in the dataset are the rule and announcements only hints. A shard counts as loaded when the ledger has its
result, which is written after Milvus acknowledged every row (Milvus Lite: after a flush). Stopping anywhere costs at most
sending some shards again, which changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio
import numpy as np
import pyarrow as pa
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, describe, now_iso
from embedmill.dataset.deciding import status_reader
from embedmill.dataset.index import DatasetIndex
from embedmill.errors import ConfigurationError, CorruptStore, TransientError
from embedmill.failpoints import afailpoint
from scheduler.queue import Queue

from .description import CollectionDescription, check_collection_name, default_collection
from .ledger import Ledger, LedgerTarget, LoadResult
from .rows import ShardPlan, cut_text, parse_metadata, plan_shard
from .target import CollectionState, MilvusTarget

if TYPE_CHECKING:
    from .verification import TargetReport

_log = logging.getLogger("embedmill.loader")
_CHECKPOINT_ROWS = 16_384
_CHECKPOINT_S = 5.0
_COLUMNS = ("id", "text", "metadata", "version")


@dataclass(slots=True)
class LoadCounts:
    """What this loader did, rows but for the shards. cut: rows whose text or metadata is longer than Milvus takes."""

    shards_loaded: int = 0
    rows_upserted: int = 0
    rows_deleted: int = 0
    rows_superseded: int = 0
    rows_skipped: int = 0
    rows_cut: int = 0


@dataclass(frozen=True, slots=True)
class _ShardLoad:
    """A shard, read and decided."""

    plan: ShardPlan
    rows: list[dict[str, Any]]
    cut: int
    marker_crc32c: str


class Loader:
    """Loads one dataset into one collection. `prepare` first; an async context manager does that, and `aclose`."""

    def __init__(self, dataset: Dataset, target: MilvusTarget) -> None:
        self.dataset = dataset
        self.target = target
        self.counts = LoadCounts()
        self._lock = anyio.Lock()
        self._ledger: Ledger | None = None
        self._index: DatasetIndex | None = None
        self._loaded: dict[int, str] = {}
        self._intents: set[int] = set()

    async def __aenter__(self) -> Self:
        await self.prepare()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def collection(self) -> str:
        """The collection that is loaded into."""
        return self.target.collection or default_collection(self.dataset.url)

    async def prepare(self) -> None:
        """Connect, create the collection where there is none, take the ledger's lock.

        Raises ConfigurationError when the collection holds something else, or another loader is at it.
        """
        if self._ledger is not None:
            return
        try:
            await self._prepare()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Let go of the ledger and of the database. Idempotent."""
        with anyio.CancelScope(shield=True):
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None
            if self._index is not None:
                self._index.close()
                self._index = None
            await self.target.aclose()

    async def load_shard(self, shard: int) -> bool:
        """Apply one committed shard, whether or not it was before; False when it is not committed."""
        async with self._lock:
            committed = await to_thread.run_sync(self._committed)
            if shard not in committed:
                return False
            await self._checkpoint([await self._apply(shard, committed)])
            return True

    async def sweep(self, stop: anyio.Event | None = None) -> int:
        """Apply every committed shard that the ledger does not have, in order; how many there were.

        With `stop` set meanwhile, ends after the shard at hand.
        """
        async with self._lock:
            swept = 0
            while todo := await to_thread.run_sync(self._outstanding):
                committed, shards = todo
                swept += await self._apply_all(shards, committed, stop)
                if stop is not None and stop.is_set():
                    break
            return swept

    async def finish(self) -> None:
        """Make what was loaded durable and searchable."""
        async with self._lock:
            await self.target.flush()
            await self.target.make_searchable()

    async def follow(self, queue: Queue, stop: anyio.Event, *, sweep_every_s: float = 5.0) -> None:
        """Load what is committed until `stop` is set, which takes effect within a second.

        An announcement starts a sweep at once; without any, one runs every `sweep_every_s`. A Milvus that stays away is
        waited for.
        """
        announced, searchable = "0", False
        while not stop.is_set():
            try:
                swept = await self.sweep(stop)
                if not searchable:
                    await self.finish()
                    searchable = True
                if swept:
                    _log.info("loaded %d shards, %d rows so far", swept, self.counts.rows_upserted)
            except TransientError as error:
                _log.warning("%s", error)
            announced = await _wait_for_announcement(queue, announced, stop, at_most_s=sweep_every_s)

    async def repair(self, report: TargetReport) -> int:
        """Delete what the report calls extra and apply the shards of what is missing, stale or different again; their
        number."""
        ledger = self._require_ledger()
        await self.target.delete(report.extra_ids)
        # A replacement counts as loaded when those that it replaces are.
        shards = report.shards | await to_thread.run_sync(self._replaced, report.shards)
        await to_thread.run_sync(ledger.forget, shards)
        for shard in shards:
            self._loaded.pop(shard, None)
        swept = await self.sweep()
        await self.finish()
        return swept

    async def _prepare(self) -> None:
        await self.target.connect()
        state = await self._adopt_collection()
        ledger = Ledger(self.dataset, _ledger_target(self.target, state))
        await to_thread.run_sync(ledger.open)
        self._ledger = ledger
        self._index = await to_thread.run_sync(self.dataset.open_index)
        results = await to_thread.run_sync(ledger.results)
        self._intents = await to_thread.run_sync(ledger.intents)
        # Who died between the two steps of a result leaves both: applying the shard again also removes the intent.
        self._loaded = {s: result.marker_crc32c for s, result in results.items() if s not in self._intents}

    async def _adopt_collection(self) -> CollectionState:
        name = self.target.collection = check_collection_name(self.collection)
        wanted = CollectionDescription.of_dataset(self.dataset.info)
        state = await self.target.describe(name)
        if state is None:
            await self.target.create(wanted)
            state = await self.target.describe(name)
            if state is None:
                raise ConfigurationError(f"collection {name} vanished after it was created: run the same command again")
        require_collection(state, wanted)
        return state

    async def _apply_all(self, shards: Sequence[int], committed: frozenset[int], stop: anyio.Event | None) -> int:
        results: list[LoadResult] = []
        rows, since, applied = 0, time.monotonic(), 0
        for shard in shards:
            if stop is not None and stop.is_set():
                break
            adopted = await to_thread.run_sync(self._adopt, shard)
            results.append(adopted or await self._apply(shard, committed))
            applied += 1
            rows += results[-1].upserted
            if rows >= _CHECKPOINT_ROWS or time.monotonic() - since > _CHECKPOINT_S:
                await self._checkpoint(results)
                results, rows, since = [], 0, time.monotonic()
        await self._checkpoint(results)
        return applied

    async def _apply(self, shard: int, committed: frozenset[int]) -> LoadResult:
        """Send one shard. Its result counts once `_checkpoint` has written it."""
        ledger = self._require_ledger()
        load = await to_thread.run_sync(self._read, shard, committed)
        if shard in self._intents:
            await self._recover(shard, load.plan)
        await afailpoint("loader.before_intent")
        await to_thread.run_sync(ledger.intend, shard)
        await afailpoint("loader.after_intent")
        self._intents.add(shard)
        await self.target.upsert(load.rows)
        await afailpoint("loader.after_upsert")
        await self.target.delete(load.plan.delete)
        await afailpoint("loader.after_delete")
        self.counts.rows_upserted += len(load.rows)
        self.counts.rows_deleted += len(load.plan.delete)
        return LoadResult(
            shard=shard,
            marker_crc32c=load.marker_crc32c,
            upserted=len(load.rows),
            deleted=len(load.plan.delete),
            superseded=load.plan.superseded,
            skipped=load.plan.skipped,
            cut=load.cut,
            at=now_iso(),
        )

    def _adopt(self, shard: int) -> LoadResult | None:
        """The result of a replacement whose rows are in the collection already: all that it replaces was loaded."""
        replaced = self._replaced([shard])
        if shard in self._intents or not replaced or not replaced <= self._loaded.keys() - self._intents:
            return None
        crc32c = self.dataset.describe_object(layout.commit_key(shard)).crc32c
        return LoadResult(shard, crc32c, upserted=0, deleted=0, superseded=0, skipped=0, cut=0, at=now_iso())

    def _replaced(self, shards: Iterable[int]) -> frozenset[int]:
        """The shards that the rows of replacements stood in before."""
        return frozenset(
            old
            for shard in shards
            if self.dataset.admission(shard).replaces
            for old, _ in self.dataset.origin(shard).carried.values()
        )

    async def _recover(self, shard: int, plan: ShardPlan) -> None:
        """An earlier attempt may have sent rows of this shard that a higher version overrules by now, and a server may have
        taken them late: whatever overrules them is applied again, after this shard."""
        await to_thread.run_sync(self._apply_again, shard, plan)

    def _apply_again(self, shard: int, plan: ShardPlan) -> None:
        overruling = plan.superseding & self._loaded.keys()
        self._require_ledger().forget(overruling)
        for other in overruling:
            del self._loaded[other]
        if overruling:
            _log.info("shard %d was interrupted: applying %s again", shard, sorted(overruling))

    def _settle_retired(self, committed: frozenset[int]) -> None:
        """Shards that were retired while they were half there: nobody applies them again, so what overrules their rows is.
        Their other rows stand in replacements, which are applied, since those shards were not wholly loaded."""
        ledger = self._require_ledger()
        for shard in sorted(self._intents & self.dataset.retired()):
            if self.dataset.marker(shard) is not None:
                self._apply_again(shard, self._plan(shard, committed)[0])
            ledger.withdraw(shard)
            self._intents.discard(shard)

    async def _checkpoint(self, results: Sequence[LoadResult]) -> None:
        if not results:
            return
        with anyio.CancelScope(shield=True):
            if self.target.lite:
                await self.target.flush()
            await afailpoint("loader.after_flush")
            for result in results:
                await to_thread.run_sync(self._require_ledger().record, result)
                self._loaded[result.shard] = result.marker_crc32c
                self._intents.discard(result.shard)
                self.counts.shards_loaded += 1
                self.counts.rows_superseded += result.superseded
                self.counts.rows_skipped += result.skipped
                self.counts.rows_cut += result.cut

    def _committed(self) -> frozenset[int]:
        """The live committed shards. The index has all of their rows afterwards.

        A shard that was put aside and committed anew counts as not loaded.
        """
        put_aside = self.dataset.forget_put_aside()
        committed = frozenset(self.dataset.committed())
        for shard in put_aside & committed & self._loaded.keys():
            data = self.dataset.store.read_or_none(layout.commit_key(shard))
            if data is not None and describe(data).crc32c != self._loaded[shard]:
                del self._loaded[shard]
        self.dataset.catch_up(self._require_index())
        return committed

    def _outstanding(self) -> tuple[frozenset[int], list[int]] | None:
        committed = self._committed()
        self._settle_retired(committed)
        shards = sorted(shard for shard in committed if shard not in self._loaded)
        return (committed, shards) if shards else None

    def _read(self, shard: int, committed: frozenset[int]) -> _ShardLoad:
        plan, table = self._plan(shard, committed)
        rows, cut = self._rows(shard, table, plan) if plan.upsert else ([], 0)
        return _ShardLoad(plan, rows, cut, self.dataset.describe_object(layout.commit_key(shard)).crc32c)

    def _plan(self, shard: int, committed: frozenset[int]) -> tuple[ShardPlan, pa.Table]:
        marker = self.dataset.marker(shard)
        if marker is None:
            raise CorruptStore(f"{self.dataset.url}/{layout.commit_key(shard)} is missing")
        table, _ = self.dataset.documents(shard, columns=_COLUMNS)
        ids = [str(id_) for id_ in table.column("id").to_pylist()]
        versions = table.column("version").to_numpy().tolist()
        plan = plan_shard(
            shard,
            ids=ids,
            versions=versions,
            statuses=marker.statuses,
            known=self._require_index().versions(list(dict.fromkeys(ids))),
            status_of=status_reader(self.dataset, committed),
        )
        return plan, table

    def _rows(self, shard: int, table: pa.Table, plan: ShardPlan) -> tuple[list[dict[str, Any]], int]:
        vectors = np.asarray(self.dataset.vectors(shard), dtype=np.float32)
        _require_finite(vectors, plan.upsert, name=f"{self.dataset.url}/{layout.vectors_key(shard)}")
        rows, cut = [], 0
        for number, record in zip(plan.upsert, table.take(list(plan.upsert)).to_pylist(), strict=True):
            text, shortened = cut_text(record["text"] or "")
            metadata, dropped = parse_metadata(record["metadata"])
            cut += shortened or dropped
            rows.append({**record, "text": text, "metadata": metadata, "vector": vectors[number]})
        return rows, cut

    def _require_ledger(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("the loader is not prepared")
        return self._ledger

    def _require_index(self) -> DatasetIndex:
        if self._index is None:
            raise RuntimeError("the loader is not prepared")
        return self._index


def require_collection(state: CollectionState, wanted: CollectionDescription) -> None:
    """Raises ConfigurationError, with the difference, when the dataset of `wanted` does not belong into the collection."""
    if state.description is None:
        raise ConfigurationError(
            f"collection {state.name} exists, and embedmill did not make it: choose another one with --collection NAME"
        )
    state.description.require(wanted, collection=state.name)


def _ledger_target(target: MilvusTarget, state: CollectionState) -> LedgerTarget:
    address = target.address
    name = f"{address.name}-{state.name[:60]}-{address.fingerprint(state.name, state.identity)}"
    return LedgerTarget(name=name, uri=address.shown, collection=state.name, identity=state.identity)


def _require_finite(vectors: NDArray[np.float32], rows: Sequence[int], *, name: str) -> None:
    finite = np.isfinite(vectors[list(rows)]).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise CorruptStore(f"row {row} of {name} is not finite, and its marker says that it is embedded")


async def _wait_for_announcement(queue: Queue, after: str, stop: anyio.Event, *, at_most_s: float) -> str:
    deadline = time.monotonic() + at_most_s
    while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
        seen = await queue.wait_for_announcement(after, timeout_s=min(1.0, left))
        if seen != after:
            return seen
    return after
