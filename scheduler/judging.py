"""The verdict on one record: rows of the open shard, nothing to do, or the reason why it is refused.

With late chunking there is one verdict on all passages of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from embedmill.dataset.passages import Passage
from embedmill.documents import Reject, SourceDocument, hash16

from .gathering import adjacent_places, has_same_metadata, have_same_texts, reason_against_group, refusals
from .groups import Groups
from .log_view import LogView, Newest
from .open_shard import OpenShard, Waiting
from .readings import AdmissionCounts, Gathered, Reading, Taken

_NO_METADATA = "{}"
_NO_TEXT_HASH, _NO_METADATA_HASH = hash16(""), hash16(_NO_METADATA)


class Judge:
    """Holds a record against the log and the open shard, puts its rows there, and counts what became of it.

    is_full: whether the open shard is to be closed. A `close` closes it; it is True when its rows lost a race.
    """

    def __init__(
        self, log: LogView, open_shard: OpenShard, *, shard_rows: int, whole_groups: bool, is_full: Callable[[], bool]
    ) -> None:
        self._log = log
        self._open = open_shard
        self._shard_rows = shard_rows
        self._admits_whole_groups = whole_groups
        self._is_full = is_full
        self._groups = Groups()
        self._removed_some = False
        self.counts = AdmissionCounts()
        # By the key of a source and an id: what it said was in the log before.
        self.unchanged: set[tuple[str, str]] = set()
        # The record at hand, and whether the open shard had a part in its verdict.
        self.taking: Taken | None = None
        self.decided_here = False

    def is_logged_again(self, reading: Reading, record: SourceDocument) -> bool:
        """The log holds it from an earlier reading of its batch, so nothing is to be done, whatever comes of its document.

        Of a passage, only when its newest row came with that batch, and nothing in the shard is given up: a batch is logged
        also with passages that were refused, and a document that is to be embedded anew needs all of its passages.
        """
        newest = self._log.newest(record.id)
        if not self._log.is_logged(reading, record.cursor) or self._was_given_up(record, newest):
            return False
        if record.group is None:
            return True
        if newest is None or newest.place is None or newest.deleted:
            return False
        shard = newest.place[0]
        same = (newest.group, newest.text_hash) == (record.group, record.text_hash)
        return same and self._log.names(shard, reading.key) and not self._log.is_cancelled_in_part(shard)

    def judge(self, taking: Taken) -> list[tuple[Reading, Reject]]:
        reading, record = taking.reading, taking.record
        if isinstance(record, Reject):
            return [(reading, record)]
        if self._admits_whole_groups and record.group is not None:
            rejects = self._judge_together(taking.passages)
            if not rejects:
                for again in (again for gathered in taking.earlier for again in gathered.again):
                    self.count(again.reading, "repeated")
            return rejects
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
                self.count(g.reading, "repeated")
            return []
        reason = self._reason_against_together(gathered, known)
        if reason:
            return refusals(gathered, reason)
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
        reason = reason_against_group(gathered, shard_rows=self._shard_rows)
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
                self.count(reading, "repeated")
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
        if reading.batch is None and (twice or (reading.key, record.id) in self.unchanged):
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
            self.count(reading, "deleted" if self._removed_some else "unchanged")

    def _newest(self, id_: str) -> Newest | None:
        here = self._open.newest(id_)
        if here is None:
            return self._log.newest(id_)
        self.decided_here = True
        return here

    def _pass_over(self, reading: Reading, id_: str) -> None:
        self.count(reading, "unchanged")
        if reading.batch is None:
            self.unchanged.add((reading.key, id_))

    def _put(self, waiting: Waiting) -> None:
        self._open.put(waiting)
        self.decided_here = True
        self.count(waiting.reading, waiting.counted)

    def count(self, reading: Reading, kind: str) -> None:
        self.add(reading, kind, 1)
        if self.taking is not None:
            self.taking.counted.append((reading, kind))

    def take_back(self, taken: Taken) -> None:
        for reading, kind in taken.counted:
            self.add(reading, kind, -1)
        if any(kind == "unchanged" for _, kind in taken.counted):
            self.unchanged.difference_update((g.reading.key, g.passage.id) for g in taken.passages)
        taken.counted.clear()

    def add(self, reading: Reading, kind: str, count: int) -> None:
        self.counts.add(kind, count)
        if reading.batch is not None:
            reading.batch.counts.add(kind, count)

    def make_room(self, taking: Taken, close: Callable[[], bool]) -> None:
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

    def _make_room_together(self, gathered: Sequence[Gathered], ids: Sequence[str], close: Callable[[], bool]) -> None:
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
        if not same and self._open.rows and rows > self._shard_rows and close():
            return
        for id_ in gone[-1:]:
            self._take(reading, _tombstone(record, id_), removed=True)
            self._removed_some = True

    def _remove(self, reading: Reading, record: SourceDocument, id_: str, close: Callable[[], bool]) -> bool:
        """Remove a passage that a document no longer has; True when the open shard was lost with a race."""
        before = len(self._open.rows)
        self._take(reading, _tombstone(record, id_), removed=True)
        self._removed_some = self._removed_some or len(self._open.rows) > before
        return close() if self._is_full() else False

    def _belongs(self, id_: str, group: str) -> bool:
        """The passage is this document's still: another one may have taken its id over."""
        newest = self._newest(id_)
        return newest is not None and newest.group == group


def _tombstone(record: SourceDocument, id_: str) -> SourceDocument:
    """What stands for a passage that the document of `record` no longer has."""
    return SourceDocument(id_, "", _NO_METADATA, record.cursor, record.place, deleted=True, group=record.group)
