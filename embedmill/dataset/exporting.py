"""Rows that count, as files for tools that know no Zarr: NumPy, Parquet, fvecs and FAISS. A shard in memory at a time.

Row i of a file of vectors is line i of `ids.txt` beside it, in UTF-8 with `\\n` behind each: ids have no control characters,
any language reads it, and neither pickles nor fixed-width strings are needed. Parquet has its ids in a column.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import ConfigurationError, SnapshotOutdated, StorageError
from ..failpoints import failpoint
from .blocks import Rows, check_columns
from .export_folder import MANIFEST, whole_folder, write_manifest
from .passages import SCHEMA
from .reader import DatasetReader

Format = Literal["npy", "parquet", "fvecs", "faiss"]
Metric = Literal["ip", "l2"]
Progress = Callable[[int], None]
"""Is called with the rows that were written since the last call."""

IDS_FILE = "ids.txt"
_VECTOR_FILES = {"npy": "vectors.npy", "fvecs": "vectors.fvecs", "faiss": "index.faiss"}
_PARQUET_FILE = "part-{:05d}.parquet"
_FILES = (*_VECTOR_FILES.values(), _PARQUET_FILE.format(0))
_ALWAYS = ("id", "vector")
_ROW_GROUP_ROWS = 4096
_PARQUET_FILE_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class Choice:
    """What to write. columns: of the documents, for parquet; dtype: None for the dataset's; metric: of the faiss index."""

    format: Format
    columns: Sequence[str] | None = None
    dtype: str | None = None
    metric: Metric | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """files: bytes by name; norms: the least and the greatest L2 norm of a vector, None where there are no rows."""

    path: str
    format: Format
    rows: int
    dimensions: int
    dtype: str
    metric: Metric | None
    norms: tuple[float, float] | None
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes}


def export(reader: DatasetReader, target: Path, choice: Choice, *, overwrite: bool, progress: Progress) -> Exported:
    """Write the rows of a reader's snapshot into the folder `target`, whole or not at all.

    Raises ConfigurationError for what cannot be written as asked, StorageError where the disk refuses or is too small,
    SnapshotOutdated where the dataset was compacted meanwhile.
    """
    try:
        return _export(reader, target, choice, overwrite=overwrite, progress=progress)
    except SnapshotOutdated as error:
        raise SnapshotOutdated(
            f"{reader.url} was compacted while it was exported, and what was replaced is deleted: "
            "run the same command again"
        ) from error


def _export(reader: DatasetReader, target: Path, choice: Choice, *, overwrite: bool, progress: Progress) -> Exported:
    dtype = _settle_dtype(reader, choice)
    _check_target(reader, target)
    columns = _settle_columns(choice)
    metric: Metric | None = (choice.metric or "ip") if choice.format == "faiss" else None
    rows = len(reader)
    with whole_folder(target, overwrite=overwrite) as folder:
        _check_space(target, rows * reader.dimensions * dtype.itemsize)
        seen = _Seen(progress)
        if choice.format == "parquet":
            _write_parquet(folder, reader, seen, columns, dtype)
        else:
            _write_matrix(folder, reader, seen, choice.format, dtype, metric, rows=rows)
        made = Exported(str(target), choice.format, rows, reader.dimensions, dtype.name, metric, seen.norms, {})
        files = write_manifest(folder, _manifest(reader, made))
        files[MANIFEST] = (folder / MANIFEST).stat().st_size
    return replace(made, files=files)


