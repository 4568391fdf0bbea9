"""The bytes of one Zarr v3 shard: encoded and decoded directly, without zarr-python, to the byte as it would.

A shard is its inner chunks in order, each C-order little-endian values followed by their crc32c, then the index: offset and
length of every chunk as uint64 little-endian (all ones for an absent chunk), then the crc32c of the index. Pure: no I/O.

Values are read once for all checksums: that of the whole object is put together from those of its parts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptStore

_ABSENT = 2**64 - 1
_CRC_BYTES = 4
_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """An object as the buffers that it is made of, in order. They show the values that were encoded, which must not change
    before they are written. size: in bytes; crc32c: of all of it, which is the same for all shards of a size, since every
    chunk ends with its own; values_crc32c: of the values of its chunks, padding and all, and of nothing else."""

    parts: tuple[bytes | memoryview, ...]
    size: int
    crc32c: int
    values_crc32c: int

    def join(self) -> bytes:
        return b"".join(self.parts)


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """vectors: (rows, dimensions), writable, in C order; the rest as in `EncodedShard`."""

    vectors: NDArray[np.floating]
    size: int
    crc32c: int
    values_crc32c: int


def crc32c(data: bytes | bytearray | memoryview | Bytes) -> int:
    """CRC-32C (Castagnoli), as Zarr's crc32c codec and Google Cloud Storage compute it. Copies nothing."""
    # google_crc32c takes bytes and arrays, and refuses other buffers that could be written to.
    direct = isinstance(data, (bytes, np.ndarray))
    return int(google_crc32c.value(data if direct else np.frombuffer(data, dtype=np.uint8)))


def combine(first: int, second: int, *, second_bytes: int) -> int:
    """The crc32c of two byte strings in a row, from the crc32c of each and the length of the second."""
    return _multiply(_power(second_bytes), first) ^ second


def encode_shard(vectors: NDArray[np.floating], *, shard_rows: int, chunk_rows: int) -> EncodedShard:
    """The object of a shard whose first rows are `vectors` (n, dimensions), n <= shard_rows.

    Chunks that hold no row at all are absent; the last one is padded with NaN.
    """
    rows, dimensions = vectors.shape
    if rows > shard_rows or shard_rows % chunk_rows:
        raise ValueError(f"{rows} rows do not fit a shard of {shard_rows} rows in chunks of {chunk_rows}")
    values = np.ascontiguousarray(vectors, dtype=vectors.dtype.newbyteorder("<"))
    chunk_bytes = chunk_rows * dimensions * values.dtype.itemsize
    parts: list[bytes | memoryview] = []
    index = np.full((shard_rows // chunk_rows, 2), _ABSENT, dtype="<u8")
    offset = checksum = of_values = 0
    for number, start in enumerate(range(0, rows, chunk_rows)):
        chunk = values[start : start + chunk_rows]
        if len(chunk) < chunk_rows:
            padding = np.full((chunk_rows - len(chunk), dimensions), np.nan, dtype=values.dtype)
            chunk = np.concatenate([chunk, padding])
        body = chunk.reshape(-1).view(np.uint8)
        checksum, own = _append(checksum, body)
        of_values = combine(of_values, own, second_bytes=len(body))
        parts += [body.data, struct.pack("<I", own)]
        index[number] = (offset, chunk_bytes + _CRC_BYTES)
        offset += chunk_bytes + _CRC_BYTES
    footer = index.tobytes()
    checksum, own = _append(checksum, np.frombuffer(footer, dtype=np.uint8))
    parts += [footer, struct.pack("<I", own)]
    return EncodedShard(tuple(parts), offset + len(footer) + _CRC_BYTES, checksum, of_values)


def decode_shard(
    data: bytes | bytearray | memoryview,
    *,
    rows: int,
    dimensions: int,
    dtype: np.dtype[np.floating],
    shard_rows: int,
    chunk_rows: int,
    name: str,
) -> DecodedShard:
    """The first `rows` rows of a shard object, every checksum verified; absent chunks are NaN.

    Memory that can be written to is given away: the vectors may lie in it then, and nothing is copied but within it.
    Raises CorruptStore, naming the object, for anything that `encode_shard` cannot have made.
    """
    chunks = shard_rows // chunk_rows
    footer_bytes = chunks * 16 + _CRC_BYTES
    if len(data) < footer_bytes:
        raise CorruptStore(f"{name} is cut short: {len(data)} bytes, and its index alone takes {footer_bytes}")
    view = np.frombuffer(data, dtype=np.uint8)
    _, footer_crc32c = _verify(view[-footer_bytes:], f"the index of {name}")
    stored = dtype.newbyteorder("<")
    value_bytes = chunk_rows * dimensions * dtype.itemsize
    block_bytes = value_bytes + _CRC_BYTES
    needed = -(-rows // chunk_rows)
    index = view[-footer_bytes:-_CRC_BYTES].view("<u8").reshape(chunks, 2)[:needed].tolist()
    body = view[:-footer_bytes]
    in_order = len(body) == needed * block_bytes and [offset for offset, _ in index] == [
        *range(0, len(body), block_bytes)
    ]
    in_place = in_order and view.flags.writeable
    # Values only ever move towards the beginning, over what was verified before.
    target = body[: needed * value_bytes] if in_place else np.empty(needed * value_bytes, dtype=np.uint8)
    whole = of_values = 0
    for number, (offset, length) in enumerate(index):
        chunk = target[number * value_bytes : (number + 1) * value_bytes]
        if offset == _ABSENT:
            chunk.view(stored)[:] = np.nan
            continue
        block = body[offset : offset + length]
        if len(block) != block_bytes:
            raise CorruptStore(f"chunk {number} of {name} has {len(block)} bytes instead of {block_bytes}")
        own, of_block = _verify(block, f"chunk {number} of {name}")
        whole = combine(whole, of_block, second_bytes=block_bytes)
        of_values = combine(of_values, own, second_bytes=value_bytes)
        chunk.data[:] = block[:-_CRC_BYTES].data
    whole = combine(whole, footer_crc32c, second_bytes=footer_bytes) if in_order else crc32c(view)
    vectors = target.view(stored).reshape(needed * chunk_rows, dimensions)[:rows]
    return DecodedShard(vectors.astype(dtype, copy=False), len(view), whole, of_values)


def _append(checksum: int, block: Bytes) -> tuple[int, int]:
    """The crc32c of what was written so far (`checksum`), a block and the block's own crc32c; and the latter."""
    own = crc32c(block)
    both = int(google_crc32c.extend(own, struct.pack("<I", own)))
    return combine(checksum, both, second_bytes=len(block) + _CRC_BYTES), own


def _verify(block: Bytes, name: str) -> tuple[int, int]:
    """The crc32c of what a block holds before its last four bytes, which must be just that, and the crc32c of it all."""
    suffix = block[-_CRC_BYTES:].tobytes()
    found = crc32c(block[:-_CRC_BYTES])
    if struct.pack("<I", found) != suffix:
        raise CorruptStore(f"the checksum of {name} does not hold")
    return found, int(google_crc32c.extend(found, suffix))


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial, bits reflected: x**0 is the highest."""
    product = 0
    mask = _ONE
    while mask:
        if a & mask:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
        mask >>= 1
    return product


@cache
def _power(length: int) -> int:
    """x ** (8 * length) modulo the polynomial. A dataset has two lengths: a chunk's and the index's."""
    result, square = _ONE, _ONE >> 8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result
