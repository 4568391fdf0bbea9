"""A dataset followed while it grows: each row that counts once, whatever order shards are committed or replaced in.

A shard is dealt with once: what of it does not count then never will, since only a higher version could have overruled it.
The rows of a replacement were those of the shards that it replaces, so they are passed over where those were dealt with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import SnapshotOutdated
from .blocks import Block, ShardDocuments, check_columns, read_block, read_documents
from .dataset import Dataset
from .layout import DELETED
from .snapshot import Snapshot, look

Place = tuple[int, int]
"""(shard, row)."""


def follow(
    dataset: Dataset,
    *,
    columns: Sequence[str],
    poll_s: float,
    until: threading.Event | Callable[[], bool] | None,
    seen: Snapshot | None,
) -> Iterator[Block]:
    """As `DatasetReader.follow` says. seen: what has been given before."""
    follower = Follower(dataset, check_columns(columns), seen)
    is_over: Callable[[], bool] = until.is_set if isinstance(until, threading.Event) else until or (lambda: False)
    pause = until.wait if isinstance(until, threading.Event) else time.sleep
    while True:
        is_last = is_over()
        saw_all = yield from follower.look()
        if not saw_all:
            continue
        if is_last:
            return
        pause(poll_s)


class Follower:
    """What has been dealt with so far: the numbers of shards."""

    def __init__(self, dataset: Dataset, columns: Sequence[str], seen: Snapshot | None) -> None:
        self._dataset = dataset
        self._columns = columns
        self._done = set(seen.shards) if seen else set[int]()
        # What they removed had not been given.
        self._passed_over = set(seen.retired if seen else dataset.retired())
        self._snapshot = seen

    def look(self) -> Generator[Block, None, bool]:
        """What is new. False: a shard was replaced meanwhile, and another look finds the replacement."""
        snapshot = self._snapshot = look(self._dataset, earlier=self._snapshot)
        for shard in sorted(snapshot.retired - self._done - self._passed_over):
            yield from self._take_retired(shard, snapshot)
        for shard in snapshot.shards:
            if shard in self._done:
                continue
            try:
                documents = read_documents(self._dataset, snapshot, shard, columns=self._columns)
            except SnapshotOutdated:
                return False
            fresh = self._fresh(shard, documents.marker.rows)
            try:
                block = self._block(shard, documents, rows=documents.counts & fresh, fresh=fresh)
            except SnapshotOutdated:
                return False
            self._done.add(shard)
            if len(block) or block.deleted:
                yield block
            del block, documents
        return True

    def _block(
        self, shard: int, documents: ShardDocuments, *, rows: NDArray[np.bool_], fresh: NDArray[np.bool_]
    ) -> Block:
        deleted = [documents.ids[row] for row in np.flatnonzero(documents.deletes & fresh)]
        return read_block(self._dataset, shard, documents, rows=rows, deleted=deleted)

    def _take_retired(self, shard: int, snapshot: Snapshot) -> Iterator[Block]:
        """Tell what a shard removed that was committed and replaced between two looks: the replacement may not say it any
        more. Its other rows come with the replacement."""
        marker = self._dataset.marker(shard)
        if marker is None or marker.count(DELETED):
            try:
                documents = read_documents(self._dataset, snapshot, shard, columns=self._columns)
            except SnapshotOutdated as error:
                raise self._fell_behind(shard) from error
            fresh = self._fresh(shard, documents.marker.rows)
            block = self._block(shard, documents, rows=np.zeros_like(fresh), fresh=fresh)
            if block.deleted:
                yield block
        self._passed_over.add(shard)

    def _fell_behind(self, shard: int) -> SnapshotOutdated:
        return SnapshotOutdated(
            f"shard {shard} of {self._dataset.url} came, was replaced and erased since the last look: "
            "what it removed or moved cannot be told any more, follow from the start again"
        )

    def _fresh(self, shard: int, rows: int) -> NDArray[np.bool_]:
        """(rows,): those that no shard that was dealt with has had."""
        fresh = np.ones(rows, dtype=bool)
        if not self._done or not self._dataset.admission(shard).replaces:
            return fresh
        carried: dict[int, Mapping[int, Place]] = {}
        for row in range(rows):
            fresh[row] = not self._has_had((shard, row), carried)
        return fresh

    def _has_had(self, place: Place, carried: dict[int, Mapping[int, Place]]) -> bool:
        """Whether the row, or one that it replaces, was in a shard that was dealt with. carried: what was read so far."""
        shard, row = place
        while shard not in self._done:
            if shard not in carried:
                origin = self._dataset.origin(shard)
                if origin.erased and origin.replaces:
                    raise self._fell_behind(shard)
                carried[shard] = origin.carried if origin.replaces else {}
            if row not in carried[shard]:
                return False
            shard, row = carried[shard][row]
        return True
