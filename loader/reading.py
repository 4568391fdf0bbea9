"""What of a dataset counts at one moment, and its shards read and decided by that.

Others compact and erase meanwhile, and the index moves on with them. So whatever was decided counts only when nothing was
retired since the look that it was decided by; else it is to be decided anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, describe
from embedmill.dataset.deciding import newest_decided, status_reader
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import Marker
from embedmill.errors import CorruptStore

from .rows import ShardPlan, cut_text, parse_metadata, plan_shard

_COLUMNS = ("id", "text", "metadata", "version")
_LOOKUP_IDS = 16_384


@dataclass(frozen=True, slots=True)
class Look:
    """The live committed shards, those that were retired, and after how many retirements. The index had all rows of them."""

    committed: frozenset[int]
    retired: frozenset[int]
    retirements: int


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """A shard, read and decided. ids: of all of its rows; cut: rows whose text or metadata was shortened."""

    ids: tuple[str, ...]
    plan: ShardPlan
    rows: list[dict[str, Any]]
    cut: int
    marker_crc32c: str


class ShardReader:
    """Reads the shards of a dataset by its index. Blocking."""

    def __init__(self, dataset: Dataset, index: DatasetIndex) -> None:
        self._dataset = dataset
        self._index = index

    def close(self) -> None:
        """Let go of the index."""
        self._index.close()

    def look(self) -> Look:
        while True:
            retirements = len(self._dataset.retirements())
            committed, retired = frozenset(self._dataset.committed()), self._dataset.retired()
            self._dataset.catch_up(self._index)
            look = Look(committed, retired, retirements)
            if self.holds(look):
                return look

    def holds(self, look: Look) -> bool:
        """Nothing was retired since."""
        return len(self._dataset.retirements()) == look.retirements

    def marker(self, shard: int) -> tuple[Marker, str] | None:
        """A shard's marker as it stands now, and its checksum; None when it is gone."""
        self._dataset.forget(shard)
        key = layout.commit_key(shard)
        data = self._dataset.store.read_or_none(key)
        return None if data is None else (Marker.from_bytes(data, name=self._name(key)), describe(data).crc32c)

    def read(self, shard: int, look: Look) -> ShardLoad | None:
        """A committed shard; None when it was retired or put aside, or anything else was retired, since the look."""
        found = self.marker(shard)
        if found is None:
            return None
        try:
            load = self._read(shard, look, *found)
        except CorruptStore:
            now = self.marker(shard)
            if self.holds(look) and now is not None and now[1] == found[1]:
                raise
            return None
        return load if self.holds(look) else None

    def ids(self, shard: int) -> tuple[str, ...] | None:
        """The ids of a shard's rows; None when they were erased."""
        table, origin = self._dataset.documents(shard, columns=["id"])
        return None if origin.erased else tuple(map(str, table.column("id").to_pylist()))

    def left_behind(self, versions: Mapping[str, int | None], look: Look) -> tuple[list[str], set[int]] | None:
        """Of ids that are in a target, in a version (None: in any), which the dataset does not know at all, and which shards
        decide those that are there otherwise; None when that does not count any more."""
        status_of = status_reader(self._dataset, look.committed)
        ids, unknown, deciding = list(versions), [], set()
        for start in range(0, len(ids), _LOOKUP_IDS):
            block = ids[start : start + _LOOKUP_IDS]
            known = self._index.versions(block)
            unknown += [id_ for id_ in block if id_ not in known]
            for id_, places in known.items():
                winner = newest_decided(places, status_of)
                if winner is not None and versions[id_] != winner[0]:
                    deciding.add(winner[1])
        return (unknown, deciding) if self.holds(look) else None

    def moved_from(self, shards: Iterable[int]) -> frozenset[int]:
        """The shards that the rows of replacements stood in before."""
        return frozenset(
            old
            for shard in shards
            if self._dataset.admission(shard).replaces
            for old, _ in self._dataset.origin(shard).carried.values()
        )

    def _read(self, shard: int, look: Look, marker: Marker, marker_crc32c: str) -> ShardLoad:
        table, _ = self._dataset.documents(shard, columns=_COLUMNS)
        ids = tuple(map(str, table.column("id").to_pylist()))
        plan = plan_shard(
            shard,
            ids=ids,
            versions=table.column("version").to_numpy().tolist(),
            statuses=marker.statuses,
            known=self._index.versions(list(dict.fromkeys(ids))),
            status_of=status_reader(self._dataset, look.committed),
        )
        rows, cut = self._rows(shard, table, plan) if plan.upsert else ([], 0)
        return ShardLoad(ids, plan, rows, cut, marker_crc32c)

    def _rows(self, shard: int, table: pa.Table, plan: ShardPlan) -> tuple[list[dict[str, Any]], int]:
        vectors = np.asarray(self._dataset.vectors(shard), dtype=np.float32)
        _require_finite(vectors, plan.upsert, name=self._name(layout.vectors_key(shard)))
        rows, cut = [], 0
        for number, record in zip(plan.upsert, table.take(list(plan.upsert)).to_pylist(), strict=True):
            text, shortened = cut_text(record["text"] or "")
            metadata, dropped = parse_metadata(record["metadata"])
            cut += shortened or dropped
            rows.append({**record, "text": text, "metadata": metadata, "vector": vectors[number]})
        return rows, cut

    def _name(self, key: str) -> str:
        return f"{self._dataset.url}/{key}"


def _require_finite(vectors: NDArray[np.float32], rows: Sequence[int], *, name: str) -> None:
    finite = np.isfinite(vectors[list(rows)]).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise CorruptStore(f"row {row} of {name} is not finite, and its marker says that it is embedded")
