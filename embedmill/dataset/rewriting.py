"""Committed rows written anew into other shards, and the switch: how compaction and erasure change what never changes.

1. Replacements are appended to the log, with the old place of every row (`carried`); their vectors and markers follow. They
   do not count yet.
2. One retirement object switches from the old shards to them.
3. Later, what the old shards stored is deleted. Their documents stay in the log as empty, so that it stays dense.

Dying anywhere before the switch leaves replacements that never count; after it, at most something to delete. Blocking.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import CorruptStore, ObjectChanged, ObjectExists
from ..failpoints import failpoint
from . import layout
from .dataset import DAMAGED_FOLDER, Dataset, describe, now_iso
from .dead_letters import FailedRow, drop_letters, dropped_places
from .deciding import newest_decided, status_reader
from .index import DatasetIndex
from .layout import DELETED, EMBEDDED, Marker, Retirement, Window
from .passages import Passage, ShardOrigin, decode_passages, encode_passages, passages_table

MAX_TEXT_BYTES = 64 * 1024 * 1024
_WRITER = "compaction"


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """A committed shard, read and verified. marker_crc32c: of the marker as it is stored."""

    marker: Marker
    marker_crc32c: str
    origin: ShardOrigin
    passages: tuple[Passage, ...]
    vectors: NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """retired, replacements: shards; rows: of the replacements; dropped: accepted (id, version) that are in none of them."""

    retired: tuple[int, ...]
    replacements: tuple[int, ...]
    rows: int
    dropped: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows (n,) of a shard that are kept, and nothing of the others; they become rows `first` to `first + n` of a
    replacement. vectors: (n, dimensions)."""

    marker: Marker
    retries: Mapping[int, tuple[int, int]]
    rows: NDArray[np.int64]
    passages: list[Passage]
    vectors: NDArray[np.floating]
    first: int

    @property
    def number(self) -> int:
        return self.marker.shard

    def places(self) -> dict[int, int]:
        """Old row to new row."""
        return {int(row): self.first + at for at, row in enumerate(self.rows)}

    def windows(self) -> Iterator[Window]:
        for window in self.marker.windows:
            first, end = np.searchsorted(self.rows, (window.first_row, window.first_row + window.rows))
            if end > first:
                yield Window(self.first + int(first), int(end - first))


def read_shard(dataset: Dataset, shard: int) -> CommittedShard:
    """Every checksum verified. Raises CorruptStore, naming the object."""
    marker = dataset.marker(shard)
    if marker is None:
        raise CorruptStore(f"{dataset.url}/{layout.commit_key(shard)} is missing")
    key = layout.documents_key(shard)
    name = f"{dataset.url}/{key}"
    data = dataset.store.read(key)
    table, origin = decode_passages(data, name=name)
    if marker.objects.get(key) != describe(data) or table.num_rows != marker.rows:
        raise CorruptStore(f"{name} is not what was committed")
    crc32c = dataset.describe_object(layout.commit_key(shard)).crc32c
    return CommittedShard(marker, crc32c, origin, tuple(_passages(table)), dataset.vectors(shard))


