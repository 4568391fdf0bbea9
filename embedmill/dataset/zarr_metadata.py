"""The Zarr metadata of the vector array, made by zarr-python, and the one change that it ever sees: a higher shape."""

from __future__ import annotations

import json
from typing import Any

import zarr
import zarr.codecs
import zarr.core.sync
import zarr.storage
from zarr.core.buffer import default_buffer_prototype

from ..errors import CorruptStore
from .layout import DATASET_KEY, ZARR_ARRAY_KEY, DatasetInfo


def create_metadata(info: DatasetInfo) -> tuple[bytes, bytes]:
    """`zarr.json` of the group and of the array `vectors`, with zero rows."""
    store = zarr.storage.MemoryStore()
    group = zarr.open_group(store, mode="w", zarr_format=3)
    embedding: dict[str, Any] = {**info.embedder.as_dict(), "fingerprint": info.embedder.fingerprint}
    group.attrs["embedding"] = embedding
    group.create_array(
        "vectors",
        shape=(0, info.dimensions),
        shards=(info.shard_rows, info.dimensions),
        chunks=(info.chunk_rows, info.dimensions),
        dtype=info.dtype,
        compressors=zarr.codecs.Crc32cCodec(),
        fill_value=float("nan"),
        dimension_names=["row", "dim"],
    )
    return _read(store, "zarr.json"), _read(store, "vectors/zarr.json")


def raise_shape(metadata: bytes, *, rows: int, name: str) -> bytes | None:
    """The array's metadata with at least `rows` rows; None when it has them already. Never lowers."""
    if shape_of(metadata, name=name) >= rows:
        return None
    record: dict[str, Any] = json.loads(metadata)
    record["shape"][0] = rows
    return json.dumps(record, indent=2).encode()


def check_array(metadata: bytes, info: DatasetInfo, *, url: str) -> None:
    """Raises CorruptStore when the array's metadata, but for its rows, is not what follows from `dataset.json`: one of both
    was edited, or something else has written there."""
    names = f"{url}/{ZARR_ARRAY_KEY} and {url}/{DATASET_KEY}"
    expected: dict[str, Any] = json.loads(create_metadata(info)[1])
    rows = shape_of(metadata, name=f"{url}/{ZARR_ARRAY_KEY}")
    found: dict[str, Any] = json.loads(metadata)
    expected["shape"][0] = rows
    fields = ("shape", "data_type", "chunk_grid", "codecs", "fill_value")
    differing = [field for field in fields if found.get(field) != expected[field]]
    if differing:
        raise CorruptStore(
            f"{names} do not agree in {', '.join(differing)}: one of them was edited or written over; put back the one that "
            "was there when the dataset was made"
        )


def shape_of(metadata: bytes, *, name: str) -> int:
    """Rows that the array's metadata shows."""
    try:
        return int(json.loads(metadata)["shape"][0])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CorruptStore(f"{name} is not the metadata of the vector array: {error}") from error


def _read(store: zarr.storage.MemoryStore, key: str) -> bytes:
    buffer = zarr.core.sync.sync(store.get(key, default_buffer_prototype()))
    if buffer is None:
        raise RuntimeError(f"zarr wrote no {key}")
    return bytes(buffer.to_bytes())
