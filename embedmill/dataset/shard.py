"""The bytes of one Zarr v3 shard: encoded and decoded directly, without zarr-python, to the byte as it would.

A shard is its inner chunks in order, each C-order little-endian values followed by their crc32c, then the index: offset and
length of every chunk as uint64 little-endian (all ones for an absent chunk), then the crc32c of the index. Pure: no I/O.
"""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptStore

_ABSENT = 2**64 - 1
_CRC_BYTES = 4


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (Castagnoli), as Zarr's crc32c codec and Google Cloud Storage compute it."""
    return int(google_crc32c.value(bytes(data) if not isinstance(data, bytes) else data))


def encode_shard(vectors: NDArray[np.floating], *, shard_rows: int, chunk_rows: int) -> bytes:
    """The object of a shard whose first rows are `vectors` (n, dimensions), n <= shard_rows.

    Chunks that hold no row at all are absent; the last one is padded with NaN.
    """
    rows, dimensions = vectors.shape
    if rows > shard_rows or shard_rows % chunk_rows:
        raise ValueError(f"{rows} rows do not fit a shard of {shard_rows} rows in chunks of {chunk_rows}")
    values = np.ascontiguousarray(vectors, dtype=vectors.dtype.newbyteorder("<"))
    chunk_bytes = chunk_rows * dimensions * values.dtype.itemsize
    parts: list[bytes] = []
    index = np.full((shard_rows // chunk_rows, 2), _ABSENT, dtype="<u8")
    offset = 0
    for number, start in enumerate(range(0, rows, chunk_rows)):
        body = values[start : start + chunk_rows].tobytes()
        if len(body) < chunk_bytes:
            missing = (chunk_bytes - len(body)) // values.dtype.itemsize
            body += np.full(missing, np.nan, dtype=values.dtype).tobytes()
        parts += [body, struct.pack("<I", crc32c(body))]
        index[number] = (offset, chunk_bytes + _CRC_BYTES)
        offset += chunk_bytes + _CRC_BYTES
    footer = index.tobytes()
    return b"".join([*parts, footer, struct.pack("<I", crc32c(footer))])


def decode_shard(
    data: bytes,
    *,
    rows: int,
    dimensions: int,
    dtype: np.dtype[np.floating],
    shard_rows: int,
    chunk_rows: int,
    name: str,
) -> NDArray[np.floating]:
    """The first `rows` rows of a shard object, (rows, dimensions), every checksum verified; absent chunks are NaN.

    Raises CorruptStore, naming the object, for anything that `encode_shard` cannot have made.
    """
    chunks = shard_rows // chunk_rows
    footer_bytes = chunks * 16 + _CRC_BYTES
    if len(data) < footer_bytes:
        raise CorruptStore(f"{name} is cut short: {len(data)} bytes, and its index alone takes {footer_bytes}")
    footer = data[-footer_bytes:]
    _check(footer, f"the index of {name}")
    index = np.frombuffer(footer[:-_CRC_BYTES], dtype="<u8").reshape(chunks, 2)
    result = np.full((-(-rows // chunk_rows) * chunk_rows, dimensions), np.nan, dtype=dtype)
    chunk_bytes = chunk_rows * dimensions * dtype.itemsize
    view = memoryview(data)[:-footer_bytes]
    for number in range(len(result) // chunk_rows):
        offset, length = (int(value) for value in index[number])
        if offset == _ABSENT:
            continue
        body = view[offset : offset + length]
        if len(body) != chunk_bytes + _CRC_BYTES:
            raise CorruptStore(f"chunk {number} of {name} has {len(body)} bytes instead of {chunk_bytes + _CRC_BYTES}")
        _check(bytes(body), f"chunk {number} of {name}")
        start = number * chunk_rows
        values = np.frombuffer(body[:-_CRC_BYTES], dtype=dtype.newbyteorder("<"))
        result[start : start + chunk_rows] = values.reshape(chunk_rows, dimensions)
    return result[:rows]


def _check(block: bytes, name: str) -> None:
    expected = struct.unpack("<I", block[-_CRC_BYTES:])[0]
    if crc32c(block[:-_CRC_BYTES]) != expected:
        raise CorruptStore(f"the checksum of {name} does not hold")
