"""Which passage ends its worker, or fails for ever: planning, and the notes that outlive a worker.

A shard whose worker died again and again without progress, or which failed again and again, is worked in trials. A trial is
noted durably for just as long as the embedder has its texts: waiting for the budget, or to try again, is outside. So a note
that is left means that a process ended, or stands still, with those rows in flight. Rows without such a note are tried as
fast as ever, many requests at once. Whoever takes the shard after a death tries what was in flight in halves, while nothing
else of its process is in flight, until a row is alone.

A row alone is no proof: processes are killed for other reasons. So each trial of a suspect row alone follows a control: the
canary, and then a wait several times as long as the trial, noted in the same way. A death in the trial counts against the
row, one in the control counts for it, and the row is buried at three more against it than for it. A kill that does not care
for passages hits the control at least `CONTROL_TIMES` as often as the trial: of the requests of a trial, the first alone
counts.

A trial that fails and leaves its worker alive (an error that should pass and does not, an exception that nobody foresaw) is
halved at once. A row that fails alone, while the canary passes, gets a note with the cause, which stays. The fifth such
delivery buries it.

Where the queue does not outlive the process, a note without rows counts a delivery: it is left by whoever died at the shard.

Note: `checkpoints/SHARD/trial-ATTEMPT-N`, JSON. It is removed by the attempt that wrote it, or swept after the commit.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import FORMAT_VERSION, checkpoints_folder
from embedmill.embedder import BatchLimits
from embedmill.failpoints import afailpoint

from .packing import pack

NOTE_PREFIX = "trial-"
SUSPECT_AFTER = 3
"""Deliveries without progress, the present one included."""
FAILURES_TO_SUSPECT = 3
"""Attempts of the task that failed before."""
DEATHS_TO_BURY = 3
FAILURES_TO_BURY = 5
CONTROL_TIMES = 4
_SHORTEST_TRIAL_S, _LONGEST_CONTROL_S = 0.05, 10.0
_log = logging.getLogger("embedmill.worker.trials")


@dataclass(frozen=True, slots=True)
class Note:
    """A trial of these rows. control: of the canary on behalf of one row; controlled: it follows a control that survived;
    cause: it ended, and this is how it failed."""

    rows: tuple[int, ...]
    control: bool = False
    controlled: bool = False
    cause: str = ""


class TrialNotes:
    """The notes of one shard, as one attempt writes them. Blocking, but for `standing`: run in a thread."""

    def __init__(self, dataset: Dataset, shard: int, *, attempt: str) -> None:
        self._store = dataset.store
        self._folder = checkpoints_folder(shard)
        self._mine = f"{NOTE_PREFIX}{attempt}-"
        self._written = 0

    def left(self) -> list[Note]:
        """Notes of other attempts: those died, stand still, or failed."""
        notes = []
        for name in self._store.names(self._folder):
            if name.startswith(NOTE_PREFIX) and not name.startswith(self._mine):
                data = self._store.read_or_none(f"{self._folder}/{name}")
                try:
                    record = json.loads(data or b"{}")
                    rows, cause = tuple(record["rows"]), record.get("cause", "")
                    notes.append(Note(rows, record["control"], record["controlled"], cause))
                except (KeyError, TypeError, ValueError):
                    _log.warning("%s/%s is no note of a trial; it is passed over", self._folder, name)
        return notes

    def forget_deliveries(self) -> None:
        """There is progress: deliveries that ended without it count no more."""
        for name in self._store.names(self._folder):
            key = f"{self._folder}/{name}"
            if name.startswith(NOTE_PREFIX) and _is_delivery(self._store.read_or_none(key)):
                self._store.delete(key)

    def write(self, note: Note) -> str:
        """Note a trial that is about to begin, or that failed; the note's key."""
        self._written += 1
        key = f"{self._folder}/{self._mine}{self._written:05d}"
        self._store.create(key, json.dumps({"format_version": FORMAT_VERSION, **asdict(note)}).encode())
        return key

    def remove(self, key: str) -> None:
        """The trial is over, and this process lives."""
        self._store.delete(key)

    @asynccontextmanager
    async def standing(self, note: Note) -> AsyncIterator[str]:
        """A note that only the death of this process leaves behind; its key."""
        key = await to_thread.run_sync(self.write, note)
        try:
            await afailpoint("worker.after_note")
            yield key
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self.remove, key)


def plan_trials(
    owed: Sequence[int],
    tokens: Sequence[int],
    left: Sequence[Note],
    *,
    limits: BatchLimits,
    windows: Sequence[Sequence[int]] | None = None,
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The rows of each trial: those that nothing is known against, as requests hold them; what died or failed, in halves.

    tokens: estimated, of each owed row; windows: with late chunking, the owed rows that belong together. A window with a
    suspect row is embedded in parts.
    """
    smallest = _smallest_failed(left)
    clean = [position for position, row in enumerate(owed) if row not in smallest]
    if windows is None:
        packed = pack([tokens[position] for position in clean], limits=limits)
        unsuspected = [tuple(owed[clean[position]] for position in batch) for batch in packed]
    else:
        kept = (tuple(row for row in rows if row not in smallest) for rows in windows)
        unsuspected = [rows for rows in kept if rows]
    halves: list[tuple[int, ...]] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in owed:
        if row in smallest:
            groups.setdefault(smallest[row], []).append(row)
    for failed, rows in sorted(groups.items(), key=lambda group: -len(group[0])):
        size = math.ceil(len(failed) / 2)
        halves += [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    return unsuspected, halves


def suspects(left: Sequence[Note]) -> set[int]:
    """Rows of trials that were not survived, or that failed."""
    return set(_smallest_failed(left))


def deadly(left: Sequence[Note]) -> set[int]:
    """Rows of trials that were not survived."""
    return suspects([note for note in left if not note.cause])


def deaths_alone(row: int, left: Sequence[Note]) -> tuple[int, int]:
    """Deaths during trials of this row alone, and during their controls."""
    mine = [note for note in left if note.rows == (row,) and not note.cause]
    return sum(note.controlled and not note.control for note in mine), sum(note.control for note in mine)


def failures_alone(row: int, left: Sequence[Note]) -> int:
    """Deliveries in which this row failed alone, and the canary did not."""
    return sum(note.rows == (row,) and bool(note.cause) for note in left)


def control_wait_s(canary_s: float, *, canary: str, text: str) -> float:
    """How long to wait after the canary took `canary_s`: several times what `text` may take, both without their waits."""
    trial_s = max(_SHORTEST_TRIAL_S, canary_s * max(1.0, len(text) / len(canary)))
    return min(_LONGEST_CONTROL_S, CONTROL_TIMES * trial_s)


def _is_delivery(data: bytes | None) -> bool:
    try:
        record = json.loads(data or b"{}")
    except ValueError:
        return False
    return record.get("rows") == [] and not record.get("control")


def _smallest_failed(left: Sequence[Note]) -> dict[int, tuple[int, ...]]:
    """For each suspect row, the rows of the smallest trial with it that was not survived."""
    smallest: dict[int, tuple[int, ...]] = {}
    for note in sorted((note for note in left if not note.control), key=lambda note: (len(note.rows), note.rows)):
        for row in note.rows:
            smallest.setdefault(row, note.rows)
    return smallest
