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
from embedmill.dataset.passages import ShardOrigin
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ObjectExists
from embedmill.failpoints import failpoint
from embedmill.messages import Lane, Task

from .batches import Closed, OpenBatches
from .gathering import Gathering, refusals
from .judging import Judge
from .log_view import LogView
from .open_shard import OpenShard
from .readings import AdmissionCounts, Batch, Gathered, Reading, Taken, with_repeats

MAX_SHARD_TEXT_BYTES = 64 * 1024 * 1024
# Records that the open shard decided on are kept until it is closed; it is closed at so many times its rows.
_JOURNAL_SHARDS = 4


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
        self._gathering = Gathering()
        self._admits_whole_groups = dataset.info.embedder.late_chunking
        self._judge = Judge(
            self._log,
            self._open,
            shard_rows=dataset.info.shard_rows,
            whole_groups=self._admits_whole_groups,
            is_full=self._is_full,
        )
        # The records since the last close that the open shard decided on, and how many races were lost.
        self._journal: list[Taken] = []
        self._races = 0
        self.on_late_reject: Callable[[str, Reject], None] = lambda _key, _reject: None
        # Other processes may move the index on under us. What is open was held against the log before this number, and
        # only whoever has read all of it may write the next.
        self._next_shard = index.next_shard

    @property
    def counts(self) -> AdmissionCounts:
        return self._judge.counts

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
        """Of text, in the open shard; `gathered_bytes`: of passages that wait for the last one of their document."""
        return self._open.text_bytes

    @property
    def gathered_bytes(self) -> int:
        return self._gathering.text_bytes

    def holds(self, ids: Iterable[str], *, key: str) -> bool:
        """True when the open shard has one of these ids, or documents of this batch."""
        wanted = set(ids)
        return self._gathering.holds(wanted) or self._open.holds(wanted) or key in self._batches

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
        enough: Callable[[SourceDocument | Reject], bool] = lambda _record: False,
    ) -> Admitted:
        """Take records of one push in the order of reading.

        `keep_rejects` gets what was refused, before a shard is closed whose cursor is behind it: a refusal is never
        forgotten. Behind a record of which `enough` is true none is taken. Raises StorageError when a shard cannot be
        written; what was not closed by then is read again.
        """
        result, kept, taken = Admitted(), 0, 0

        def keep() -> None:
            nonlocal kept
            keep_rejects(result.rejects[kept:])
            kept = len(result.rejects)

        def close() -> bool:
            races = self._races
            keep()
            result.tasks.extend(self.close_shard())
            self._look_up(records[taken - 1 :])
            return self._races != races

        def look_up() -> None:
            self._look_up(records[taken - 1 :])
            ids = [record.id for record in self._at_hand()]
            self._judge.unchanged.update((push_key, id_) for id_ in self._index.unchanged_before(push_key, ids))

        self._look_up(records)
        ids = [record.id for record in records if isinstance(record, SourceDocument)]
        self._judge.unchanged = {(push_key, id_) for id_ in self._index.unchanged_before(push_key, ids)}
        before = len(self._judge.unchanged)
        reading = self._readings.setdefault(push_key, Reading(push_key, name, Cursor()))
        for record in records:
            taken += 1
            for _, reject in self._take_record(reading, record, close, look_up):
                self.counts.rejected += 1
                result.rejects.append(reject)
            if self._is_full():
                close()
            if enough(record):
                break
        keep()
        if len(self._judge.unchanged) > before:
            self._index.remember_unchanged(self._judge.unchanged)
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

        def close() -> bool:
            races = self._races
            closed.append(self.close_batches())
            look_up()
            return self._races != races

        def look_up() -> None:
            self._look_up(records[taken - 1 :], keys=keys)

        self._look_up(records, keys=keys)
        for batch in batches:
            reading, earlier = self._batches.add(batch)
            for record in batch.records:
                taken += 1
                if self._gathering.hold_again(reading, record):
                    continue
                if isinstance(record, SourceDocument) and self._is_repeated(reading, record, earlier):
                    reading.cursor = record.cursor
                    self._judge.count(reading, "repeated")
                    continue
                self._refuse(self._take_record(reading, record, close, look_up))
                if self._is_full():
                    reading.complete = record is batch.records[-1]
                    close()
            # A document that ends in a later message keeps this one waiting.
            reading.complete = not self._gathering.keeps(reading)
        if self.is_empty:
            closed.append(self._batches.give_back([]))
        return closed

    def give_up_gathered(self) -> Closed:
        """Refuse the passages that wait for the last one of their document; then as `close_batches`."""
        self._refuse(self._give_up_gathered("did not come while there was room to wait for them"))
        return self.close_batches()

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
            if self._judge.taking is not None:
                self._judge.taking.counted.clear()
        self._journal.clear()
        return tasks

    def _is_repeated(self, reading: Reading, record: SourceDocument, earlier: Reading | None) -> bool:
        """It was taken with its batch before: it does not wait for its document, nor end the one that is being gathered."""
        if earlier is not None and record.cursor.record <= earlier.cursor.record:
            return True
        return self._admits_whole_groups and self._judge.is_logged_again(reading, record)

    def _take_record(
        self,
        reading: Reading,
        record: SourceDocument | Reject,
        close: Callable[[], bool],
        look_up: Callable[[], None],
    ) -> list[tuple[Reading, Reject]]:
        """Take one record; what is to be refused, and of which reading. `close` is called for shards that it fills before
        its end. With late chunking, a passage waits for the last one of its document; `look_up` is called for those that
        came in an earlier block."""
        if not self._admits_whole_groups:
            return self._take_at_hand(Taken(reading, record, reading.cursor), close)
        refused = []
        if not self._gathering.is_continued_by(record):
            # The last passage of the document did not come: something else did.
            refused = self._give_up_gathered("did not follow it", reading=reading)
        if isinstance(record, SourceDocument) and record.group is not None and not record.last:
            self._gathering.hold(reading, record)
            return refused
        gathered, self._gathering = self._gathering, Gathering()
        taking = Taken(reading, record, reading.cursor, earlier=tuple(gathered.held))
        if not gathered.looked_up:
            self._judge.taking = taking
            look_up()
        return refused + self._take_at_hand(taking, close)

    def _take_at_hand(self, taking: Taken, close: Callable[[], bool]) -> list[tuple[Reading, Reject]]:
        self._judge.taking = taking
        self._judge.decided_here = False
        reading, record = taking.reading, taking.record
        races = -1
        while self._races != races:
            # Rows that it had put into the open shard were lost with a race, and are not in the journal yet.
            races = self._races
            self._judge.take_back(taking)
            self._judge.make_room(taking, close)
        _release(taking.earlier, reading)
        reading.cursor = record.cursor
        rejects = self._judge.judge(taking)
        if self._judge.decided_here and not rejects:
            self._journal.append(taking)
        self._judge.taking = None
        return rejects

    def _give_up_gathered(self, why: str, *, reading: Reading | None = None) -> list[tuple[Reading, Reject]]:
        """Refuse all passages that are held; reading: the one that is being read."""
        held, self._gathering = self._gathering.held, Gathering()
        _release(held, reading)
        group = held[0].passage.group
        return refusals(held, f"the other passages of {group!r} {why}, and late chunking needs all of them")

    def _refuse(self, refused: Sequence[tuple[Reading, Reject]]) -> None:
        """Of batches, and of sources what was taken before."""
        for reading, reject in refused:
            self._judge.add(reading, "rejected", 1)
            if reading.batch is not None:
                reading.batch.rejects.append(reject)
            else:
                self.on_late_reject(reading.key, reject)

    def _look_up(self, records: Sequence[SourceDocument | Reject], *, keys: Sequence[str] = ()) -> None:
        """These, and the document at hand; what is held waits until it is judged, so as not to be looked up each time."""
        self._log.look_up([*self._at_hand(), *records], keys=keys)
        self._gathering.looked_up = not self._gathering.held

    def _at_hand(self) -> list[SourceDocument]:
        """Passages of the document at hand that were read before its last one."""
        earlier = self._judge.taking.earlier if self._judge.taking is not None else ()
        return [gathered.passage for gathered in earlier]

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
        at_hand, self._judge.taking = self._judge.taking, None
        self._races += 1
        self._open.clear()
        ends = {reading: reading.cursor for taken in journal for reading in taken.readings}
        for taken in reversed(journal):
            self._judge.take_back(taken)
            taken.rewind()
        tasks: list[Task] = []
        done = 0

        def look_up() -> None:
            left = [record for taken in journal[max(0, done - 1) :] for record in taken.records]
            self._look_up(left, keys=self._batches.keys)

        def close() -> bool:
            races = self._races
            tasks.extend(self.close_shard())
            look_up()
            return self._races != races

        look_up()
        for taken in journal:
            done += 1
            again = Taken(taken.reading, taken.record, taken.reading.cursor, earlier=taken.earlier)
            self._refuse(self._take_at_hand(again, close))
            if self._is_full():
                close()
        for reading, end in ends.items():
            reading.cursor = max(reading.cursor, end)
        self._judge.taking = at_hand
        return tasks

    def _origin(self, shard: int) -> ShardOrigin:
        positions = tuple(self._batches.positions(self._open))
        return ShardOrigin(shard, self._job, tuple(self._open.sources()), self._open.carried(), batches=positions)

    def _task(self, shard: int) -> Task:
        info, rows = self._dataset.info, len(self._open.rows)
        return Task(
            self._dataset.url, info.id, shard, self._job, rows, self._open.text_bytes, self._lane,
            info.embedder.fingerprint,
        )  # fmt: skip


def _release(gathered: Sequence[Gathered], reading: Reading | None) -> None:
    """They are judged now: their messages wait for nothing more, except the one that is being read, if any."""
    for one in with_repeats(gathered):
        one.reading.cursor = one.passage.cursor
        if one.reading is not reading:
            one.reading.complete = True