class Rewriting:
    """One rewriting of some shards of one job. `add` each of them, in order, then `switch`. At most one replacement and one
    shard are in memory."""

    def __init__(self, dataset: Dataset, index: DatasetIndex, shards: Sequence[int], *, job: str, reason: str) -> None:
        self._dataset = dataset
        self._index = index
        self._shards = tuple(shards)
        self._job = job
        self._reason = reason
        self._leaving = {*shards, *dataset.retired()}
        self._replaced: dict[int, str] = {}
        self._open: list[_Piece] = []
        self._rows = 0
        self._text_bytes = 0
        self._billed_tokens = 0
        self._requests = 0
        self._replacements: list[int] = []
        self._written = 0
        self._dropped = 0

    def add(self, shard: CommittedShard, keep: NDArray[np.bool_], *, retried: Collection[tuple[int, int]]) -> None:
        """Take over the rows of a shard for which `keep` (rows,) says so, together: what was embedded together stays so.

        retried: failures that a later row tries again.
        """
        self._billed_tokens += shard.marker.billed_tokens
        self._requests += shard.marker.requests
        self._replaced[shard.marker.shard] = shard.marker_crc32c
        for row in map(int, np.flatnonzero(~keep)):
            self._dropped += self._counts_as_dropped((shard.marker.shard, row), shard.origin.retries.get(row), retried)
        rows = np.flatnonzero(keep)
        if not len(rows):
            return
        text_bytes = sum(len(shard.passages[row].text) for row in rows)
        is_too_much = self._rows + len(rows) > self._dataset.info.shard_rows
        if self._open and (is_too_much or self._text_bytes + text_bytes > MAX_TEXT_BYTES):
            self._write()
        passages = [shard.passages[row] for row in rows]
        # Indexing copies: the shard itself can go.
        self._open.append(_Piece(shard.marker, shard.origin.retries, rows, passages, shard.vectors[rows], self._rows))
        self._rows += len(rows)
        self._text_bytes += text_bytes

    def switch(self) -> Rewritten | None:
        """Put the replacements in place of the shards; None, and nothing has changed, when one of those does not count any
        more."""
        if self._open:
            self._write()
        self._drop_again()
        failpoint("compaction.before_switch")
        retirement = Retirement(
            self._shards, tuple(self._replacements), self._reason, now_iso(), self._job, self._dropped
        )
        if not self._dataset.retire(retirement):
            return None
        failpoint("compaction.after_switch")
        self._dataset.catch_up(self._index)
        return Rewritten(self._shards, tuple(self._replacements), self._written, self._dropped)

    def _drop_again(self) -> None:
        """Failures that somebody has acknowledged are acknowledged at their new places."""
        dropped = dropped_places(self._dataset)
        drop_letters(
            self._dataset,
            [
                FailedRow(shard, failure, "dropped")
                for shard in self._replacements
                if (marker := self._dataset.marker(shard)) is not None and marker.failures
                for carried in [self._dataset.origin(shard).carried]
                for failure in marker.failures
                if carried[failure.row] in dropped
            ],
        )

    def _counts_as_dropped(
        self, place: tuple[int, int], retry: tuple[int, int] | None, retried: Collection[tuple[int, int]]
    ) -> int:
        """0 where another row goes on standing for the same (id, version): who tries it again, or what was tried again."""
        stands_elsewhere = retry is not None and retry[0] not in self._leaving
        return int(place not in retried and not stands_elsewhere)

    def _write(self) -> None:
        """Append and commit a replacement of the rows at hand."""
        pieces, self._open = self._open, []
        self._rows = self._text_bytes = 0
        shard, origin = self._append(pieces)
        failpoint("compaction.after_documents")
        key = layout.documents_key(shard)
        objects = {key: self._dataset.describe_object(key)}
        statuses = np.concatenate([piece.marker.statuses[piece.rows] for piece in pieces])
        if (statuses == EMBEDDED).any():
            vectors = np.concatenate([piece.vectors for piece in pieces])
            objects[layout.vectors_key(shard)] = self._dataset.create_vectors(shard, vectors)
        failpoint("compaction.after_vectors")
        self._dataset.commit(
            Marker(
                shard=shard,
                statuses=statuses,
                fingerprint=self._dataset.info.embedder.fingerprint,
                attempt=self._reason,
                worker=_WRITER,
                committed_at=now_iso(),
                billed_tokens=self._billed_tokens,
                requests=self._requests,
                failures=tuple(
                    replace(failure, row=places[failure.row])
                    for piece in pieces
                    for places in [piece.places()]
                    for failure in piece.marker.failures
                    if failure.row in places
                ),
                truncated=tuple(
                    places[row]
                    for piece in pieces
                    for places in [piece.places()]
                    for row in piece.marker.truncated
                    if row in places
                ),
                replaces=self._shards,
                replaced=dict(self._replaced),
                objects=objects,
                retries=origin.retries,
                windows=tuple(window for piece in pieces for window in piece.windows()),
            )
        )
        failpoint("compaction.after_marker")
        self._billed_tokens = self._requests = 0
        self._replacements.append(shard)
        self._written += len(statuses)

    def _append(self, pieces: Sequence[_Piece]) -> tuple[int, ShardOrigin]:
        passages = [passage for piece in pieces for passage in piece.passages]
        carried = {new: (piece.number, old) for piece in pieces for old, new in piece.places().items()}
        retries = {
            new: piece.retries[old] for piece in pieces for old, new in piece.places().items() if old in piece.retries
        }
        while True:
            shard = self._index.next_shard
            origin = ShardOrigin(shard, self._job, carried=carried, replaces=self._shards, retries=retries)
            with suppress(ObjectExists):
                self._dataset.append_passages(shard, passages, origin=origin)
                return shard, origin
            self._dataset.catch_up(self._index)


