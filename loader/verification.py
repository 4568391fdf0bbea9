"""Does the collection hold exactly what the dataset says? Every id by its version, and a sample of vectors bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.deciding import Place, StatusOf, newest_decided, status_reader
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import EMBEDDED
from embedmill.errors import CorruptStore

from .description import CollectionDescription, default_collection
from .reading import Look, ShardReader
from .service import require_collection
from .target import MilvusTarget

SAMPLE_ROWS = 200
_SAMPLE_SHARDS = 16
_SHOWN_IDS = 5


@dataclass(frozen=True, slots=True)
class TargetReport:
    """expected, found: ids; missing: expected and not there; extra: there and not expected; stale: there with another
    version; different: sampled vectors that are not the dataset's, bit for bit. shards: those that repair what is wrong."""

    collection: str
    expected: int
    found: int
    missing: tuple[str, ...]
    extra_ids: tuple[str, ...]
    stale: tuple[str, ...]
    sampled: int
    different: tuple[str, ...]
    shards: frozenset[int]

    @property
    def ok(self) -> bool:
        return not (self.missing or self.extra_ids or self.stale or self.different)

    def as_dict(self) -> dict[str, object]:
        """Counts, and the first few ids of each kind."""
        kinds = {"missing": self.missing, "extra": self.extra_ids, "stale": self.stale, "different": self.different}
        return {
            "collection": self.collection,
            "ok": self.ok,
            "expected": self.expected,
            "found": self.found,
            "sampled": self.sampled,
            **{kind: len(ids) for kind, ids in kinds.items()},
            "examples": {kind: list(ids[:_SHOWN_IDS]) for kind, ids in kinds.items() if ids},
        }


async def verify_target(dataset: Dataset, target: MilvusTarget) -> TargetReport:
    """Compare with the newest committed version of every id. Reads only, but for building the index to read by.

    A collection that does not exist misses everything. Shards may be compacted and documents erased meanwhile. Raises
    ConfigurationError when it holds something else.
    """
    await target.connect(must_exist=True)
    target.collection = target.collection or default_collection(dataset.url)
    state = await target.describe(target.collection)
    if state is not None:
        require_collection(state, CollectionDescription.of_dataset(dataset.info))
        await target.make_searchable()
    index = await to_thread.run_sync(dataset.open_index)
    try:
        reader = ShardReader(dataset, index)
        while True:
            look, expected = await to_thread.run_sync(_expected, dataset, index, reader)
            if state is None:
                return _report(target.collection, expected, {}, sampled=0, different=())
            report = await _compare(dataset, target, target.collection, expected, reader, look)
            if report is not None:
                return report
    finally:
        index.close()


async def _compare(
    dataset: Dataset,
    target: MilvusTarget,
    collection: str,
    expected: Mapping[str, Place],
    reader: ShardReader,
    look: Look,
) -> TargetReport | None:
    """None when something may be wrong only since a shard was retired after the look."""
    found = await target.versions()
    equal = [id_ for id_, place in expected.items() if found.get(id_) == place[0]]
    sample = choose_sample(equal, expected)
    try:
        different = await _differing(dataset, target, {id_: expected[id_] for id_ in sample})
    except CorruptStore:
        if await to_thread.run_sync(reader.holds, look):
            raise
        return None
    report = _report(collection, expected, found, sampled=len(sample), different=different)
    return report if report.ok or await to_thread.run_sync(reader.holds, look) else None


def choose_sample(ids: Sequence[str], places: Mapping[str, Place], *, seed: int = 0) -> list[str]:
    """Up to SAMPLE_ROWS ids out of a few random shards, so that few shards are read."""
    chance = random.Random(seed)
    shards = sorted({places[id_][1] for id_ in ids})
    chosen = set(chance.sample(shards, min(_SAMPLE_SHARDS, len(shards))))
    candidates = sorted(id_ for id_ in ids if places[id_][1] in chosen)
    return chance.sample(candidates, min(SAMPLE_ROWS, len(candidates)))


def _expected(dataset: Dataset, index: DatasetIndex, reader: ShardReader) -> tuple[Look, dict[str, Place]]:
    while True:
        look = reader.look()
        living = dict(_living(index, status_reader(dataset, look.committed)))
        if reader.holds(look):
            return look, living


def _living(index: DatasetIndex, status_of: StatusOf) -> list[tuple[str, Place]]:
    """The deciding place of every id that is not deleted."""
    living: list[tuple[str, Place]] = []
    undecided: list[str] = []
    for id_, version, shard, row in index.newest_rows():
        place = newest_decided([(version, shard, row)], status_of)
        if place is None:
            undecided.append(id_)
        elif status_of(shard, row) == EMBEDDED:
            living.append((id_, place))
    for id_, places in index.versions(undecided).items():
        place = newest_decided(places, status_of)
        if place is not None and status_of(place[1], place[2]) == EMBEDDED:
            living.append((id_, place))
    return living


async def _differing(dataset: Dataset, target: MilvusTarget, sample: Mapping[str, Place]) -> tuple[str, ...]:
    stored = await target.vectors(list(sample))
    by_shard: dict[int, list[str]] = {}
    for id_, (_, shard, _) in sample.items():
        by_shard.setdefault(shard, []).append(id_)
    different: list[str] = []
    for shard, ids in sorted(by_shard.items()):
        vectors = await to_thread.run_sync(dataset.vectors, shard)
        for id_ in ids:
            ours = np.asarray(vectors[sample[id_][2]], dtype=np.float32)
            theirs = stored.get(id_)
            if theirs is None or theirs.tobytes() != ours.tobytes():
                different.append(id_)
    return tuple(different)


def _report(
    collection: str,
    expected: Mapping[str, Place],
    found: Mapping[str, int],
    *,
    sampled: int,
    different: tuple[str, ...],
) -> TargetReport:
    missing = tuple(id_ for id_ in expected if id_ not in found)
    stale = tuple(id_ for id_, place in expected.items() if id_ in found and found[id_] != place[0])
    return TargetReport(
        collection=collection,
        expected=len(expected),
        found=len(found),
        missing=missing,
        extra_ids=tuple(id_ for id_ in found if id_ not in expected),
        stale=stale,
        sampled=sampled,
        different=different,
        shards=frozenset(expected[id_][1] for id_ in (*missing, *stale, *different)),
    )
