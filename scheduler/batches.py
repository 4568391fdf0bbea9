"""Batches of the inbox between their being read and their being in the log.

A batch is given back when all of its documents, and of those before it, are in the log. The log knows it by its key, also
when none of its documents made a row: what is newer than a row must not come again before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from embedmill.dataset.passages import BatchPosition
from embedmill.documents import Cursor
from embedmill.messages import Task

from .log_view import LogView
from .open_shard import OpenShard
from .readings import Batch, Reading


@dataclass(frozen=True, slots=True)
class Closed:
    """Batches of which everything is in the log, or needs not be, and the shards that were closed for it.

    These are one or none; more when another admitter was faster, and what was left did not fit into one.
    """

    tasks: list[Task]
    batches: list[Batch]


class OpenBatches:
    """The batches that are not given back yet, in the order of their stream."""

    def __init__(self, log: LogView) -> None:
        self._log = log
        self._readings: list[Reading] = []
        self._by_key: dict[str, Reading] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    @property
    def keys(self) -> list[str]:
        return [reading.key for reading in self._readings]

    def add(self, batch: Batch) -> tuple[Reading, Reading | None]:
        """Its reading, and the last one that is still open under the same key."""
        earlier = self._by_key.get(batch.key)
        reading = Reading(batch.key, "", Cursor(), batch)
        self._readings.append(reading)
        self._by_key[batch.key] = reading
        return reading, earlier

    def positions(self, shard: OpenShard) -> Iterator[BatchPosition]:
        """What the log is to know of batches when this shard is closed, also of those without a row between the others."""
        if not self._readings:
            return
        rows = shard.rows_by_reading()
        first_row = 0
        for reading in self._readings:
            if reading.cursor.record and not self._log.is_logged(reading, reading.cursor):
                yield BatchPosition(reading.key, reading.cursor.record, first_row)
            first_row += rows[reading]

    def give_back(self, tasks: list[Task]) -> Closed:
        """Those that were read to their end, once nothing of them waits; tasks: the shards that were written for it."""
        complete = [reading for reading in self._readings if reading.complete]
        if not tasks:
            self._log.keep_rowless(
                [(r.key, r.cursor.record) for r in complete if r.cursor.record and not self._log.is_logged(r, r.cursor)]
            )
        self._readings = [reading for reading in self._readings if not reading.complete]
        self._by_key = {reading.key: reading for reading in self._readings}
        return Closed(tasks, [reading.batch for reading in complete if reading.batch is not None])
