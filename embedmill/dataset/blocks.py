"""Committed rows as they are read: a shard at a time, vectors and documents side by side, every checksum verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import ConfigurationError, CorruptStore, SnapshotOutdated
from . import layout
from .dataset import Dataset, describe
from .layout import DELETED, EMBEDDED, Marker
from .passages import SCHEMA, decode_passages
from .snapshot import Snapshot, decided_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that count, side by side.

    addresses: (n,) int64, row of the dataset's array; ids: of each; vectors: (n, dimensions), writable, in C order;
    documents: `id` and the columns that were asked for.
    """

    addresses: NDArray[np.int64]
    ids: list[str]
    vectors: NDArray[np.floating]
    documents: pa.Table

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Block(Rows):
    """The rows of one shard that count. deleted: told by `follow` alone, the ids that this shard removes."""

    shard: int
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardDocuments:
    """All rows of a committed shard. ids and versions: (rows,); newest: the decided rows that nothing overrules."""

    marker: Marker
    table: pa.Table
    ids: list[str]
    newest: NDArray[np.bool_]

    @property
    def counts(self) -> NDArray[np.bool_]:
        """(rows,): embedded, and the newest of its id."""
        rows: NDArray[np.bool_] = self.newest & (self.marker.statuses == EMBEDDED)
        return rows

    @property
    def deletes(self) -> NDArray[np.bool_]:
        """(rows,): removes its id for now."""
        rows: NDArray[np.bool_] = self.newest & (self.marker.statuses == DELETED)
        return rows


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """With `id` in front. Raises ConfigurationError for one that documents do not have."""
    if isinstance(columns, str):
        columns = (columns,)
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise ConfigurationError(f"documents have no column {unknown[0]!r}: they have {', '.join(SCHEMA.names)}")
    return tuple(dict.fromkeys(("id", *columns)))


def read_documents(dataset: Dataset, snapshot: Snapshot, shard: int, *, columns: Sequence[str] = ()) -> ShardDocuments:
    """A shard's rows and which of them count. Raises CorruptStore, or SnapshotOutdated where the shard has left."""
    with outdated_where_it_left(dataset, shard):
        marker = dataset.marker(shard)
        key = layout.documents_key(shard)
        if marker is None:
            raise CorruptStore(f"{dataset.url}/{layout.commit_key(shard)} is missing")
        data = dataset.store.read(key)
        if describe(data) != marker.objects.get(key):
            raise CorruptStore(f"{dataset.url}/{key} is not what was committed")
        wanted = check_columns(columns)
        table, _ = decode_passages(
            data, name=f"{dataset.url}/{key}", columns=tuple(dict.fromkeys((*wanted, "version")))
        )
        if table.num_rows != marker.rows:
            raise CorruptStore(f"{dataset.url}/{key} has {table.num_rows} rows, and its marker says {marker.rows}")
        ids: list[str] = table["id"].to_numpy(zero_copy_only=False).tolist()
        newest = snapshot.decides(ids, table["version"].to_numpy(), among=decided_rows(marker))
        return ShardDocuments(marker, table.select(wanted), ids, newest)


def read_block(
    dataset: Dataset,
    shard: int,
    documents: ShardDocuments,
    *,
    rows: NDArray[np.bool_] | None = None,
    deleted: Sequence[str] = (),
) -> Block:
    """The vectors to a shard's documents. rows: (rows,), which of them; else those that count."""
    chosen = documents.counts if rows is None else rows
    places = np.flatnonzero(chosen)
    begin = shard * dataset.info.shard_rows
    table = documents.table
    if len(places) == 0:
        vectors: NDArray[np.floating] = np.empty((0, dataset.info.dimensions), dtype=dataset.info.dtype)
        return Block(begin + places, [], vectors, table.slice(0, 0), shard, tuple(deleted))
    with outdated_where_it_left(dataset, shard):
        vectors = dataset.vectors(shard)
    if len(places) == len(chosen):
        return Block(begin + places, documents.ids, vectors, table, shard, tuple(deleted))
    ids = [documents.ids[place] for place in places]
    return Block(begin + places, ids, vectors[places], table.take(places), shard, tuple(deleted))


def read_blocks(
    dataset: Dataset, snapshot: Snapshot, shards: Sequence[int], *, columns: Sequence[str], prefetch: bool
) -> Iterator[Block]:
    """A block for each shard that has rows that count. prefetch: one shard is read ahead, in a thread."""
    columns = check_columns(columns)

    def read(shard: int) -> Block:
        return read_block(dataset, shard, read_documents(dataset, snapshot, shard, columns=columns))

    found = _ahead(read, shards) if prefetch and len(shards) > 1 else map(read, shards)
    return (block for block in found if len(block))


def batches(blocks: Iterator[Block], size: int, *, shuffle: int | None) -> Iterator[Rows]:
    """Rows in batches of `size`, the last one smaller. shuffle: within each shard, by this seed."""
    waiting: list[Rows] = []
    held = 0
    for block in blocks:
        order = None
        if shuffle is not None:
            order = np.random.default_rng([shuffle, block.shard]).permutation(len(block))
        begin = 0
        while begin < len(block):
            end = min(begin + size - held, len(block))
            waiting.append(_part(block, slice(begin, end), order))
            held += end - begin
            begin = end
            if held == size:
                yield _joined(waiting)
                waiting, held = [], 0
        del block
    if waiting:
        yield _joined(waiting)


def _part(block: Block, rows: slice, order: NDArray[np.int64] | None) -> Rows:
    if order is None:
        # A copy: a batch that somebody keeps must not keep its shard.
        return Rows(block.addresses[rows].copy(), block.ids[rows], block.vectors[rows].copy(), block.documents[rows])
    places = order[rows]
    ids = [block.ids[place] for place in places]
    return Rows(block.addresses[places], ids, block.vectors[places], block.documents.take(places))


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([part.addresses for part in parts]),
        [id_ for part in parts for id_ in part.ids],
        np.concatenate([part.vectors for part in parts]),
        pa.concat_tables([part.documents for part in parts]),
    )


def _ahead(read: Callable[[int], Block], shards: Sequence[int]) -> Iterator[Block]:
    with ThreadPoolExecutor(1, thread_name_prefix="embedmill-reader") as pool:
        waiting = pool.submit(read, shards[0])
        for shard in shards[1:]:
            block = waiting.result()
            waiting = pool.submit(read, shard)
            yield block
            del block
        yield waiting.result()


@contextmanager
def outdated_where_it_left(dataset: Dataset, shard: int) -> Iterator[None]:
    """What is missing of a shard that was replaced or put aside since is no damage."""
    try:
        yield
    except CorruptStore as error:
        if shard in dataset.retired() or not dataset.store.exists(layout.commit_key(shard)):
            raise SnapshotOutdated(
                f"shard {shard} of {dataset.url} was replaced or taken away after this snapshot was taken: "
                "call refresh() and read again"
            ) from error
        raise
