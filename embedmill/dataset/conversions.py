"""What a reader shows, as other tools take it: NumPy, Arrow, dask, xarray. The last two are optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import ConfigurationError
from .blocks import Block, check_columns
from .passages import SCHEMA

if TYPE_CHECKING:
    import dask.array
    import xarray

    from .reader import DatasetReader


def to_numpy(reader: DatasetReader) -> NDArray[np.floating]:
    result = np.empty((len(reader), reader.dimensions), dtype=reader.dtype)
    end = 0
    for block in reader.blocks():
        result[end : end + len(block)] = block.vectors
        end += len(block)
    return result


def arrow_reader(reader: DatasetReader, columns: Sequence[str]) -> pa.RecordBatchReader:
    names = check_columns(columns)
    vector = pa.list_(pa.from_numpy_dtype(reader.dtype), reader.dimensions)
    schema = pa.schema([*(SCHEMA.field(name) for name in names), pa.field("vector", vector)])

    def record_batches() -> Iterator[pa.RecordBatch]:
        for block in reader.blocks(names):
            yield from _record_batches(block, schema)

    return pa.RecordBatchReader.from_batches(schema, record_batches())


def to_dask(reader: DatasetReader) -> dask.array.Array:
    _require("dask.array", package="dask[array]")
    return _by_shard(reader, "read_vectors", reader.dtype, columns=(reader.dimensions,))


def to_xarray(reader: DatasetReader) -> xarray.DataArray:
    _require("dask.array", package="dask[array]")
    arrays = _require("xarray", package="xarray")
    ids = _by_shard(reader, "read_ids", np.dtype(object))
    addresses = _by_shard(reader, "read_addresses", np.dtype(np.int64))
    array: xarray.DataArray = arrays.DataArray(
        to_dask(reader),
        dims=("row", "dim"),
        coords={"id": ("row", ids), "address": ("row", addresses)},
        name="vectors",
        attrs={**reader.embedder.as_dict(), "fingerprint": reader.embedder.fingerprint},
    )
    return array


def _record_batches(block: Block, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    vector = pa.FixedSizeListArray.from_arrays(pa.array(block.vectors.reshape(-1)), block.vectors.shape[1])
    columns = [block.documents[name] for name in schema.names[:-1]]
    yield from pa.Table.from_arrays([*columns, vector], schema=schema).to_batches()


def _by_shard(
    reader: DatasetReader, method: str, dtype: np.dtype[Any], *, columns: tuple[int, ...] = ()
) -> dask.array.Array:
    """An array of what `method` gives for each shard that has rows."""
    delayed, arrays = importlib.import_module("dask.delayed"), importlib.import_module("dask.array")
    lazy = getattr(delayed.delayed(reader, pure=False, traverse=False), method)
    parts = [
        arrays.from_delayed(lazy(shard), shape=(int(rows), *columns), dtype=dtype)
        for shard, rows in zip(reader.shards, reader.rows_per_shard, strict=True)
        if rows
    ]
    if not parts:
        parts = [arrays.from_array(np.empty((0, *columns), dtype=dtype), chunks=-1)]
    joined: dask.array.Array = arrays.concatenate(parts, axis=0)
    return joined


def _require(module: str, *, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigurationError(
            f"{package} is not installed, and this needs it: pip install 'embedmill[arrays]', or pip install '{package}'"
        ) from None
