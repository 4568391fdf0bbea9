"""Admission: documents as read become shards of the document log, and each shard a task.

The log is the arbiter. A shard is admitted by creating exactly the next object of the log; whoever loses that race reads the
winner, drops what the winner already holds, and tries the next number. Where reading goes on after a restart stands in the
log itself, in the same object as the rows, so it can neither run ahead of them nor fall behind: a cursor for a source, and
the key of every batch for the inbox.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.documents import Cursor, Reject, SourceDocument, hash16
from embedmill.errors import ObjectExists
from embedmill.failpoints import failpoint
from embedmill.messages import Lane, Task

from .batches import Closed, OpenBatches
from .gathering import Gathering, adjacent_places, has_same_metadata, have_same_texts, reason_against_group
from .groups import Groups
from .log_view import LogView, Newest
from .open_shard import OpenShard, Waiting
from .readings import AdmissionCounts, Batch, Gathered, Reading, Taken

MAX_SHARD_TEXT_BYTES = 64 * 1024 * 1024
# Records that the open shard decided on are kept until it is closed; it is closed at so many times its rows.
_JOURNAL_SHARDS = 4
_NO_METADATA = "{}"
_NO_TEXT_HASH, _NO_METADATA_HASH = hash16(""), hash16(_NO_METADATA)


@dataclass(frozen=True, slots=True)
class Admitted:
    """Shards that were closed, as tasks, and the records that cannot become documents."""

    tasks: list[Task] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


class Admitter:
    """Fills shards and closes them. Blocking: run it in a thread; one object serves one thread at a time.

    It is given either sources (`admit`) or batches of the inbox (`admit_batches`), not both. on_late_reject: called with
    the key of a source and a record of it that was taken, lost a race against another admitter, and cannot be taken now.
    """

    def __init__(self, dataset: Dataset, index: DatasetIndex, *, job: str, lane: Lane = "bulk") -> None:
        self._dataset = dataset
        self._index = index
        self._job = job
        self._lane: Lane = lane
        self._log = LogView(dataset, index)
        self._open = OpenShard()
        self._readings: dict[str, Reading] = {}
        self._batches = OpenBatches(self._log)
        self._groups = Groups()
        self._gathering = Gathering()
        self._admits_whole_groups = dataset.info.embedder.late_chunking
        self._removed_some = False
        # The record at hand, those since the last close that the open shard decided on, and how many races were lost.
        self._taking: Taken | None = None
        self._decided_here = False
        self._journal: list[Taken] = []
        self._races = 0
        self.on_late_reject: Callable[[str, Reject], None] = lambda _key, _reject: None
        # Other processes may move the index on under us. What is open was held against the log before this number, and
        # only whoever has read all of it may write the next.
        self._next_shard = index.next_shard
        self._unchanged: set[tuple[str, str]] = set()
        self.counts = AdmissionCounts()

    @property
    def is_empty(self) -> bool:
        """Nothing waits for its shard to be closed."""
        return not self._open.rows

    @property
    def is_gathering(self) -> bool:
        """Passages wait for the last one of their document, which late chunking admits as a whole."""
        return bool(self._gathering.held)

    @property
    def waiting(self) -> Counter[str]:
        """Of what was counted, by its kind: how much waits for its shard to be closed, and is nothing until then."""
        return Counter(w.counted for w in self._open.rows)

    @property
    def open_bytes(self) -> int:
        return self._open.text_bytes

    def holds(self, ids: Iterable[str], *, key: str) -> bool:
        """True when the open shard has one of these ids, or documents of this batch."""
        wanted = set(ids)
        waiting = any(p.id in wanted or p.group in wanted for p in self._gathering.records)
        return waiting or self._open.holds(wanted) or key in self._batches

    def reading(self, push_key: str, *, beside: Collection[str] = ()) -> tuple[str, Cursor | None]:
        """Under which key and from where a source is to be read, see `DatasetIndex.reading`.

        From its beginning when some of what it said was given up with a cancelled job, and nothing newer has come since.
        """
        return self._index.reading(push_key, beside=beside, anew=self._log.has_given_up(push_key))

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
        result, kept, taken = Admitted(), 0, 0

        def keep() -> None:
            nonlocal kept
            keep_rejects(result.rejects[kept:])
            kept = len(result.rejects)

        def close() -> None:
            keep()
            result.tasks.extend(self.close_shard())
            self._log.look_up([*self._at_hand(), *records[taken - 1 :]])

        self._log.look_up([*self._gathering.records, *records])
        held = self._gathering.records
        ids = [record.id for record in (*held, *records) if isinstance(record, SourceDocument)]
        self._unchanged = {(push_key, id_) for id_ in self._index.unchanged_before(push_key, ids)}
        before = len(self._unchanged)
        reading = self._readings.setdefault(push_key, Reading(push_key, name, Cursor()))
        for record in records:
            taken += 1
            for _, reject in self._take_record(reading, record, close):
                self.counts.rejected += 1
                result.rejects.append(reject)
            if self._is_full():
                close()
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
        taken = 0

        def close() -> None:
            closed.append(self.close_batches())
            self._log.look_up([*self._at_hand(), *records[taken - 1 :]], keys=keys)

        self._log.look_up([*self._gathering.records, *records], keys=keys)
        for batch in batches:
            reading, earlier = self._batches.add(batch)
            for record in batch.records:
                taken += 1
                if (
                    earlier is not None
                    and isinstance(record, SourceDocument)
                    and record.cursor.record <= earlier.cursor.record
                ):
                    reading.cursor = record.cursor
                    self._count(reading, "repeated")
                    continue
                for refused, reject in self._take_record(reading, record, close):
                    self._add(refused, "rejected", 1)
                    if refused.batch is not None:
                        refused.batch.rejects.append(reject)
                if self._is_full():
                    reading.complete = record is batch.records[-1]
                    close()
            # A document that ends in a later message keeps this one waiting.
            reading.complete = all(gathered.reading is not reading for gathered in self._gathering.held)
        if self.is_empty:
            closed.append(self._batches.give_back([]))
        return closed

    def close_batches(self) -> Closed:
        """Write the open shard, however full, and give back the batches that it completes."""
        return self._batches.give_back(self.close_shard())

    def close_shard(self) -> list[Task]:
        """Write the open shard, however full; its task, or none when there was nothing in it.

        More than one when another admitter was faster, and what is left to write after it has become too much for one.
        """
        tasks: list[Task] = []
        while self._open.rows:
            shard = self._next_shard
            origin = self._origin(shard)
            try:
                table = self._dataset.append_passages(shard, [w.passage for w in self._open.rows], origin=origin)
            except ObjectExists:
                self._dataset.catch_up(self._index)
                self._next_shard = self._index.next_shard
                tasks += self._judge_anew()
                continue
            failpoint("scheduler.after_documents")
            self._index.absorb(shard, table, origin)
            self._next_shard = shard + 1
            tasks.append(self._task(shard))
            self._open.clear()
            if self._taking is not None:
                self._taking.counted.clear()
        self._journal.clear()
        return tasks

    def _take_record(
        self, reading: Reading, record: SourceDocument | Reject, close: Callable[[], None]
    ) -> list[tuple[Reading, Reject]]:
        """Take one record; what is to be refused, and of which reading. `close` is called for shards that it fills before
        its end. With late chunking, a passage waits for the last one of its document."""
        if not self._admits_whole_groups:
            return self._take_at_hand(Taken(reading, record, reading.cursor), close)
        refused = [] if self._gathering.is_continued_by(record) else self._give_up_gathered(reading)
        if isinstance(record, SourceDocument) and record.group is not None and not record.last:
            self._gathering.hold(reading, record)
            return refused
        return refused + self._take_at_hand(
            Taken(reading, record, reading.cursor, earlier=self._gathering.take()), close
        )

    def _take_at_hand(self, taking: Taken, close: Callable[[], None]) -> list[tuple[Reading, Reject]]:
        self._taking = taking
        self._decided_here = False
        reading, record = taking.reading, taking.record
        races = -1
        while self._races != races:
            # Rows that it had put into the open shard were lost with a race, and are not in the journal yet.
            races = self._races
            self._take_back(taking)
            self._make_room(taking, close)
        for gathered in taking.earlier:
            gathered.reading.cursor = gathered.passage.cursor
            gathered.reading.complete = gathered.reading is not reading
        reading.cursor = record.cursor
        rejects = self._judge(taking)
        if self._decided_here and not rejects:
            self._journal.append(taking)
        self._taking = None
        return rejects

    def _give_up_gathered(self, reading: Reading) -> list[tuple[Reading, Reject]]:
        """The last passage of a document did not come: something else did, or the same batch once more."""
        rejects: list[tuple[Reading, Reject]] = []
        for gathered in self._gathering.take():
            passage = gathered.passage
            gathered.reading.cursor = passage.cursor
            gathered.reading.complete = gathered.reading is not reading
            if gathered.reading is not reading and gathered.reading.key == reading.key:
                self._add(gathered.reading, "repeated", 1)
                continue
            reason = f"the other passages of {passage.group!r} did not follow it, and late chunking needs all of them"
            rejects.append((gathered.reading, Reject(passage.place, reason, passage.cursor, passage.id)))
        return rejects

    def _at_hand(self) -> list[SourceDocument]:
        """Passages of the document at hand that were read before its last one."""
        earlier = self._taking.earlier if self._taking is not None else ()
        return [*self._gathering.records, *(gathered.passage for gathered in earlier)]

    def _judge(self, taking: Taken) -> list[tuple[Reading, Reject]]:
        reading, record = taking.reading, taking.record
        if isinstance(record, Reject):
            return [(reading, record)]
        if self._admits_whole_groups and record.group is not None:
            return self._judge_together(taking.passages)
        if record.group is None:
            reason = self._take(reading, record)
        else:
            reason = self._groups.refusal(reading.key, record.group) or self._take(reading, record)
            if reason:
                self._groups.refuse(reading.key, record.group, reason)
        return [(reading, Reject(record.place, reason, record.cursor, record.id))] if reason else []

    def _judge_together(self, gathered: Sequence[Gathered]) -> list[tuple[Reading, Reject]]:
        """Put all passages of a document into the open shard, pass over all of them, or refuse them."""
        known = [self._newest(g.passage.id) for g in gathered]
        if self._is_logged_together(gathered, known):
            for g in gathered:
                self._count(g.reading, "repeated")
            return []
        reason = self._reason_against_together(gathered, known)
        if reason:
            return [(g.reading, Reject(g.passage.place, reason, g.passage.cursor, g.passage.id)) for g in gathered]
        same = not self._removed_some and self._has_same_texts(gathered, known)
        if same and has_same_metadata(gathered, known):
            for g in gathered:
                self._pass_over(g.reading, g.passage.id)
            return []
        places = adjacent_places(known) if same else [None] * len(known)
        for g, newest, place in zip(gathered, known, places, strict=True):
            self._put_version(g.reading, g.passage, newest, carried=place)
        return []

    def _is_logged_together(self, gathered: Sequence[Gathered], known: Sequence[Newest | None]) -> bool:
        if not self._log.is_logged(gathered[-1].reading, gathered[-1].passage.cursor):
            return False
        return not any(self._was_given_up(g.passage, newest) for g, newest in zip(gathered, known, strict=True))

    def _reason_against_together(self, gathered: Sequence[Gathered], known: Sequence[Newest | None]) -> str | None:
        reason = reason_against_group(gathered, shard_rows=self._dataset.info.shard_rows)
        reasons = (
            self._reason_against(g.reading, g.passage, newest) for g, newest in zip(gathered, known, strict=True)
        )
        return reason or next(filter(None, reasons), None)

    def _has_same_texts(self, gathered: Sequence[Gathered], known: Sequence[Newest | None]) -> bool:
        return have_same_texts(gathered, known) and not any(
            self._log.is_cancelled(newest.place) for newest in known if newest is not None
        )

    def _take(self, reading: Reading, record: SourceDocument, *, removed: bool = False) -> str | None:
        """Put a document into the open shard, or pass over it; the reason when it is refused.

        removed: it stands for a passage that its document no longer has.
        """
        newest = self._newest(record.id)
        if self._log.is_logged(reading, record.cursor) and not self._was_given_up(record, newest):
            if not removed:
                self._count(reading, "repeated")
            return None
        if not removed and (reason := self._reason_against(reading, record, newest)):
            return reason
        if record.deleted:
            self._delete(reading, record, newest, removed=removed)
            return None
        text_hash, metadata_hash = record.text_hash, record.metadata_hash
        carried = None
        if newest is not None:
            alive = not newest.deleted and not self._log.is_cancelled(newest.place)
            same_text = alive and newest.text_hash == text_hash
            if same_text and (newest.metadata_hash, newest.group) == (metadata_hash, record.group):
                self._pass_over(reading, record.id)
                return None
            if same_text and not (self._admits_whole_groups and newest.group is not None):
                carried = newest.place
        self._put_version(reading, record, newest, carried=carried)
        return None

    def _put_version(
        self, reading: Reading, record: SourceDocument, newest: Newest | None, *, carried: tuple[int, int] | None
    ) -> None:
        version, counted = (1, "new") if newest is None else (newest.version + 1, "updated")
        passage = Passage(
            record.id, record.text, record.metadata, version, record.text_hash, record.metadata_hash, False,
            record.group,
        )  # fmt: skip
        self._put(Waiting(reading, passage, carried, len(record.text.encode()), counted))

    def _was_given_up(self, record: SourceDocument, newest: Newest | None) -> bool:
        """It is this very text that a cancelled job has left without a vector."""
        if newest is None or record.deleted or newest.text_hash != record.text_hash:
            return False
        return self._log.is_cancelled(newest.place)

    def _reason_against(self, reading: Reading, record: SourceDocument, newest: Newest | None) -> str | None:
        """Why its id cannot be taken: this source had it before, or it is a passage of another document."""
        twice = newest is not None and newest.reading_key == reading.key
        if reading.batch is None and (twice or (reading.key, record.id) in self._unchanged):
            return "this id stands twice in this source; the first one is kept"
        if newest is None or newest.deleted or record.deleted or newest.group == record.group:
            return None
        if self._log.is_cancelled(newest.place):
            return None
        if newest.group is None:
            return f"the id of its passage {record.id!r} is another document's"
        return f"this id is that of a passage of document {newest.group!r}"

    def _delete(self, reading: Reading, record: SourceDocument, newest: Newest | None, *, removed: bool) -> None:
        """A row that says that the id is gone, where it is there; removed: as a passage that its document no longer has."""
        if newest is not None and (not newest.deleted or self._log.is_cancelled(newest.place)):
            gone = Passage(
                record.id, "", _NO_METADATA, newest.version + 1, _NO_TEXT_HASH, _NO_METADATA_HASH, True, record.group
            )
            self._put(Waiting(reading, gone, None, 0, "removed" if removed else "deleted"))
        elif not removed:
            # Of a document that was split, only the passages were there.
            self._count(reading, "deleted" if self._removed_some else "unchanged")

    def _newest(self, id_: str) -> Newest | None:
        here = self._open.newest(id_)
        if here is None:
            return self._log.newest(id_)
        self._decided_here = True
        return here

    def _pass_over(self, reading: Reading, id_: str) -> None:
        self._count(reading, "unchanged")
        if reading.batch is None:
            self._unchanged.add((reading.key, id_))

    def _put(self, waiting: Waiting) -> None:
        self._open.put(waiting)
        self._decided_here = True
        self._count(waiting.reading, waiting.counted)

    def _count(self, reading: Reading, kind: str) -> None:
        self._add(reading, kind, 1)
        if self._taking is not None:
            self._taking.counted.append((reading, kind))

    def _take_back(self, taken: Taken) -> None:
        for reading, kind in taken.counted:
            self._add(reading, kind, -1)
        if any(kind == "unchanged" for _, kind in taken.counted):
            self._unchanged.difference_update((g.reading.key, g.passage.id) for g in taken.passages)
        taken.counted.clear()

    def _add(self, reading: Reading, kind: str, count: int) -> None:
        self.counts.add(kind, count)
        if reading.batch is not None:
            reading.batch.counts.add(kind, count)

    def _make_room(self, taking: Taken, close: Callable[[], None]) -> None:
        """Before the last passage of a document: remove the passages that its new version no longer has.

        They go before it, so that a cursor behind it is a cursor behind them. `close` is called for each shard that they
        fill, and looks up anew what is not taken yet.
        """
        self._removed_some = False
        reading, record = taking.reading, taking.record
        if isinstance(record, Reject):
            return
        group = record.id if record.group is None else record.group
        if record.group is not None:
            for gathered in taking.passages:
                self._groups.see(reading.key, group, gathered.passage.id)
        former = {id_ for id_ in self._log.members(group) | self._open.members(group) if self._belongs(id_, group)}
        if not record.last or (record.group is None and not former):
            return
        if self._log.is_logged(reading, record.cursor) or self._groups.refusal(reading.key, group):
            return
        if self._reason_against(reading, record, self._newest(record.id)):
            return
        whole = self._newest(group)
        gone = self._groups.no_longer(record, former, was_whole=whole is not None and whole.group is None)
        if self._admits_whole_groups and record.group is not None:
            self._make_room_together(taking.passages, gone, close)
            return
        for id_ in gone:
            if self._remove(reading, record, id_, close):
                return

    def _make_room_together(self, gathered: Sequence[Gathered], ids: Sequence[str], close: Callable[[], None]) -> None:
        """Room for all passages of a document in the open shard, with the last of those that it no longer has.

        Whoever reads the document again after a crash finds that one there still, so that the others are embedded anew.
        """
        known = [self._newest(g.passage.id) for g in gathered]
        if self._reason_against_together(gathered, known):
            return
        reading, record = gathered[-1].reading, gathered[-1].passage
        gone = [id_ for id_ in ids if (newest := self._newest(id_)) is not None and not newest.deleted]
        for id_ in gone[:-1]:
            if self._remove(reading, record, id_, close):
                return
        same = not gone and self._has_same_texts(gathered, known) and has_same_metadata(gathered, known)
        rows = len(self._open.rows) + len(gathered) + len(gone[-1:])
        if not same and self._open.rows and rows > self._dataset.info.shard_rows:
            races = self._races
            close()
            if self._races != races:
                return
        for id_ in gone[-1:]:
            self._take(reading, _tombstone(record, id_), removed=True)
            self._removed_some = True

    def _remove(self, reading: Reading, record: SourceDocument, id_: str, close: Callable[[], None]) -> bool:
        """Remove a passage that a document no longer has; True when the open shard was lost with a race."""
        before = len(self._open.rows)
        self._take(reading, _tombstone(record, id_), removed=True)
        self._removed_some = self._removed_some or len(self._open.rows) > before
        races = self._races
        if self._is_full():
            close()
        return self._races != races

    def _belongs(self, id_: str, group: str) -> bool:
        """The passage is this document's still: another one may have taken its id over."""
        newest = self._newest(id_)
        return newest is not None and newest.group == group

    def _is_full(self) -> bool:
        rows = self._dataset.info.shard_rows
        return bool(self._open.rows) and (
            len(self._open.rows) >= rows
            or self._open.text_bytes >= MAX_SHARD_TEXT_BYTES
            or len(self._journal) >= _JOURNAL_SHARDS * rows
        )

    def _judge_anew(self) -> list[Task]:
        """After a lost race: take the records that the open shard decided on once more, behind what the winner wrote.

        The tasks of the shards that they filled; what is left waits in the open shard.
        """
        journal, self._journal = self._journal, []
        at_hand, self._taking = self._taking, None
        self._races += 1
        self._open.clear()
        ends = {reading: reading.cursor for taken in journal for reading in taken.readings}
        for taken in reversed(journal):
            self._take_back(taken)
            taken.reading.cursor = taken.before
            for gathered in reversed(taken.earlier):
                gathered.reading.cursor = gathered.before
        tasks: list[Task] = []
        done = 0

        def look_up() -> None:
            left = [record for taken in journal[max(0, done - 1) :] for record in taken.records]
            self._log.look_up([*left, *self._at_hand()], keys=self._batches.keys)

        def close() -> None:
            tasks.extend(self.close_shard())
            look_up()

        look_up()
        for taken in journal:
            done += 1
            again = Taken(taken.reading, taken.record, taken.reading.cursor, earlier=taken.earlier)
            for refused, reject in self._take_at_hand(again, close):
                self._refuse_late(refused, reject)
            if self._is_full():
                close()
        for reading, end in ends.items():
            reading.cursor = max(reading.cursor, end)
        self._taking = at_hand
        return tasks

    def _refuse_late(self, reading: Reading, reject: Reject) -> None:
        self._add(reading, "rejected", 1)
        if reading.batch is not None:
            reading.batch.rejects.append(reject)
        else:
            self.on_late_reject(reading.key, reject)

    def _origin(self, shard: int) -> ShardOrigin:
        positions = tuple(self._batches.positions(self._open))
        return ShardOrigin(shard, self._job, tuple(self._open.sources()), self._open.carried(), batches=positions)

    def _task(self, shard: int) -> Task:
        info, rows = self._dataset.info, len(self._open.rows)
        return Task(
            self._dataset.url, info.id, shard, self._job, rows, self._open.text_bytes, self._lane,
            info.embedder.fingerprint,
        )  # fmt: skip


def _tombstone(record: SourceDocument, id_: str) -> SourceDocument:
    """What stands for a passage that the document of `record` no longer has."""
    return SourceDocument(id_, "", _NO_METADATA, record.cursor, record.place, deleted=True, group=record.group)
