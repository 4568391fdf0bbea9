"""Datasets with committed shards, made by hand: any status for any row, replacements and retirements, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, describe
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED, DatasetInfo, Failure, Marker, Retirement
from embedmill.dataset.passages import ShardOrigin, encode_passages, passages_table
from embedmill.dataset.store import open_store
from embedmill.embedder import EmbedderSpec
from tests.datasets import passage

DIMENSIONS = 3


@dataclass(frozen=True)
class Row:
    id: str
    version: int = 1
    status: int = EMBEDDED

    @property
    def text(self) -> str:
        return "" if self.status == DELETED else f"{self.id} v{self.version}"

    @property
    def vector(self) -> NDArray[np.float32]:
        """A vector that is this (id, version)'s alone."""
        return np.array([hash_of(self.id), self.version, 0.5], dtype=np.float32)


def hash_of(id_: str) -> float:
    return float(sum(ord(letter) * 7**place for place, letter in enumerate(id_)) % 1009)


def rows_of(ids: str, version: int = 1, status: int = EMBEDDED) -> list[Row]:
    """A row for each letter."""
    return [Row(id_, version, status) for id_ in ids]


@dataclass
class Made:
    """A dataset that a test writes. log: rows of each shard that was admitted."""

    dataset: Dataset
    log: list[list[Row]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.dataset.url

    def add(self, rows: Sequence[Row] | str, *, origin: ShardOrigin | None = None, commit: bool = True) -> int:
        """Admit a shard, and commit it."""
        shard = len(self.log)
        self.log.append(rows_of(rows) if isinstance(rows, str) else list(rows))
        passages = [
            passage(row.id, row.text, version=row.version, deleted=row.status == DELETED, metadata=f'{{"n":{place}}}')
            for place, row in enumerate(self.log[shard])
        ]
        self.dataset.append_passages(shard, passages, origin=origin or ShardOrigin(shard, "main"))
        if commit:
            self.commit(shard, replaces=origin.replaces if origin else ())
        return shard

    def commit(self, shard: int, *, replaces: tuple[int, ...] = ()) -> None:
        rows = self.log[shard]
        statuses = np.array([row.status for row in rows], dtype=np.uint8)
        key = layout.documents_key(shard)
        objects = {key: describe(self.dataset.store.read(key))}
        if (statuses == EMBEDDED).any():
            values = np.array([np.resize(row.vector, self.dataset.info.dimensions) for row in rows])
            # What a worker stores for such rows means nothing.
            values[statuses != EMBEDDED] = 77
            objects[layout.vectors_key(shard)] = self.dataset.create_vectors(shard, values)
        failures = tuple(
            Failure(place, row.id, row.version, "gate", "no") for place, row in enumerate(rows) if row.status == FAILED
        )
        fingerprint = self.dataset.info.embedder.fingerprint
        self.dataset.commit(
            Marker(
                shard, statuses, fingerprint, "a0", "w0", "2026", failures=failures, replaces=replaces, objects=objects
            )
        )

    def replace(self, shards: Sequence[int], places: Sequence[tuple[int, int]], *, retire: bool = True) -> int:
        """Write a shard of the rows at these places in place of some shards."""
        carried = dict(enumerate(places))
        origin = ShardOrigin(len(self.log), "main", carried=carried, replaces=tuple(shards))
        replacement = self.add([self.log[shard][row] for shard, row in places], origin=origin)
        if retire:
            self.retire(shards, [replacement])
        return replacement

    def retire(self, shards: Sequence[int], replacements: Sequence[int]) -> None:
        number = len(self.dataset.store.names(layout.RETIREMENTS_FOLDER))
        record = Retirement(tuple(shards), tuple(replacements), "compaction", "2026-01-01T00:00:00+00:00")
        self.dataset.store.create(layout.retirement_key(number), record.to_bytes())

    def erase(self, shard: int) -> None:
        """Delete what a shard stores, as is done some time after it was retired. Its documents stay, empty."""
        for key in (layout.vectors_key(shard), layout.commit_key(shard)):
            self.dataset.store.delete(key)
        key = layout.documents_key(shard)
        origin = replace(self.dataset.origin(shard), carried={}, erased=True)
        empty = encode_passages(passages_table([], origin=origin))
        self.dataset.store.swap(key, empty, expected=self.dataset.store.read(key))


def made_dataset(
    folder: Path | str,
    *,
    dtype: str = "float32",
    shard_rows: int = 8,
    chunk_rows: int = 4,
    dimensions: int = DIMENSIONS,
) -> Made:
    spec = EmbedderSpec(model=f"null/{dimensions}", dimensions=dimensions, revision="1")
    info = DatasetInfo("d0", "2026-01-01T00:00:00+00:00", spec, dtype, shard_rows=shard_rows, chunk_rows=chunk_rows)
    open_store(str(folder)).create(layout.DATASET_KEY, info.to_bytes())
    return Made(Dataset.open_or_create(str(folder), embedder=spec, dtype=dtype))


def newest_rows(log: Sequence[Sequence[Row]], live: Sequence[int]) -> list[tuple[int, int, Row]]:
    """(shard, row, Row) of all that counts, by the rule itself."""
    decided = [row for shard in live for row in log[shard] if row.status in (EMBEDDED, DELETED)]
    best = {row.id: max(other.version for other in decided if other.id == row.id) for row in decided}
    return [
        (shard, place, row)
        for shard in sorted(live)
        for place, row in enumerate(log[shard])
        if row.status == EMBEDDED and row.version == best[row.id]
    ]
