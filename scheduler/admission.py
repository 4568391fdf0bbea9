"""Admission: documents as read become shards of the document log, and each shard a task.

The log is the arbiter. A shard is admitted by creating exactly the next object of the log; whoever loses that race reads the
winner, drops what the winner already holds, and tries the next number. Where reading goes on after a restart stands in the
log itself, in the same object as the rows, so it can neither run ahead of them nor fall behind: a cursor for a source, and
the key of every batch for the inbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex, Known
from embedmill.dataset.layout import CANCELLED
from embedmill.dataset.passages import BatchPosition, Passage, ShardOrigin, SourcePosition
from embedmill.documents import Cursor, Reject, SourceDocument, hash16
from embedmill.errors import ObjectExists
from embedmill.failpoints import failpoint
from embedmill.messages import Lane, Task

MAX_SHARD_TEXT_BYTES = 64 * 1024 * 1024
# Keys of batches without a row wait for the next shard to be kept in; so many of them.
_RIDING_KEYS = 4096


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


@dataclass(frozen=True, slots=True)
class Admitted:
    """Shards that were closed, as tasks, and the records that cannot become documents."""

    tasks: list[Task] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Batch:
    """A message of the inbox: its documents in order, and the key by which the log knows them."""

    key: str
    records: Sequence[SourceDocument | Reject]
    counts: AdmissionCounts = field(default_factory=AdmissionCounts)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Closed:
    """Batches of which everything is in the log, or needs not be, and the shard that was closed for it, if any."""

    task: Task | None
    batches: list[Batch]


@dataclass(slots=True, eq=False)
class _Reading:
    """A source or a batch, and how far it was read."""

    key: str
    name: str
    cursor: Cursor
    batch: Batch | None = None
    complete: bool = False


@dataclass(slots=True)
class _Waiting:
    """A passage in the open shard, where it came from, and as what it was counted."""

    reading: _Reading
    passage: Passage
    carried: tuple[int, int] | None
    text_bytes: int
    cursor: Cursor
    counted: str


@dataclass(frozen=True, slots=True)
class _Newest:
    """The highest version of an id, in the log (at `place`) or in the open shard (None)."""

    version: int
    text_hash: bytes
    metadata_hash: bytes
    group: str | None
    deleted: bool
    place: tuple[int, int] | None
    reading_key: str


class Admitter:
    """Fills shards and closes them. Blocking: run it in a thread; one object serves one thread at a time.

    It is given either sources (`admit`) or batches of the inbox (`admit_batches`), not both.
    """

    def __init__(self, dataset: Dataset, index: DatasetIndex, *, job: str, lane: Lane = "bulk") -> None:
        self._dataset = dataset
        self._index = index
        self._job = job
        self._lane: Lane = lane
        self._open: list[_Waiting] = []
        self._open_ids: dict[str, _Waiting] = {}
        self._open_groups: dict[str, set[str]] = {}
        self._open_bytes = 0
        self._readings: dict[str, _Reading] = {}
        self._batches: list[_Reading] = []
        self._batch_keys: dict[str, _Reading] = {}
        self._riding: deque[tuple[str, int]] = deque(maxlen=_RIDING_KEYS)
        self._logged: dict[str, Cursor | None] = {}
        self._known: dict[str, Known] = {}
        self._members: dict[str, set[str]] = {}
        self._group_seen: tuple[str, str, set[str]] = ("", "", set())
        self._removed_some = False
        self._group_refused: tuple[str, str] | None = None
        self._reason = ""
        self._jobs_cancelled: dict[str, bool] = {}
        # Other processes may move the index on under us. What is open was held against the log before this number, and
        # only whoever has read all of it may write the next.
        self._next_shard = index.next_shard
        self._unchanged: set[tuple[str, str]] = set()
        self.counts = AdmissionCounts()

    @property
    def is_empty(self) -> bool:
        """Nothing waits for its shard to be closed."""
        return not self._open

    @property
    def waiting(self) -> int:
        """How many of the admitted that were counted wait for their shard to be closed."""
        return sum(w.counted in ("new", "updated") for w in self._open)

    @property
    def open_bytes(self) -> int:
        return self._open_bytes

    def holds(self, ids: Iterable[str], *, key: str) -> bool:
        """True when the open shard has one of these ids, or documents of this batch."""
        return any(id_ in self._open_ids for id_ in ids) or key in self._batch_keys

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

        def keep() -> None:
            nonlocal kept
            keep_rejects(result.rejects[kept:])
            kept = len(result.rejects)

        self._look_up(records)
        ids = [record.id for record in records if isinstance(record, SourceDocument)]
        self._unchanged = {(push_key, id_) for id_ in self._index.unchanged_before(push_key, ids)}
        before = len(self._unchanged)
        reading = self._readings.setdefault(push_key, _Reading(push_key, name, Cursor()))
        for record in records:
            for task in self._make_room(reading, record, before_close=keep):
                result.tasks.append(task)
                self._look_up(records)
            reading.cursor = record.cursor
            reject = self._take_record(reading, record)
            if reject is not None:
                self.counts.rejected += 1
                result.rejects.append(reject)
            if self._is_full():
                keep()
                result.tasks.extend(self.close_shard())
                self._look_up(records)
        keep()
        if len(self._unchanged) > before:
            self._index.remember_unchanged(self._unchanged)
        return result

    def admit_batches(self, batches: Sequence[Batch]) -> list[Closed]:
        """Take messages of the inbox in the order of its stream: what comes later is newer, also within one message.

        A batch is given back as soon as all of its documents, and of those before it, are in the log. Raises StorageError as
        `admit` does; whoever catches it starts with a new admitter.
        """
        closed: list[Closed] = []
        records = [record for batch in batches for record in batch.records]
        keys = [batch.key for batch in batches]
        self._look_up(records, keys=keys)
        for batch in batches:
            earlier = self._batch_keys.get(batch.key)
            reading = _Reading(batch.key, "", Cursor(), batch)
            self._batches.append(reading)
            self._batch_keys[batch.key] = reading
            for record in batch.records:
                for task in self._make_room(reading, record):
                    closed.append(self._closed([task]))
                    self._look_up(records, keys=keys)
                reading.cursor = record.cursor
                if (
                    earlier is not None
                    and isinstance(record, SourceDocument)
                    and record.cursor.record <= earlier.cursor.record
                ):
                    self._count(reading, "repeated")
                    continue
                reject = self._take_record(reading, record)
                if reject is not None:
                    self._count(reading, "rejected")
                    batch.rejects.append(reject)
                if self._is_full():
                    reading.complete = record is batch.records[-1]
                    closed.append(self.close_batches())
                    self._look_up(records, keys=keys)
            reading.complete = True
        if self.is_empty:
            closed.append(self._closed([]))
        return closed

    def close_batches(self) -> Closed:
        """Write the open shard, however full, and give back the batches that it completes."""
        return self._closed(self.close_shard())

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
            failpoint("scheduler.after_documents")
            self._index.absorb(shard, table, origin)
            self._next_shard = shard + 1
            task = self._task(shard)
            self._clear()
            self._riding.clear()
            return [task]
        return []

    def _take_record(self, reading: _Reading, record: SourceDocument | Reject) -> Reject | None:
        """Take one record; what is to be refused."""
        if isinstance(record, Reject):
            return record
        if (reading.key, record.group) == self._group_refused:
            reason: str | None = self._reason
        else:
            reason = self._take(reading, record)
        if reason and record.group is not None:
            self._group_refused, self._reason = (reading.key, record.group), reason
        return Reject(record.place, reason, record.cursor, record.id) if reason else None

    def _take(self, reading: _Reading, record: SourceDocument, *, removed: bool = False) -> str | None:
        """Put a document into the open shard, or pass over it; the reason when it is refused."""
        if self._is_logged(reading, record.cursor):
            self._count(reading, "repeated", quietly=removed)
            return None
        newest = self._newest(record.id)
        if not removed and (reason := self._reason_against(reading, record)):
            return reason
        if record.deleted:
            self._delete(reading, record, newest, removed=removed)
            return None
        if newest is None:
            self._put(reading, record, version=1, counted="new")
            return None
        given_up = self._is_cancelled(newest.place)
        alive = not newest.deleted and not given_up
        same_text = alive and newest.text_hash == record.text_hash
        if same_text and (newest.metadata_hash, newest.group) == (record.metadata_hash, record.group):
            self._pass_over(reading, record.id)
            return None
        carried = newest.place if same_text else None
        self._put(reading, record, version=newest.version + 1, counted="updated", carried=carried)
        return None

    def _reason_against(self, reading: _Reading, record: SourceDocument) -> str | None:
        """Why its id cannot be taken: this source had it before, or it is a passage of another document."""
        newest = self._newest(record.id)
        twice = newest is not None and newest.reading_key == reading.key
        if reading.batch is None and (twice or (reading.key, record.id) in self._unchanged):
            return "this id stands twice in this source; the first one is kept"
        if newest is None or newest.deleted or record.deleted or newest.group == record.group:
            return None
        if self._is_cancelled(newest.place):
            return None
        if newest.group is None:
            return f"the id of its passage {record.id!r} is another document's"
        return f"this id is that of a passage of document {newest.group!r}"

    def _delete(self, reading: _Reading, record: SourceDocument, newest: _Newest | None, *, removed: bool) -> None:
        """A row that says that the id is gone, where it is there; removed: as a passage that its document no longer has."""
        if newest is not None and (not newest.deleted or self._is_cancelled(newest.place)):
            self._put(reading, record, version=newest.version + 1, counted="removed" if removed else "deleted")
        elif not removed:
            # Of a document that was split, only the passages were there.
            self._count(reading, "deleted" if self._removed_some else "unchanged")

    def _newest(self, id_: str) -> _Newest | None:
        waiting = self._open_ids.get(id_)
        if waiting is not None:
            p = waiting.passage
            key = waiting.reading.key
            return _Newest(p.version, p.text_hash, p.metadata_hash, p.group, p.deleted, None, key)
        known = self._known.get(id_)
        if known is None:
            return None
        place = (known.shard, known.row)
        return _Newest(
            known.version, known.text_hash, known.metadata_hash, known.group, known.deleted, place, known.push_key
        )

    def _is_cancelled(self, place: tuple[int, int] | None) -> bool:
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

    def _pass_over(self, reading: _Reading, id_: str) -> None:
        self._count(reading, "unchanged")
        if reading.batch is None:
            self._unchanged.add((reading.key, id_))

    def _put(
        self,
        reading: _Reading,
        record: SourceDocument,
        *,
        version: int,
        counted: str,
        carried: tuple[int, int] | None = None,
    ) -> None:
        text, metadata = ("", "{}") if record.deleted else (record.text, record.metadata)
        passage = Passage(
            record.id, text, metadata, version, hash16(text), hash16(metadata), record.deleted, record.group
        )
        waiting = _Waiting(reading, passage, carried, len(text.encode()), record.cursor, counted)
        self._open.append(waiting)
        self._open_ids[record.id] = waiting
        self._open_bytes += waiting.text_bytes
        if record.group is not None:
            self._open_groups.setdefault(record.group, set()).add(record.id)
        self._count(reading, counted)

    def _count(self, reading: _Reading, kind: str, *, quietly: bool = False) -> None:
        if quietly:
            return
        self.counts.add(kind)
        if reading.batch is not None:
            reading.batch.counts.add(kind)

    def _make_room(
        self, reading: _Reading, record: SourceDocument | Reject, *, before_close: Callable[[], None] = lambda: None
    ) -> Iterable[Task]:
        """Before the last passage of a document: remove the passages that its new version no longer has.

        They go before it, so that a cursor behind it is a cursor behind them. Yields the shards that they filled.
        """
        self._removed_some = False
        if not isinstance(record, SourceDocument):
            return
        group = record.group if record.group is not None else record.id
        if record.group is not None:
            if self._group_seen[:2] != (reading.key, group):
                self._group_seen = (reading.key, group, set())
            self._group_seen[2].add(record.id)
        if not record.last or self._is_logged(reading, record.cursor) or (reading.key, group) == self._group_refused:
            return
        if self._reason_against(reading, record):
            return
        for id_ in self._no_longer(group, record):
            gone = SourceDocument(
                id_, "", "{}", record.cursor, record.place, deleted=True, group=record.group and group
            )
            before = len(self._open)
            self._take(reading, gone, removed=True)
            self._removed_some = self._removed_some or len(self._open) > before
            if self._is_full():
                before_close()
                yield from self.close_shard()

    def _no_longer(self, group: str, record: SourceDocument) -> list[str]:
        former = self._members.get(group, set()) | self._open_groups.get(group, set())
        if record.group is None:
            return sorted(former - {record.id})
        kept = self._group_seen[2] | {record.id}
        # The passages GROUP#0 to GROUP#N may have been read before a restart.
        whole = self._newest(group)
        if whole is not None and whole.group is None:
            # The document before it was split. A passage of another document may have that id, too, and stays.
            former = former | {group}
        return sorted(former - kept - set(_passages_upto(group, record.id)))

    def _is_full(self) -> bool:
        return len(self._open) >= self._dataset.info.shard_rows or self._open_bytes >= MAX_SHARD_TEXT_BYTES

    def _look_up(self, records: Iterable[SourceDocument | Reject], *, keys: Sequence[str] = ()) -> None:
        """Everything that the log says of these records and batches, in few queries."""
        documents = [record for record in records if isinstance(record, SourceDocument)]
        groups = dict.fromkeys(r.group if r.group is not None else r.id for r in documents if r.last)
        self._members = self._index.members(list(groups))
        ids = dict.fromkeys(record.id for record in documents)
        ids.update(dict.fromkeys(groups))
        ids.update(dict.fromkeys(id_ for members in self._members.values() for id_ in members))
        self._known = self._index.newest(list(ids))
        # Read again after the rows, never before: a row of a push must not be newer than what is known of its cursor.
        self._logged.clear()
        if keys:
            logged = self._index.batches(keys)
            self._logged.update((key, _batch_cursor(logged.get(key))) for key in keys)
        self._jobs_cancelled.clear()

    def _is_logged(self, reading: _Reading, cursor: Cursor) -> bool:
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

    def _drop_admitted(self) -> None:
        """After a lost race: keep what the log does not hold yet, with versions above those that it holds now."""
        waiting = self._open
        self._clear()
        documents = [
            SourceDocument(
                w.passage.id, w.passage.text, w.passage.metadata, w.cursor, "",
                deleted=w.passage.deleted, group=w.passage.group,
            )
            for w in waiting
        ]  # fmt: skip
        self._look_up(documents, keys=[reading.key for reading in self._batches])
        for w, document in zip(waiting, documents, strict=True):
            self.counts.add(w.counted, -1)
            if w.reading.batch is not None:
                w.reading.batch.counts.add(w.counted, -1)
            self._take(w.reading, document, removed=w.counted == "removed")

    def _origin(self, shard: int) -> ShardOrigin:
        sources: list[SourcePosition] = []
        for row, waiting in enumerate(self._open):
            reading = waiting.reading
            if reading.batch is None and (not sources or sources[-1].push_key != reading.key):
                sources.append(SourcePosition(reading.key, reading.name, reading.cursor, row))
        carried = {row: w.carried for row, w in enumerate(self._open) if w.carried is not None}
        return ShardOrigin(shard, self._job, tuple(sources), carried, batches=tuple(self._positions()))

    def _positions(self) -> Iterable[BatchPosition]:
        """The batches of the open shard in their order, those without a row, too: what is newer than a row must not come
        again before it."""
        for key, record in self._riding:
            yield BatchPosition(key, record, 0)
        rows: dict[int, int] = {}
        for waiting in self._open:
            rows[id(waiting.reading)] = rows.get(id(waiting.reading), 0) + 1
        first_row = 0
        for reading in self._batches:
            if reading.cursor.record and not self._is_logged(reading, reading.cursor):
                yield BatchPosition(reading.key, reading.cursor.record, first_row)
            first_row += rows.get(id(reading), 0)

    def _closed(self, tasks: Sequence[Task]) -> Closed:
        complete = [reading for reading in self._batches if reading.complete]
        if not tasks:
            self._riding.extend(
                (r.key, r.cursor.record) for r in complete if r.cursor.record and not self._is_logged(r, r.cursor)
            )
        self._batches = [reading for reading in self._batches if not reading.complete]
        self._batch_keys = {reading.key: reading for reading in self._batches}
        batches = [reading.batch for reading in complete if reading.batch is not None]
        return Closed(tasks[0] if tasks else None, batches)

    def _task(self, shard: int) -> Task:
        info = self._dataset.info
        return Task(
            self._dataset.url,
            info.id,
            shard,
            self._job,
            len(self._open),
            self._open_bytes,
            self._lane,
            info.embedder.fingerprint,
        )

    def _clear(self) -> None:
        self._open, self._open_ids, self._open_groups, self._open_bytes = [], {}, {}, 0


def _batch_cursor(record: int | None) -> Cursor | None:
    return None if record is None else Cursor(record=record)


def _passages_upto(group: str, id_: str) -> Iterable[str]:
    """The ids GROUP#0 to GROUP#N of a passage GROUP#N; none for an id of another form."""
    stem, mark, number = id_.rpartition("#")
    if not mark or stem != group or not number.isdecimal() or len(number) > 9:
        return ()
    return (f"{group}#{n}" for n in range(int(number) + 1))
