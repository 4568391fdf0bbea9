"""Which row of an id counts: the highest committed version that is embedded or deleted.

A failed or cancelled version decides nothing, so the one before it stays. Never by the address: rows move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .dataset import Dataset
from .layout import DELETED, EMBEDDED

Place = tuple[int, int, int]
"""(version, shard, row)."""

StatusOf = Callable[[int, int], int | None]
"""The committed status of (shard, row); None when that shard is not committed."""


def newest_decided(places: Sequence[Place], status_of: StatusOf) -> Place | None:
    """The highest version that is committed and embedded or deleted."""
    decided = [place for place in places if status_of(place[1], place[2]) in (EMBEDDED, DELETED)]
    return max(decided, default=None)


def status_reader(dataset: Dataset, committed: Collection[int]) -> StatusOf:
    """The committed status of (shard, row); None for shards outside of `committed`."""

    def status_of(shard: int, row: int) -> int | None:
        marker = dataset.marker(shard) if shard in committed else None
        return None if marker is None else int(marker.statuses[row])

    return status_of