class _Seen:
    """Rows on their way to a file: counted, and their norms looked at."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.norms: tuple[float, float] | None = None

    def __call__(self, found: Iterator[Rows]) -> Iterator[Rows]:
        for rows in found:
            norms = np.linalg.norm(rows.vectors.astype(np.float32, copy=False), axis=1)
            least, greatest = self.norms or (np.inf, 0.0)
            self.norms = (min(least, float(norms.min())), max(greatest, float(norms.max())))
            yield rows
            self._progress(len(rows))
            failpoint("export.after_rows")


def _settle_dtype(reader: DatasetReader, choice: Choice) -> np.dtype[np.floating[Any]]:
    """Little-endian, whatever this machine is."""
    if choice.format in ("fvecs", "faiss"):
        if choice.dtype not in (None, "float32"):
            raise ConfigurationError(f"--format {choice.format} is float32: leave --dtype {choice.dtype} away")
        return np.dtype("<f4")
    return np.dtype(choice.dtype or reader.dtype.name).newbyteorder("<")


def _settle_columns(choice: Choice) -> tuple[str, ...]:
    if choice.format != "parquet":
        if choice.columns is not None:
            raise ConfigurationError(f"--columns is for --format parquet: --format {choice.format} has vectors and ids")
        return ()
    wanted = ("text", "metadata") if choice.columns is None else choice.columns
    return check_columns([name for name in wanted if name not in _ALWAYS])


def _check_target(reader: DatasetReader, target: Path) -> None:
    made = next((name for name in _FILES if target.suffix and name.endswith(target.suffix)), None)
    if made is not None:
        raise ConfigurationError(f"--to {target.name}: name a folder, without {target.suffix}; {made} comes into it")
    if "://" not in reader.url and target.is_relative_to(Path(reader.url).resolve()):
        raise ConfigurationError(f"{target} is inside of the dataset: --to takes a folder elsewhere")


def _check_space(target: Path, vector_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if vector_bytes > free:
        raise StorageError(
            f"{target} needs {vector_bytes / 1e9:,.1f} GB for its vectors alone, and its disk has {free / 1e9:,.1f} GB free"
        )


def _manifest(reader: DatasetReader, made: Exported) -> dict[str, Any]:
    return {
        "dataset": reader.url,
        "embedder": reader.embedder.as_dict(),
        "fingerprint": reader.embedder.fingerprint,
        "rows": made.rows,
        "dimensions": made.dimensions,
        "dtype": made.dtype,
        "metric": made.metric,
    }


def _write_matrix(
    folder: Path,
    reader: DatasetReader,
    seen: _Seen,
    format_: Format,
    dtype: np.dtype[np.floating[Any]],
    metric: Metric | None,
    *,
    rows: int,
) -> None:
    with (folder / _VECTOR_FILES[format_]).open("wb") as vectors, (folder / IDS_FILE).open("wb") as ids:
        if format_ == "npy":
            vectors.write(_npy_header(rows, reader.dimensions, dtype))
        elif format_ == "faiss":
            vectors.write(_faiss_header(rows, reader.dimensions, cast(Metric, metric)))
        for block in seen(iter(reader.blocks(prefetch=True))):
            values = _as_dtype(block.vectors, dtype)
            vectors.write(_fvecs(values) if format_ == "fvecs" else values.data)
            ids.write("".join(f"{id_}\n" for id_ in block.ids).encode())


def _npy_header(rows: int, dimensions: int, dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    descriptor = {"descr": dtype.str, "fortran_order": False, "shape": (rows, dimensions)}
    np.lib.format.write_array_header_1_0(buffer, descriptor)
    return buffer.getvalue()


def _faiss_header(rows: int, dimensions: int, metric: Metric) -> bytes:
    """Of an IndexFlatIP or IndexFlatL2, as `write_index` of faiss/impl/index_write.cpp has written it since 2017. The values
    follow, row by row. Written here, since faiss itself would need the whole index in memory."""
    kind, number = (b"IxFI", 0) if metric == "ip" else (b"IxF2", 1)
    unused = 1 << 20
    return struct.pack("<4siqqq?iQ", kind, dimensions, rows, unused, unused, True, number, rows * dimensions)


def _fvecs(values: NDArray[np.floating[Any]]) -> memoryview:
    """Each row with its length before it."""
    rows = np.empty((len(values), values.shape[1] + 1), dtype="<i4")
    rows[:, 0] = values.shape[1]
    rows[:, 1:] = values.view("<i4")
    return rows.data


def _as_dtype(vectors: NDArray[np.floating[Any]], dtype: np.dtype[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Raises ConfigurationError for a number that float16 cannot hold."""
    with np.errstate(over="ignore"):
        values = vectors.astype(dtype, copy=False)
    if values.dtype.itemsize < vectors.dtype.itemsize and not np.isfinite(values).all():
        raise ConfigurationError("a vector has a number too large for float16: leave --dtype float16 away")
    return values


def _write_parquet(
    folder: Path, reader: DatasetReader, seen: _Seen, columns: Sequence[str], dtype: np.dtype[np.floating[Any]]
) -> None:
    """Files of some 500 MB, so that they can be read and copied side by side; one without rows for an empty dataset."""
    vector = pa.list_(pa.from_numpy_dtype(dtype), reader.dimensions)
    embedding = {**reader.embedder.as_dict(), "fingerprint": reader.embedder.fingerprint}
    schema = pa.schema(
        [*(SCHEMA.field(name) for name in columns), pa.field("vector", vector)],
        metadata={"embedding": json.dumps(embedding)},
    )
    found = seen(reader.batches(_ROW_GROUP_ROWS, columns, prefetch=True))
    rows: Rows | None = next(found, None)
    number = 0
    while rows is not None or number == 0:
        with (folder / _PARQUET_FILE.format(number)).open("wb") as file, _parquet_writer(file, schema) as writer:
            while rows is not None and file.tell() < _PARQUET_FILE_BYTES:
                writer.write_table(_table(rows, schema, dtype), row_group_size=_ROW_GROUP_ROWS)
                rows = next(found, None)
        number += 1


def _parquet_writer(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Floats as they are: compression makes them no smaller."""
    documents = [name for name in schema.names if name != "vector"]
    compression: dict[str, Any] = dict.fromkeys(documents, "zstd") | {"vector.list.element": "none"}
    return pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False, write_statistics=documents)


def _table(rows: Rows, schema: pa.Schema, dtype: np.dtype[np.floating[Any]]) -> pa.Table:
    values = _as_dtype(rows.vectors, dtype)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    columns = [rows.documents[name] for name in schema.names[:-1]]
    return pa.Table.from_arrays([*columns, vector], schema=schema)
