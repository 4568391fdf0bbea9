"""Admission: documents as read become shards of the document log, and each shard a task.

The log is the arbiter. A shard is admitted by creating exactly the next object of the log; whoever loses that race reads the
winner, drops what the winner already holds, and tries the next number. Where reading goes on after a restart stands in the
log itself, in the same object as the rows, so it can neither run ahead of them nor fall behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex, Known
from embedmill.dataset.passages import Passage, ShardOrigin, SourcePosition
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ObjectExists
from embedmill.messages import Lane, Task

MAX_SHARD_TEXT_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class AdmissionCounts:
    """What became of the records read."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0
    rejected: int = 0

    @property
    def admitted(self) -> int:
        return self.new + self.updated


@dataclass(frozen=True, slots=True)
class Admitted:
    """Shards that were closed, as tasks, and the records that cannot become documents."""

    tasks: list[Task] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(slots=True)
class _Waiting:
    """A passage in the open shard, and where it came from."""

    push_key: str
    passage: Passage
    carried: tuple[int, int] | None
    text_bytes: int
    cursor: Cursor


class Admitter:
    """Fills shards and closes them. Blocking: run it in a thread; one object serves one thread at a time."""

    def __init__(self, dataset: Dataset, index: DatasetIndex, *, job: str, lane: Lane = "bulk") -> None:
        self._dataset = dataset
        self._index = index
        self._job = job
        self._lane: Lane = lane
        self._open: list[_Waiting] = []
        self._open_ids: dict[str, _Waiting] = {}
        self._open_bytes = 0
        self._read: dict[str, tuple[str, Cursor]] = {}
        self._logged: dict[str, Cursor | None] = {}
        # Other processes may move the index on under us. What is open was held against the log before this number, and
        # only whoever has read all of it may write the next.
        self._next_shard = index.next_shard
        self._unchanged: set[tuple[str, str]] = set()
        self.counts = AdmissionCounts()

    def reading(self, push_key: str, *, beside: Collection[str] = ()) -> tuple[str, Cursor | None]:
        """Under which key and from where a source is to be read, see `DatasetIndex.reading`."""
        return self._index.reading(push_key, beside=beside)

    def admit(
        self,
        push_key: str,
        name: str,
        records: Sequence[SourceDocument | Reject],
        *,
        keep_rejects: Callable[[Sequence[Reject]], None] = lambda _rejects: None,
    ) -> Admitted:
        """Take records of one push in the order of reading.

        `keep_rejects` gets what was refused, before a shard is closed whose cursor is behind it: a refusal is never
        forgotten. Raises StorageError when a shard cannot be written; what was not closed by then is read again.
        """
        result, kept = Admitted(), 0
        ids = [record.id for record in records if isinstance(record, SourceDocument)]
        known = self._look_up(ids)
        self._unchanged = {(push_key, id_) for id_ in self._index.unchanged_before(push_key, ids)}
        before = len(self._unchanged)
        for record in records:
            self._read[push_key] = (name, record.cursor)
            if isinstance(record, Reject):
                self._reject(result, record)
                continue
            reason = self._take(push_key, record, known.get(record.id))
            if reason:
                self._reject(result, Reject(record.place, reason, record.cursor, record.id))
            if len(self._open) >= self._dataset.info.shard_rows or self._open_bytes >= MAX_SHARD_TEXT_BYTES:
                keep_rejects(result.rejects[kept:])
                kept = len(result.rejects)
                result.tasks.extend(self.close_shard())
                known = self._look_up(ids)
        keep_rejects(result.rejects[kept:])
        if len(self._unchanged) > before:
            self._index.remember_unchanged(self._unchanged)
        return result

    def close_shard(self) -> list[Task]:
        """Write the open shard, however full; its task, or none when there was nothing in it."""
        while self._open:
            shard = self._next_shard
            origin = self._origin(shard)
            try:
                table = self._dataset.append_passages(shard, [w.passage for w in self._open], origin=origin)
            except ObjectExists:
                self._dataset.catch_up(self._index)
                self._next_shard = self._index.next_shard
                self._drop_admitted()
                continue
            self._index.absorb(shard, table, origin)
            self._next_shard = shard + 1
            task = self._task(shard)
            self._clear()
            return [task]
        return []

    def _take(self, push_key: str, record: SourceDocument, known: Known | None) -> str | None:
        """Put a document into the open shard, or pass over it; the reason when it is refused."""
        if self._is_logged(push_key, record.cursor):
            return None
        waiting = self._open_ids.get(record.id)
        twice = push_key in (waiting and waiting.push_key, known and known.push_key)
        if twice or (push_key, record.id) in self._unchanged:
            return "this id stands twice in this source; the first one is kept"
        text_hash, metadata_hash = record.text_hash, record.metadata_hash
        version, carried = 1, None
        if waiting is not None:
            if (waiting.passage.text_hash, waiting.passage.metadata_hash) == (text_hash, metadata_hash):
                self._pass_over(push_key, record.id)
                return None
            version = waiting.passage.version + 1
        elif known is not None:
            if not known.deleted and (known.text_hash, known.metadata_hash) == (text_hash, metadata_hash):
                self._pass_over(push_key, record.id)
                return None
            version = known.version + 1
            if not known.deleted and known.text_hash == text_hash:
                carried = (known.shard, known.row)
        passage = Passage(record.id, record.text, record.metadata, version, text_hash, metadata_hash)
        self._put(_Waiting(push_key, passage, carried, len(record.text.encode()), record.cursor))
        return None

    def _pass_over(self, push_key: str, id_: str) -> None:
        self.counts.unchanged += 1
        self._unchanged.add((push_key, id_))

    def _put(self, waiting: _Waiting) -> None:
        self._open.append(waiting)
        self._open_ids[waiting.passage.id] = waiting
        self._open_bytes += waiting.text_bytes
        if waiting.passage.version == 1:
            self.counts.new += 1
        else:
            self.counts.updated += 1

    def _reject(self, result: Admitted, reject: Reject) -> None:
        self.counts.rejected += 1
        result.rejects.append(reject)

    def _look_up(self, ids: Sequence[str]) -> dict[str, Known]:
        known = self._index.newest(ids)
        # Read again after the rows, never before: a row of a push must not be newer than what is known of its cursor.
        self._logged.clear()
        return known

    def _is_logged(self, push_key: str, cursor: Cursor) -> bool:
        """True when the log has read this push to here already: another admitter was at it too."""
        if push_key not in self._logged:
            self._logged[push_key] = self._index.cursor(push_key)
        logged = self._logged[push_key]
        return logged is not None and cursor <= logged

    def _drop_admitted(self) -> None:
        """After a lost race: keep what the log does not hold yet, with versions above those that it holds now."""
        waiting = self._open
        self._clear()
        known = self._look_up([w.passage.id for w in waiting])
        for w in waiting:
            if w.passage.version == 1:
                self.counts.new -= 1
            else:
                self.counts.updated -= 1
            p = w.passage
            self._take(w.push_key, SourceDocument(p.id, p.text, p.metadata, w.cursor, ""), known.get(p.id))

    def _origin(self, shard: int) -> ShardOrigin:
        sources: list[SourcePosition] = []
        for row, waiting in enumerate(self._open):
            if not sources or sources[-1].push_key != waiting.push_key:
                name, cursor = self._read[waiting.push_key]
                sources.append(SourcePosition(waiting.push_key, name, cursor, row))
        carried = {row: w.carried for row, w in enumerate(self._open) if w.carried is not None}
        return ShardOrigin(shard, self._job, tuple(sources), carried)

    def _task(self, shard: int) -> Task:
        info = self._dataset.info
        return Task(self._dataset.url, info.id, shard, self._job, len(self._open), self._open_bytes, self._lane)

    def _clear(self) -> None:
        self._open, self._open_ids, self._open_bytes = [], {}, 0
