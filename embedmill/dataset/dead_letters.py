"""Dead letters: passages that failed and were not tried again since. All of it is read from markers, the log and one list.

A failure stays in its marker for ever. It stops counting when a later row of the log tries it again under the same id and
version, whatever comes of that; it is no open dead letter any more when a newer version of the id was admitted, or when
somebody dropped it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ..errors import ObjectChanged, StorageError
from . import layout
from .dataset import Dataset, now_iso
from .layout import Failure

Place = tuple[int, int]
"""(shard, row)."""

LetterState = Literal["open", "superseded", "dropped"]


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failure that counts: its place in the log, its cause, and whether anybody still has to look at it."""

    shard: int
    failure: Failure
    state: LetterState

    @property
    def place(self) -> Place:
        return self.shard, self.failure.row


def failed_rows(dataset: Dataset) -> list[FailedRow]:
    """Every failure that was not tried again, in the order of the log. Blocking; cheap where nothing failed."""
    failures = [
        (shard, failure)
        for shard in dataset.committed()
        if (marker := dataset.marker(shard)) is not None
        for failure in marker.failures
    ]
    if not failures:
        return []
    retried, dropped = retried_places(dataset), dropped_places(dataset)
    left = [(shard, failure) for shard, failure in failures if (shard, failure.row) not in retried]
    newest = _newest_versions(dataset, {failure.id for _, failure in left})

    def state(shard: int, failure: Failure) -> LetterState:
        if (shard, failure.row) in dropped:
            return "dropped"
        return "superseded" if newest.get(failure.id, 0) > failure.version else "open"

    return [FailedRow(shard, failure, state(shard, failure)) for shard, failure in left]


def retried_places(dataset: Dataset) -> set[Place]:
    """Failures that a later row tries again, or has tried."""
    committed = set(dataset.committed())
    places: set[Place] = set()
    for shard in committed:
        marker = dataset.marker(shard)
        if marker is not None:
            places.update(marker.retries.values())
    for shard in dataset.owed():
        places.update(dataset.admission(shard).retries.values())
    return places | _moved(dataset, committed, places)


def _moved(dataset: Dataset, committed: Iterable[int], places: Collection[Place]) -> set[Place]:
    """Where failures stand now that were tried again by the place that they had before their shard was rewritten."""
    moved: set[Place] = set()
    for shard in committed:
        marker = dataset.marker(shard)
        if marker is not None and marker.replaces and marker.failures:
            carried = dataset.origin(shard).carried
            moved.update((shard, f.row) for f in marker.failures if carried.get(f.row) in places)
    return moved


def drop_letters(dataset: Dataset, letters: Iterable[FailedRow]) -> int:
    """Note durably that somebody has seen these failures; how many were not dropped before."""
    letters = list(letters)
    while True:
        current = dataset.store.read_or_none(layout.DROPPED_KEY)
        known = _parse(current)
        new = [letter for letter in letters if letter.place not in known]
        if not new:
            return 0
        lines = "".join(_line(letter) for letter in new)
        with suppress(ObjectChanged):
            dataset.store.swap(layout.DROPPED_KEY, (current or b"") + lines.encode(), expected=current)
            return len(new)


def _line(letter: FailedRow) -> str:
    f = letter.failure
    record = {"at": now_iso(), "shard": letter.shard, "row": f.row, "id": f.id, "version": f.version, "code": f.code}
    return json.dumps(record, ensure_ascii=False) + "\n"


def dropped_places(dataset: Dataset) -> set[Place]:
    """Failures that somebody has acknowledged."""
    return _parse(dataset.store.read_or_none(layout.DROPPED_KEY))


def _parse(data: bytes | None) -> set[Place]:
    places: set[Place] = set()
    for line in (data or b"").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            places.add((record["shard"], record["row"]))
    return places


def _newest_versions(dataset: Dataset, ids: Collection[str]) -> dict[str, int]:
    """The highest version of each of these ids in the log."""
    try:
        index = dataset.open_index()
    except StorageError:
        # A dataset that may only be read has no place for an index: look through the log itself.
        return _newest_in(dataset, dataset.admitted(), ids)
    try:
        return {id_: places[0][0] for id_, places in index.versions(list(ids)).items()}
    finally:
        index.close()


def _newest_in(dataset: Dataset, shards: Sequence[int], ids: Collection[str]) -> dict[str, int]:
    newest: dict[str, int] = {}
    for shard in shards:
        columns = dataset.documents(shard, columns=["id", "version"])[0].to_pydict()
        for id_, version in zip(columns["id"], columns["version"], strict=True):
            if id_ in ids:
                newest[id_] = max(version, newest.get(id_, 0))
    return newest
