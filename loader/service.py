"""Committed shards into Milvus: read, decide, send, note it down.

The markers in the dataset are the rule and announcements only hints. A shard counts as loaded when the ledger has its
result, which is written after Milvus acknowledged every row (Milvus Lite: after a flush), and only if the shard still
counts then. Stopping anywhere costs at most sending some shards again, which changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.errors import ConfigurationError, TransientError
from embedmill.failpoints import afailpoint
from scheduler.queue import Queue

from .description import CollectionDescription, check_collection_name, default_collection
from .ledger import Ledger, LedgerTarget, LoadResult
from .reading import Look, ShardReader
from .target import CollectionState, MilvusTarget

if TYPE_CHECKING:
    from .verification import TargetReport

_log = logging.getLogger("embedmill.loader")
_CHECKPOINT_ROWS = 16_384
_CHECKPOINT_S = 5.0


@dataclass(slots=True)
class LoadCounts:
    """What this loader did, rows but for the shards. cut: rows whose text or metadata is longer than Milvus takes."""

    shards_loaded: int = 0
    rows_upserted: int = 0
    rows_deleted: int = 0
    rows_superseded: int = 0
    rows_skipped: int = 0
    rows_cut: int = 0


class Loader:
    """Loads one dataset into one collection. `prepare` first; an async context manager does that, and `aclose`."""

    def __init__(self, dataset: Dataset, target: MilvusTarget) -> None:
        self.dataset = dataset
        self.target = target
        self.counts = LoadCounts()
        self._lock = anyio.Lock()
        self._ledger: Ledger | None = None
        self._reader: ShardReader | None = None
        self._loaded: dict[int, str] = {}
        self._intents: set[int] = set()
        # Of the shards that this loader has begun to send: the ids that may be in the target.
        self._sent: dict[int, tuple[str, ...]] = {}

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
            if self._reader is not None:
                self._reader.close()
                self._reader = None
            await self.target.aclose()

    async def load_shard(self, shard: int) -> bool:
        """Apply one committed shard, whether or not it was before; False when it is not committed."""
        async with self._lock:
            while shard in (look := await self._look()).committed:
                result = await self._apply(shard, look)
                if result is not None and await self._checkpoint([result]):
                    return True
            return False

    async def sweep(self, stop: anyio.Event | None = None) -> int:
        """Apply every committed shard that the ledger does not have, in order; how many there were.

        With `stop` set meanwhile, ends after the shard at hand.
        """
        async with self._lock:
            swept = 0
            while True:
                look = await self._look()
                shards = sorted(look.committed - self._loaded.keys())
                swept += await self._apply_all(shards, look, stop)
                if not shards or (stop is not None and stop.is_set()):
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
        shards = report.shards | await to_thread.run_sync(self._require_reader().moved_from, report.shards)
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
        self._reader = ShardReader(self.dataset, await to_thread.run_sync(self.dataset.open_index))
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

    async def _look(self) -> Look:
        """What counts now, with everything settled that was retired while it was half there."""
        while True:
            look = await to_thread.run_sync(self._look_once)
            settled = [await self._settle(shard, look) for shard in sorted(self._intents & look.retired)]
            if all(settled):
                return look

    def _look_once(self) -> Look:
        """A shard that was put aside and committed anew counts as not loaded."""
        put_aside = self.dataset.forget_put_aside()
        look = self._require_reader().look()
        for shard in put_aside & look.committed & self._loaded.keys():
            found = self._require_reader().marker(shard)
            if found is not None and found[1] != self._loaded[shard]:
                del self._loaded[shard]
        return look

    async def _apply_all(self, shards: Sequence[int], look: Look, stop: anyio.Event | None) -> int:
        """Apply these, up to the first for which the look does not count any more; how many."""
        results: list[LoadResult] = []
        rows, since, applied = 0, time.monotonic(), 0
        for shard in shards:
            if stop is not None and stop.is_set():
                break
            result = await to_thread.run_sync(self._adopt, shard) or await self._apply(shard, look)
            if result is None:
                break
            results.append(result)
            applied += 1
            rows += result.upserted
            if rows >= _CHECKPOINT_ROWS or time.monotonic() - since > _CHECKPOINT_S:
                await self._checkpoint(results)
                results, rows, since = [], 0, time.monotonic()
        await self._checkpoint(results)
        return applied

    async def _apply(self, shard: int, look: Look) -> LoadResult | None:
        """Send one shard. Its result counts once `_checkpoint` has written it. None, with nothing sent, when the look does
        not count any more."""
        ledger = self._require_ledger()
        load = await to_thread.run_sync(self._require_reader().read, shard, look)
        if load is None:
            return None
        if shard in self._intents:
            # An earlier attempt may have sent rows that a higher version overrules by now, and a server may have taken them
            # late: whatever overrules them is applied again, after this shard.
            await to_thread.run_sync(self._apply_again, shard, load.plan.superseding)
        await afailpoint("loader.before_intent")
        await to_thread.run_sync(ledger.intend, shard)
        await afailpoint("loader.after_intent")
        self._intents.add(shard)
        self._sent[shard] = load.ids
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
        """The result of a replacement whose rows are in the collection already: all that it took over was loaded, as it was
        when it was taken over."""
        found = self._require_reader().marker(shard)
        if found is None or not found[0].replaces or shard in self._intents:
            return None
        marker, crc32c = found
        moved_from = self._require_reader().moved_from([shard])
        is_loaded = all(
            old not in self._intents and old in self._loaded and self._loaded[old] == marker.replaced.get(old)
            for old in moved_from
        )
        if not moved_from or not is_loaded:
            return None
        return LoadResult(shard, crc32c, upserted=0, deleted=0, superseded=0, skipped=0, cut=0, at=now_iso())

    async def _settle(self, shard: int, look: Look) -> bool:
        """A shard that was retired while it was half there: nobody applies it again. What is nowhere else goes, what
        overrules its rows is applied again, and the rest stands in replacements, which are applied, since it was not wholly
        loaded. False when the look does not count any more."""
        versions: Mapping[str, int | None]
        ids = self._sent.get(shard)
        if ids is None:
            ids = await to_thread.run_sync(self._require_reader().ids, shard)
        if ids is None:
            _log.info("shard %d was interrupted, and erased since: looking through the whole collection", shard)
            await self.target.make_searchable()
            versions = dict(await self.target.versions())
        else:
            versions = dict.fromkeys(ids)
        left = await to_thread.run_sync(self._require_reader().left_behind, versions, look)
        if left is None:
            return False
        unknown, deciding = left
        await self.target.delete(unknown)
        if self.target.lite:
            await self.target.flush()
        await to_thread.run_sync(self._apply_again, shard, deciding)
        await to_thread.run_sync(self._require_ledger().withdraw, shard)
        self._intents.discard(shard)
        self._sent.pop(shard, None)
        return True

    def _apply_again(self, shard: int, overruling: Set[int]) -> None:
        loaded = overruling & self._loaded.keys()
        self._require_ledger().forget(loaded)
        for other in loaded:
            del self._loaded[other]
        if loaded:
            _log.info("shard %d was interrupted: applying %s again", shard, sorted(loaded))

    async def _checkpoint(self, results: Sequence[LoadResult]) -> int:
        """Note down what was applied, but for shards that were retired meanwhile, which keep their intents; how many."""
        if not results:
            return 0
        with anyio.CancelScope(shield=True):
            if self.target.lite:
                await self.target.flush()
            await afailpoint("loader.after_flush")
            # Whoever erases rows deletes them in Milvus after the switch, which might have been before they were sent.
            retired = await to_thread.run_sync(self.dataset.retired)
            counting = [result for result in results if result.shard not in retired]
            for result in counting:
                await to_thread.run_sync(self._require_ledger().record, result)
                self._loaded[result.shard] = result.marker_crc32c
                self._intents.discard(result.shard)
                self._sent.pop(result.shard, None)
                self.counts.shards_loaded += 1
                self.counts.rows_superseded += result.superseded
                self.counts.rows_skipped += result.skipped
                self.counts.rows_cut += result.cut
        return len(counting)

    def _require_ledger(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("the loader is not prepared")
        return self._ledger

    def _require_reader(self) -> ShardReader:
        if self._reader is None:
            raise RuntimeError("the loader is not prepared")
        return self._reader


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


async def _wait_for_announcement(queue: Queue, after: str, stop: anyio.Event, *, at_most_s: float) -> str:
    deadline = time.monotonic() + at_most_s
    while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
        seen = await queue.wait_for_announcement(after, timeout_s=min(1.0, left))
        if seen != after:
            return seen
    return after
