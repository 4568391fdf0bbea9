"""Late chunking: the passages of a document are admitted together or not at all, since the vector of each knows the others.

They stand one after the other in their reading, or in readings of the inbox that follow each other. So they share a shard,
and when one of them changes, all of them are embedded again.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from embedmill.documents import Cursor, Reject, SourceDocument

from .log_view import Newest
from .readings import Gathered, Reading, with_repeats


class Gathering:
    """The document that is being read now. text_bytes: of what is held, repeats included; looked_up: the last look-up of the
    log had all passages that are held."""

    def __init__(self) -> None:
        self.held: list[Gathered] = []
        self.text_bytes = 0
        self.looked_up = True
        self._by_place: dict[tuple[str, Cursor, str], Gathered] = {}
        self._ids: set[str] = set()
        self._readings: set[Reading] = set()

    def hold(self, reading: Reading, passage: SourceDocument) -> None:
        gathered = Gathered(reading, passage, reading.cursor)
        self.held.append(gathered)
        self._by_place[reading.key, passage.cursor, passage.id] = gathered
        self._ids.add(passage.id)
        self._count(reading, passage)

    def hold_again(self, reading: Reading, record: SourceDocument | Reject) -> bool:
        """True for a passage that is held, and has come once more with its batch. It shares the fate of the held one."""
        if not isinstance(record, SourceDocument):
            return False
        gathered = self._by_place.get((reading.key, record.cursor, record.id))
        if gathered is None:
            return False
        gathered.again.append(Gathered(reading, record, reading.cursor))
        self._count(reading, record)
        return True

    def keeps(self, reading: Reading) -> bool:
        """Whether passages of this reading are held."""
        return reading in self._readings

    def holds(self, ids: Set[str]) -> bool:
        """Whether it has one of these ids, or is one of these documents."""
        return bool(self.held) and (self.held[0].passage.group in ids or not self._ids.isdisjoint(ids))

    def is_continued_by(self, record: SourceDocument | Reject) -> bool:
        """Whether a record is the next passage of the document; True when none is being read."""
        if not self.held:
            return True
        if isinstance(record, Reject) or record.group != self.held[0].passage.group:
            return False
        return record.id not in self._ids

    def _count(self, reading: Reading, passage: SourceDocument) -> None:
        self._readings.add(reading)
        self.text_bytes += len(passage.text.encode())


def reason_against_group(gathered: Sequence[Gathered], *, shard_rows: int) -> str | None:
    """Why these passages, in their order, cannot be a document."""
    group = gathered[0].passage.group
    # One row is left for a passage that the document no longer has.
    if len(gathered) >= shard_rows:
        return (
            f"document {group!r} has {len(gathered):,} passages, and with late chunking fewer than {shard_rows:,} "
            "fit together: longer passages make fewer"
        )
    for number, g in enumerate(gathered):
        if g.passage.id != f"{group}#{number}":
            return f"its passage {f'{group}#{number}'!r} did not come in its place, and late chunking needs all of {group!r}"
    return None


def refusals(gathered: Sequence[Gathered], reason: str) -> list[tuple[Reading, Reject]]:
    """All of these passages refused, whenever they came."""
    return [
        (g.reading, Reject(g.passage.place, reason, g.passage.cursor, g.passage.id)) for g in with_repeats(gathered)
    ]


def have_same_texts(gathered: Sequence[Gathered], known: Sequence[Newest | None]) -> bool:
    """Whether each passage has the text that it had as a part of this document."""
    return all(
        newest is not None
        and not newest.deleted
        and newest.text_hash == g.passage.text_hash
        and newest.group == g.passage.group
        for g, newest in zip(gathered, known, strict=True)
    )


def has_same_metadata(gathered: Sequence[Gathered], known: Sequence[Newest | None]) -> bool:
    return all(
        newest is not None and newest.metadata_hash == g.passage.metadata_hash
        for g, newest in zip(gathered, known, strict=True)
    )


def adjacent_places(known: Sequence[Newest | None]) -> Sequence[tuple[int, int] | None]:
    """Where the passages stand in the log, where they stand together, as their vectors were made; else None for each."""
    places = [newest.place if newest is not None else None for newest in known]
    first = places[0]
    if first is None or places != [(first[0], first[1] + offset) for offset in range(len(places))]:
        return [None] * len(places)
    return places
