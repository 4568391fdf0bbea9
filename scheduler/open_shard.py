"""The open shard: rows that wait for their shard to be closed, and what is newest among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from embedmill.dataset.passages import Passage, SourcePosition

from .log_view import Newest
from .readings import Reading

_NONE: frozenset[str] = frozenset()


@dataclass(slots=True)
class Waiting:
    """A passage in the open shard, where it came from, and as what it was counted.

    carried: the row (shard, row) whose vector it takes over, since the text is the same.
    """

    reading: Reading
    passage: Passage
    carried: tuple[int, int] | None
    text_bytes: int
    counted: str


class OpenShard:
    """Rows in their order; row r of the shard will be `rows[r]`."""

    def __init__(self) -> None:
        self.rows: list[Waiting] = []
        self.text_bytes = 0
        self._by_id: dict[str, Waiting] = {}
        self._groups: dict[str, set[str]] = {}

    def put(self, waiting: Waiting) -> None:
        passage = waiting.passage
        self.rows.append(waiting)
        self.text_bytes += waiting.text_bytes
        self._by_id[passage.id] = waiting
        if passage.group is not None:
            self._groups.setdefault(passage.group, set()).add(passage.id)

    def newest(self, id_: str) -> Newest | None:
        """The highest version of an id that waits here."""
        waiting = self._by_id.get(id_)
        if waiting is None:
            return None
        p = waiting.passage
        return Newest(p.version, p.text_hash, p.metadata_hash, p.group, p.deleted, None, waiting.reading.key)

    def members(self, group: str) -> set[str] | frozenset[str]:
        """The ids of the passages of a document that wait here."""
        return self._groups.get(group, _NONE)

    def holds(self, ids: Iterable[str]) -> bool:
        """True when it has one of these ids, or passages of one of these documents."""
        return any(id_ in self._by_id or id_ in self._groups for id_ in ids)

    def sources(self) -> list[SourcePosition]:
        """The sources that its rows came from, in runs of rows, and how far each was read."""
        found: list[SourcePosition] = []
        for row, waiting in enumerate(self.rows):
            reading = waiting.reading
            if reading.batch is None and (not found or found[-1].push_key != reading.key):
                found.append(SourcePosition(reading.key, reading.name, reading.cursor, row))
        return found

    def carried(self) -> dict[int, tuple[int, int]]:
        """By row, where its vector is taken over from."""
        return {row: waiting.carried for row, waiting in enumerate(self.rows) if waiting.carried is not None}

    def rows_by_reading(self) -> Counter[Reading]:
        return Counter(waiting.reading for waiting in self.rows)

    def clear(self) -> None:
        self.rows, self.text_bytes = [], 0
        self._by_id, self._groups = {}, {}
