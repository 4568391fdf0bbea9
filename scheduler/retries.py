"""Dead letters admitted once more: rows of a new shard with the same id and version, whose origin names what they try again.

The log is the arbiter here, too. Only what is still the newest place of the newest version of its id is admitted, and only
by whoever creates exactly the next object: two retries at once, or one after the other, admit a passage once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.dead_letters import FailedRow, Place
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.errors import ObjectExists

from .admission import MAX_SHARD_TEXT_BYTES


@dataclass(slots=True)
class Retried:
    """shards: what was admitted; passed_over: letters that were tried again, or have a newer version, by now."""

    shards: list[int] = field(default_factory=list)
    passages: int = 0
    passed_over: int = 0


def retry_letters(dataset: Dataset, index: DatasetIndex, letters: Sequence[FailedRow], *, job: str) -> Retried:
    """Admit failed passages again, for one job. Blocking. Raises StorageError when a shard cannot be written."""
    result = Retried()
    left = list(letters)
    while left:
        dataset.catch_up(index)
        shard = index.next_shard
        current = _still_current(index, left)
        result.passed_over += len(left) - len(current)
        if not current:
            break
        rows = list(_one_shard(dataset, current))
        origin = ShardOrigin(shard, job, retries={row: place for row, (place, _) in enumerate(rows)})
        try:
            table = dataset.append_passages(shard, [passage for _, passage in rows], origin=origin)
        except ObjectExists:
            left = current
            continue
        index.absorb(shard, table, origin)
        result.shards.append(shard)
        result.passages += len(rows)
        left = current[len(rows) :]
    return result


def _still_current(index: DatasetIndex, letters: Sequence[FailedRow]) -> list[FailedRow]:
    """Letters whose row is the newest one of the newest version of their id."""
    places = index.versions([letter.failure.id for letter in letters])

    def is_current(letter: FailedRow) -> bool:
        known = places.get(letter.failure.id)
        return known is not None and known[0] == (letter.failure.version, *letter.place)

    return [letter for letter in letters if is_current(letter)]


def _one_shard(dataset: Dataset, letters: Sequence[FailedRow]) -> Iterator[tuple[Place, Passage]]:
    """As many of them as fit into one shard, as they stand in the log."""
    columns: dict[str, list[Any]] = {}
    read, text_bytes = -1, 0
    for letter in letters[: dataset.info.shard_rows]:
        if letter.shard != read:
            columns, read = dataset.documents(letter.shard)[0].to_pydict(), letter.shard
        stored = {name: values[letter.failure.row] for name, values in columns.items() if name != "job"}
        text_bytes += len((stored["text"] or "").encode())
        yield letter.place, Passage(**stored)
        if text_bytes >= MAX_SHARD_TEXT_BYTES:
            return
