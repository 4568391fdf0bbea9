"""What is read into the log, a source or a batch of the inbox: how far, and what became of its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from embedmill.documents import Cursor, Reject, SourceDocument


@dataclass(slots=True)
class AdmissionCounts:
    """What became of the records read.

    deleted: by their source; removed: passages that the new version of their document no longer has; repeated: the log held
    them, from an earlier reading of the same source or batch.
    """

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0
    removed: int = 0
    repeated: int = 0
    rejected: int = 0

    @property
    def admitted(self) -> int:
        return self.new + self.updated

    def add(self, kind: str, count: int = 1) -> None:
        setattr(self, kind, getattr(self, kind) + count)


@dataclass(slots=True, eq=False)
class Batch:
    """A message of the inbox: its documents in order, and the key by which the log knows them."""

    key: str
    records: Sequence[SourceDocument | Reject]
    counts: AdmissionCounts = field(default_factory=AdmissionCounts)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Reading:
    """A source (`key` of its push, `name`) or a batch, and how far it was read; complete: a batch, to its end."""

    key: str
    name: str
    cursor: Cursor
    batch: Batch | None = None
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Gathered:
    """A passage of a document that is admitted as a whole.

    before: how far its reading was when it was read; again: it came once more, with its batch, while it was held.
    """

    reading: Reading
    passage: SourceDocument
    before: Cursor
    again: list[Gathered] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Taken:
    """A record whose fate depends on rows of the open shard: it is judged anew when these rows lose a race.

    before: how far its reading was before it; counted: as what it was, and the rows that it made; earlier: the other
    passages of its document, where they are admitted together.
    """

    reading: Reading
    record: SourceDocument | Reject
    before: Cursor
    counted: list[tuple[Reading, str]] = field(default_factory=list)
    earlier: tuple[Gathered, ...] = ()

    @property
    def passages(self) -> list[Gathered]:
        """All that are admitted together, this record included."""
        if isinstance(self.record, Reject):
            return []
        return [*self.earlier, Gathered(self.reading, self.record, self.before)]

    @property
    def readings(self) -> list[Reading]:
        return [*(gathered.reading for gathered in with_repeats(self.earlier)), self.reading]

    @property
    def records(self) -> list[SourceDocument | Reject]:
        return [*(gathered.passage for gathered in self.earlier), self.record]

    def rewind(self) -> None:
        """Its readings are where they were before it."""
        self.reading.cursor = self.before
        for gathered in reversed([*with_repeats(self.earlier)]):
            gathered.reading.cursor = gathered.before


def with_repeats(gathered: Iterable[Gathered]) -> Iterator[Gathered]:
    """Each passage, and behind it what is the same one come again."""
    for one in gathered:
        yield one
        yield from one.again
