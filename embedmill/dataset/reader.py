"""A dataset opened for reading: what is committed, joined with its documents. Never writes, needs no index and no Redis."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..embedder import EmbedderSpec
from ..errors import ConfigurationError, CorruptStore
from . import conversions, layout
from .blocks import Block, Rows, batches, outdated_where_it_left, read_block, read_blocks, read_documents
from .dataset import Dataset
from .following import follow
from .layout import EMBEDDED
from .snapshot import Snapshot, look
from .store import open_store
from .zarr_view import open_vectors

if TYPE_CHECKING:
    import dask.array
    import pyarrow as pa
    import xarray
    import zarr

Columns = Sequence[str]
_DOCUMENT_COLUMNS = ("text", "metadata")


def open_dataset(url: str | os.PathLike[str]) -> DatasetReader:
    """Open a dataset for reading, in a folder or an object store, as it is committed now.

    Raises ConfigurationError where there is none, or one of a newer format; CorruptStore for a broken one.
    """
    dataset = Dataset.open(os.fspath(url))
    return DatasetReader(dataset, look(dataset))


class DatasetReader:
    """A snapshot of a dataset: the newest embedded version of each id, in the order of admission.

    What is committed later shows after `refresh`. Vectors are checked against their checksums; damage raises CorruptStore,
    a shard that has been replaced since SnapshotOutdated. Memory: about a byte for each row, and the ids that have more
    than one version. Can be pickled, and shows the same rows then. Threads may share it while none refreshes it.
    """

    def __init__(self, dataset: Dataset, snapshot: Snapshot) -> None:
        self._dataset = dataset
        self._snapshot = snapshot
        self._counts: NDArray[np.int64] | None = None

    @property
    def url(self) -> str:
        return self._dataset.url

    @property
    def embedder(self) -> EmbedderSpec:
        """What made the vectors."""
        return self._dataset.info.embedder

    @property
    def dimensions(self) -> int:
        return self._dataset.info.dimensions

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return np.dtype(self._dataset.info.dtype)

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the shards in this snapshot, in order."""
        return self._snapshot.shards

    @property
    def vectors(self) -> zarr.Array[Any]:
        """The whole array, read-only, as zarr-python opens it: row = address. Also holds rows that do not count, such as
        older versions, and what is not committed yet."""
        return open_vectors(self._dataset.store, rows=self._end)

    @property
    def ids(self) -> Iterator[str]:
        """The ids of all rows, in order; one shard's in memory."""
        for shard in self.shards:
            documents = read_documents(self._dataset, self._snapshot, shard)
            yield from (documents.ids[row] for row in np.flatnonzero(documents.counts))

    def __len__(self) -> int:
        """Rows that count. The first call reads the ids of all shards, if any id has more than one version."""
        return int(self.rows_per_shard.sum())

    def __repr__(self) -> str:
        shards = len(self.shards)
        return f"<dataset {self.url}: {shards} shards of {self.embedder.model}, {self.dimensions} x {self.dtype}>"

    def refresh(self) -> bool:
        """Look again; whether anything has changed."""
        snapshot = look(self._dataset, earlier=self._snapshot)
        changed = snapshot != self._snapshot
        if changed:
            self._snapshot, self._counts = snapshot, None
        return changed

    @property
    def rows_per_shard(self) -> NDArray[np.int64]:
        """(shards,): rows that count, of each of `shards`."""
        if self._counts is None:
            self._counts = np.array([self._count(shard) for shard in self.shards], dtype=np.int64)
        return self._counts

    def blocks(self, columns: Columns = (), *, prefetch: bool = False) -> Iterator[Block]:
        """A block for each shard with rows that count, in order. columns: of the documents, beside `id`.

        Two shards are in memory at most: the block at hand and the one that is read. prefetch: read it in a thread.
        """
        return read_blocks(self._dataset, self._snapshot, self.shards, columns=columns, prefetch=prefetch)

    def batches(
        self,
        size: int,
        columns: Columns = (),
        *,
        shuffle: int | None = None,
        part: tuple[int, int] = (0, 1),
        prefetch: bool = False,
    ) -> Iterator[Rows]:
        """All rows once, `size` at a time, the last batch smaller; arrays are writable and in C order.

        shuffle: a seed; the shards come in random order, and the rows within each. part: (k, n), the k-th of n parts that
        together hold every row once, by shards, as the workers of a DataLoader need them.
        """
        number, parts = part
        if size < 1 or not 0 <= number < parts:
            raise ConfigurationError(
                f"size {size}, part {part}: at least one row to a batch, and a part (k, n) with 0 <= k < n"
            )
        shards = list(self.shards)
        if shuffle is not None:
            shards = [shards[place] for place in np.random.default_rng(shuffle).permutation(len(shards))]
        chosen = shards[number::parts]
        blocks = read_blocks(self._dataset, self._snapshot, chosen, columns=columns, prefetch=prefetch)
        return batches(blocks, size, shuffle=shuffle)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """As `self[0]`, `self[1]`, and so on, a shard at a time."""
        for block in self.blocks():
            for address, vector in zip(block.addresses, block.vectors, strict=True):
                yield {"address": int(address), "vector": vector}

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The address and the vector of a row, in the order of `ids`. Reads the whole chunk, and checks it."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several at once, as torch's DataLoader asks for them; chunks that they share are read once."""
        addresses = self._addresses(np.array([operator.index(row) for row in rows], dtype=np.int64))
        vectors = self._rows_at(addresses)
        return [{"address": int(one), "vector": vector} for one, vector in zip(addresses, vectors, strict=True)]

    def to_numpy(self) -> NDArray[np.floating]:
        """All vectors, (len(self), dimensions), in the order of `ids`."""
        return conversions.to_numpy(self)

    def to_arrow(self, columns: Columns = _DOCUMENT_COLUMNS) -> pa.Table:
        """`id`, the columns and `vector`, a list of fixed size; all of it in memory."""
        return self.arrow_reader(columns).read_all()

    def arrow_reader(self, columns: Columns = _DOCUMENT_COLUMNS) -> pa.RecordBatchReader:
        """The same a shard at a time, for whatever reads Arrow streams."""
        return conversions.arrow_reader(self, columns)

    def to_dask(self) -> dask.array.Array:
        """All vectors, (len(self), dimensions), a chunk for each shard, read when they are computed."""
        return conversions.to_dask(self)

    def to_xarray(self) -> xarray.DataArray:
        """The same with dimensions `row` and `dim`, and the coordinates `id` and `address`, which are lazy too."""
        return conversions.to_xarray(self)

    def follow(
        self,
        columns: Columns = (),
        *,
        poll_s: float = 1.0,
        until: threading.Event | Callable[[], bool] | None = None,
        from_start: bool = True,
    ) -> Iterator[Block]:
        """Blocks as shards are committed, in any order, until `until`; each row at most once.

        A row that a committed higher version overrules is left out; ids that a shard removes are told as `block.deleted`.
        When a shard's replacement comes, only those of its rows come that have not come before.
        from_start: begin with all that is committed; else with what is not in this snapshot. until: looked at before each
        look at the dataset; the look after it is true is the last. This snapshot stays as it is.

        Raises SnapshotOutdated when a shard that came and went since the last look is erased already, since what it removed
        cannot be told any more.
        """
        return follow(
            self._dataset, columns=columns, poll_s=poll_s, until=until, seen=None if from_start else self._snapshot
        )

    def read_vectors(self, shard: int) -> NDArray[np.floating]:
        """The vectors of a shard's rows that count, (n, dimensions)."""
        return read_block(self._dataset, shard, read_documents(self._dataset, self._snapshot, shard)).vectors

    def read_ids(self, shard: int) -> NDArray[np.object_]:
        """The ids of a shard's rows that count."""
        documents = read_documents(self._dataset, self._snapshot, shard)
        return np.array(documents.ids, dtype=object)[documents.counts]

    def read_addresses(self, shard: int) -> NDArray[np.int64]:
        """The addresses of a shard's rows that count."""
        begin = shard * self._dataset.info.shard_rows
        marker = self._dataset.marker(shard)
        if marker is not None and not self._snapshot.newest:
            return begin + np.flatnonzero(marker.statuses == EMBEDDED)
        return begin + np.flatnonzero(read_documents(self._dataset, self._snapshot, shard).counts)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "info": self._dataset.info, "snapshot": self._snapshot, "counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dataset = Dataset(open_store(state["url"]), state["info"])
        self._snapshot = state["snapshot"]
        self._counts = state["counts"]

    @property
    def _end(self) -> int:
        if not self.shards:
            return 0
        last = self.shards[-1]
        marker = self._dataset.marker(last)
        return last * self._dataset.info.shard_rows + (marker.rows if marker else 0)

    def _count(self, shard: int) -> int:
        marker = self._dataset.marker(shard)
        if not self._snapshot.newest and marker is not None:
            return marker.count(EMBEDDED)
        return int(read_documents(self._dataset, self._snapshot, shard).counts.sum())

    def _addresses(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        ends = np.cumsum(self.rows_per_shard)
        length = int(ends[-1]) if len(ends) else 0
        wanted = np.where(rows < 0, rows + length, rows)
        if ((wanted < 0) | (wanted >= length)).any():
            raise IndexError(f"{self.url} has {length} rows")
        addresses = np.empty_like(wanted)
        places = np.searchsorted(ends, wanted, side="right")
        for place in np.unique(places):
            chosen = places == place
            begin = ends[place] - self.rows_per_shard[place]
            addresses[chosen] = self.read_addresses(self.shards[place])[wanted[chosen] - begin]
        return addresses

    def _rows_at(self, addresses: NDArray[np.int64]) -> NDArray[np.floating]:
        array = self.vectors
        found = np.empty((len(addresses), self.dimensions), dtype=self.dtype)
        shards = addresses // self._dataset.info.shard_rows
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            name = f"{self.url}/{layout.vectors_key(shard)}"
            with outdated_where_it_left(self._dataset, shard):
                try:
                    found[chosen] = array.oindex[addresses[chosen]]
                except ValueError as error:
                    raise CorruptStore(f"{name}: {error}") from error
                if np.isnan(found[chosen]).any():
                    # What zarr-python shows of an object that is not there.
                    raise CorruptStore(f"{name} has no vector for a row that its marker calls embedded")
        return found
