"""What the log says of the records at hand: versions, passages, how far each reading has come, cancelled jobs.

It is looked up for many records at once and forgotten with the next look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex, Known
from embedmill.dataset.layout import CANCELLED
from embedmill.documents import Cursor, Reject, SourceDocument

from .readings import Reading

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Newest:
    """The highest version of an id, in the log (at `place`: shard, row) or in the open shard (None)."""

    version: int
    text_hash: bytes
    metadata_hash: bytes
    group: str | None
    deleted: bool
    place: tuple[int, int] | None
    reading_key: str


class LogView:
    """The log as the last `look_up` found it, for the records and batches that were named to it."""

    def __init__(self, dataset: Dataset, index: DatasetIndex) -> None:
        self._dataset = dataset
        self._index = index
        self._known: dict[str, Known] = {}
        self._members: dict[str, set[str]] = {}
        self._logged: dict[str, Cursor | None] = {}
        self._jobs_cancelled: dict[str, bool] = {}
        self._batch_keys: dict[int, frozenset[str]] = {}

    def look_up(self, records: Iterable[SourceDocument | Reject], *, keys: Sequence[str] = ()) -> None:
        """Read, in few queries, everything that the log says of these records and of the batches with these keys.

        What other admitters have written is taken in first: a message that is gone from the inbox is in the log by then.
        """
        self._dataset.catch_up(self._index)
        documents = [record for record in records if isinstance(record, SourceDocument)]
        groups = dict.fromkeys(r.group if r.group is not None else r.id for r in documents if r.last)
        self._members = self._index.members(list(groups))
        ids = dict.fromkeys(record.id for record in documents)
        ids.update(groups)
        ids.update(dict.fromkeys(id_ for members in self._members.values() for id_ in members))
        self._known = self._index.newest(list(ids))
        # Read again after the rows, never before: a row of a push must not be newer than what is known of its cursor.
        self._logged.clear()
        if keys:
            logged = self._index.batches(keys)
            self._logged.update((key, _batch_cursor(logged.get(key))) for key in keys)
        self._jobs_cancelled.clear()
        self._batch_keys.clear()

    def newest(self, id_: str) -> Newest | None:
        """The highest version of an id in the log."""
        known = self._known.get(id_)
        if known is None:
            return None
        place = (known.shard, known.row)
        return Newest(
            known.version, known.text_hash, known.metadata_hash, known.group, known.deleted, place, known.push_key
        )

    def members(self, group: str) -> set[str] | frozenset[str]:
        """The ids of the passages that a document has had, in any of its versions."""
        return self._members.get(group, _NONE)

    def is_logged(self, reading: Reading, cursor: Cursor) -> bool:
        """True when the log has read this far already: another admitter was at it too, or an earlier one."""
        if reading.key not in self._logged:
            if reading.batch is None:
                self._logged[reading.key] = self._index.cursor(reading.key)
            else:
                self._logged[reading.key] = _batch_cursor(self._index.batches([reading.key]).get(reading.key))
        logged = self._logged[reading.key]
        if logged is None:
            return False
        return cursor.record <= logged.record if reading.batch is not None else cursor <= logged

    def has_given_up(self, push_key: str) -> bool:
        """True when rows of this source, read on whatever occasion, were cancelled and are still the newest of their ids."""
        for shard in self._dataset.committed():
            marker = self._dataset.marker(shard)
            if marker is None or not (marker.statuses == CANCELLED).any():
                continue
            # Where the rows of a replacement came from stands in what it replaces.
            origins = map(self._dataset.origin, self._dataset.lineage(shard))
            sources = [source for origin in origins for source in origin.sources]
            if not any(source.push_key.partition(".")[0] == push_key for source in sources):
                continue
            table, _ = self._dataset.documents(shard, columns=["id"])
            ids = [str(id_) for id_ in table["id"].to_pylist()]
            given_up = {ids[row]: int(row) for row in np.flatnonzero(marker.statuses == CANCELLED)}
            newest = self._index.newest(list(given_up))
            if any((newest[id_].shard, newest[id_].row) == (shard, row) for id_, row in given_up.items()):
                return True
        return False

    def names(self, shard: int, batch_key: str) -> bool:
        """True when a shard of the log has rows of this batch, or stands behind it."""
        if shard not in self._batch_keys:
            _, origin = self._dataset.documents(shard, columns=["id"])
            self._batch_keys[shard] = frozenset(batch.key for batch in origin.batches)
        return batch_key in self._batch_keys[shard]

    def keep_rowless(self, batches: Sequence[tuple[str, int]]) -> None:
        """Make the log know batches, as key and record, that no shard will name."""
        if batches:
            self._dataset.keep_rowless(batches)
            self._dataset.catch_up(self._index)

    def is_cancelled(self, place: tuple[int, int] | None) -> bool:
        """True when the row was given up with its job, or will be: the same text is admitted again then."""
        if place is None:
            return False
        marker = self._dataset.marker(place[0])
        if marker is not None:
            return bool(marker.statuses[place[1]] == CANCELLED)
        job = self._dataset.admission(place[0]).job
        if job not in self._jobs_cancelled:
            record = self._dataset.job(job)
            self._jobs_cancelled[job] = record is not None and record.state == "cancelled"
        return self._jobs_cancelled[job]

    def is_cancelled_in_part(self, shard: int) -> bool:
        """True when any row of the shard was given up, or will be."""
        marker = self._dataset.marker(shard)
        return self.is_cancelled((shard, 0)) if marker is None else bool((marker.statuses == CANCELLED).any())


def _batch_cursor(record: int | None) -> Cursor | None:
    return None if record is None else Cursor(record=record)