def rows_that_count(
    dataset: Dataset,
    index: DatasetIndex,
    shard: CommittedShard,
    *,
    committed: Collection[int],
    retried: Collection[tuple[int, int]],
    drops_deleted: bool,
    leaving: Collection[int],
) -> NDArray[np.bool_]:
    """(rows,): those that are overruled by nothing. leaving: shards that are being rewritten.

    A row that deletes goes when `drops_deleted`, and when no older version stands anywhere but in shards that leave, too.
    """
    status_of = status_reader(dataset, committed)
    places = index.versions([passage.id for passage in shard.passages])
    keep = np.zeros(len(shard.passages), dtype=bool)
    for row, passage in enumerate(shard.passages):
        known = places.get(passage.id, [])
        decided = newest_decided(known, status_of)
        status = int(shard.marker.statuses[row])
        if status in (EMBEDDED, DELETED):
            # By the version alone: places move.
            keep[row] = decided is None or decided[0] <= passage.version
        else:
            keep[row] = (shard.marker.shard, row) not in retried and (decided is None or decided[0] < passage.version)
        if status == DELETED and keep[row] and drops_deleted:
            keep[row] = any(older not in leaving for version, older, _ in known if version < passage.version)
    return keep


def delete_retired(dataset: Dataset, *, older_than_s: float) -> list[int]:
    """Delete what retired shards still store where the switch is so long ago that nobody reads them any more; the shards."""
    now = datetime.now(tz=UTC)
    stored = dataset.stored_markers()
    over = [
        shard
        for retirement in dataset.retirements()
        if (now - datetime.fromisoformat(retirement.created_at)).total_seconds() >= older_than_s
        for shard in retirement.retired
        if shard in stored
    ]
    for shard in over:
        erase_shard(dataset, shard)
    return over


def erase_shard(dataset: Dataset, shard: int) -> None:
    """Delete what a retired shard stores, and what repairs took out of it. Its documents stay, without rows: they say where
    reading goes on. The marker goes last, so that whoever dies in between has this done again."""
    store, key = dataset.store, layout.documents_key(shard)
    store.delete(layout.vectors_key(shard))
    store.delete_folder(layout.vectors_key(shard).rpartition("/")[0])
    failpoint("compaction.after_vectors_deleted")
    data = store.read(key)
    _, origin = decode_passages(data, name=f"{dataset.url}/{key}", columns=["version"])
    if not origin.erased:
        empty = replace(origin, retries={}, erased=True)
        with suppress(ObjectChanged):
            store.swap(key, encode_passages(passages_table([], origin=empty)), expected=data)
    failpoint("compaction.after_rows_deleted")
    folder = layout.checkpoints_folder(shard)
    for name in store.names(folder):
        store.delete(f"{folder}/{name}")
    store.delete_folder(folder)
    for stamp in store.names(DAMAGED_FOLDER):
        for aside in (layout.commit_key(shard), layout.vectors_key(shard)):
            store.delete(f"{DAMAGED_FOLDER}/{stamp}/{aside}")
    store.delete(layout.commit_key(shard))
    dataset.forget(shard)


def _passages(table: pa.Table) -> Iterator[Passage]:
    columns = ("id", "text", "metadata", "version", "text_hash", "metadata_hash", "deleted", "group")
    for values in zip(*(table.column(name).to_pylist() for name in columns), strict=True):
        yield Passage(*values)
