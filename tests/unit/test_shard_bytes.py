"""The bytes of a shard, held against zarr-python's and against damage."""

from __future__ import annotations

import dataclasses
import re

import google_crc32c
import numpy as np
import pytest
import zarr
import zarr.codecs
import zarr.core.sync
import zarr.storage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype

from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.shard import DecodedShard, combine, crc32c, decode_shard, encode_shard
from embedmill.dataset.zarr_metadata import create_metadata, raise_shape, shape_of
from embedmill.embedder import EmbedderSpec
from embedmill.errors import CorruptStore

SHARD_ROWS, CHUNK_ROWS = 8, 4
DTYPES = ["float32", "float16"]


def vectors(rows: int, dimensions: int, dtype: str) -> NDArray[np.floating]:
    return np.random.default_rng(rows).standard_normal((rows, dimensions)).astype(dtype)


def info_of(dimensions: int, dtype: str, shard_rows: int, chunk_rows: int) -> DatasetInfo:
    spec = EmbedderSpec(model=f"null/{dimensions}", dimensions=dimensions)
    return DatasetInfo("d0", "2026-01-01", spec, dtype, shard_rows, chunk_rows)


def zarr_bytes(values: NDArray[np.floating], *, shard: int, shard_rows: int, chunk_rows: int) -> bytes:
    """The object that zarr-python writes for these rows, into an array made of our metadata."""
    rows, dimensions = values.shape
    info = info_of(dimensions, str(values.dtype), shard_rows, chunk_rows)
    _, metadata = create_metadata(info)
    metadata = raise_shape(metadata, rows=shard * shard_rows + rows, name="zarr.json") or metadata
    store = zarr.storage.MemoryStore()
    prototype = default_buffer_prototype()
    zarr.core.sync.sync(store.set("zarr.json", prototype.buffer.from_bytes(metadata)))
    array = zarr.open_array(store, mode="r+")
    array[shard * shard_rows :] = values
    stored = zarr.core.sync.sync(store.get(f"c/{shard}/0", prototype))
    assert stored is not None
    return bytes(stored.to_bytes())


def encoded(values: NDArray[np.floating], *, shard_rows: int = SHARD_ROWS, chunk_rows: int = CHUNK_ROWS) -> bytes:
    """The object, whose size and checksum are those that were computed beside it."""
    shard = encode_shard(values, shard_rows=shard_rows, chunk_rows=chunk_rows)
    data = shard.join()
    assert (shard.size, shard.crc32c) == (len(data), crc32c(data))
    return data


def decoded(data: bytes, rows: int, dimensions: int, dtype: str) -> NDArray[np.floating]:
    """Decoded from memory that must stay as it is, and in memory that is given away, with the same result."""

    def decode(buffer: bytes | bytearray) -> DecodedShard:
        return decode_shard(
            buffer,
            rows=rows,
            dimensions=dimensions,
            dtype=np.dtype(dtype),
            shard_rows=SHARD_ROWS,
            chunk_rows=CHUNK_ROWS,
            name="c/0/0",
        )

    try:
        shard = decode(data)
    except CorruptStore as error:
        with pytest.raises(CorruptStore, match=f"^{re.escape(str(error))}$"):
            decode(bytearray(data))
        raise
    in_place = decode(bytearray(data))
    np.testing.assert_array_equal(in_place.vectors, shard.vectors)
    assert (shard.size, shard.crc32c) == (in_place.size, in_place.crc32c) == (len(data), crc32c(data))
    assert shard.vectors.flags.c_contiguous
    assert in_place.vectors.flags.c_contiguous
    return shard.vectors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(1, id="one row"),
        pytest.param(3, id="part of a chunk"),
        pytest.param(4, id="up to the border of a chunk"),
        pytest.param(5, id="one row behind the border"),
        pytest.param(8, id="full"),
    ],
)
@pytest.mark.parametrize("shard", [0, 2])
def test_a_shard_is_to_the_byte_what_zarr_writes(rows: int, dtype: str, shard: int) -> None:
    values = vectors(rows, 3, dtype)
    ours = encoded(values)
    assert ours == zarr_bytes(values, shard=shard, shard_rows=SHARD_ROWS, chunk_rows=CHUNK_ROWS)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), dimensions=st.integers(1, 9), chunk_rows=st.integers(1, 5))
def test_any_shape_is_to_the_byte_what_zarr_writes(
    data: st.DataObject, dtype: str, dimensions: int, chunk_rows: int
) -> None:
    shard_rows = chunk_rows * data.draw(st.integers(1, 4), label="chunks")
    values = vectors(data.draw(st.integers(1, shard_rows), label="rows"), dimensions, dtype)
    ours = encoded(values, shard_rows=shard_rows, chunk_rows=chunk_rows)
    assert ours == zarr_bytes(values, shard=0, shard_rows=shard_rows, chunk_rows=chunk_rows)


@pytest.mark.parametrize("rows", [1, 6])
def test_rows_without_a_vector_are_nan_and_still_what_zarr_writes(rows: int) -> None:
    values = vectors(rows, 3, "float32")
    values[rows // 2] = np.nan
    ours = encoded(values)
    np.testing.assert_array_equal(decoded(ours, rows, 3, "float32"), values)
    if rows > 1:
        assert ours == zarr_bytes(values, shard=0, shard_rows=SHARD_ROWS, chunk_rows=CHUNK_ROWS)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, SHARD_ROWS), dimensions=st.integers(1, 9), dtype=st.sampled_from(DTYPES))
def test_decoding_gives_back_what_was_encoded(rows: int, dimensions: int, dtype: str) -> None:
    values = vectors(rows, dimensions, dtype)
    data = encoded(values)
    result = decoded(data, rows, dimensions, dtype)
    assert result.dtype == values.dtype
    np.testing.assert_array_equal(result, values)


def test_the_checksum_of_the_values_is_theirs_and_tells_shards_apart() -> None:
    chance = np.random.default_rng(1)
    shards = [chance.random((6, 3), np.float32) for _ in range(2)]
    encoded = [encode_shard(values, shard_rows=8, chunk_rows=4) for values in shards]
    assert encoded[0].crc32c == encoded[1].crc32c
    for values, shard in zip(shards, encoded, strict=True):
        padded = np.concatenate([values, np.full((2, 3), np.nan, np.float32)])
        assert shard.values_crc32c == google_crc32c.value(padded.tobytes())
        decoded = decode_shard(
            shard.join(), rows=6, dimensions=3, dtype=np.dtype("float32"), shard_rows=8, chunk_rows=4, name="it"
        )
        assert (decoded.crc32c, decoded.values_crc32c) == (shard.crc32c, shard.values_crc32c)


def test_values_of_the_other_byte_order_are_stored_as_the_same_numbers() -> None:
    values = vectors(5, 3, "float32")
    assert encoded(values.astype(">f4")) == encoded(values)


@pytest.mark.parametrize("rows", [5, 8])
def test_every_single_flipped_bit_of_a_shard_is_found(rows: int) -> None:
    data = encoded(vectors(rows, 2, "float32"))
    for position in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptStore, match="c/0/0"):
                decoded(bytes(damaged), rows, 2, "float32")


def test_every_truncation_and_every_missing_beginning_of_a_shard_is_found() -> None:
    data = encoded(vectors(5, 2, "float32"))
    for position in range(1, len(data)):
        for part in (data[:-position], data[position:]):
            with pytest.raises(CorruptStore, match="c/0/0"):
                decoded(part, 5, 2, "float32")
    with pytest.raises(CorruptStore, match="cut short: 0 bytes"):
        decoded(b"", 5, 2, "float32")


def test_an_index_that_points_outside_is_found_although_its_checksum_holds() -> None:
    data = encoded(vectors(5, 2, "float32"))
    index = np.frombuffer(data[-36:-4], dtype="<u8").copy()
    for field, value in ((0, 2**63), (1, 3), (1, 2**40)):
        wrong = index.copy()
        wrong[field] = value
        footer = wrong.tobytes()
        with pytest.raises(CorruptStore, match="chunk 0 of c/0/0"):
            decoded(data[:-36] + footer + crc32c(footer).to_bytes(4, "little"), 5, 2, "float32")


def test_a_shard_of_other_dimensions_is_found() -> None:
    data = encoded(vectors(5, 2, "float32"))
    with pytest.raises(CorruptStore):
        decoded(data, 5, 3, "float32")


@pytest.mark.parametrize(("rows", "chunk_rows"), [(9, 4), (8, 3)])
def test_rows_that_do_not_fit_are_refused(rows: int, chunk_rows: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_shard(vectors(rows, 2, "float32"), shard_rows=8, chunk_rows=chunk_rows)


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(32)])
def test_the_checksum_is_crc32c(data: bytes) -> None:
    known = {b"": 0, b"123456789": 0xE3069283, bytes(32): 0x8A9136AA}
    buffers = [data, memoryview(data), bytearray(data), np.array(list(data), dtype=np.uint8)]
    assert {crc32c(buffer) for buffer in buffers} == {known[data]}


@settings(max_examples=60, deadline=None)
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_of_parts_make_the_checksum_of_the_whole(first: bytes, second: bytes) -> None:
    assert combine(crc32c(first), crc32c(second), second_bytes=len(second)) == crc32c(first + second)


def test_an_object_whose_chunks_stand_in_another_order_is_read_with_its_own_checksum() -> None:
    data = encoded(vectors(8, 2, "float32"))
    chunk_bytes = 4 * 2 * 4 + 4
    index = np.frombuffer(data[-36:-4], dtype="<u8").reshape(2, 2)[::-1].tobytes()
    swapped = data[chunk_bytes : 2 * chunk_bytes] + data[:chunk_bytes] + index + crc32c(index).to_bytes(4, "little")
    np.testing.assert_array_equal(decoded(swapped, 8, 2, "float32"), vectors(8, 2, "float32"))


def test_decoded_values_can_be_changed_without_changing_the_object() -> None:
    data = encoded(vectors(5, 2, "float32"))
    shard = decoded(data, 5, 2, "float32")
    shard[:] = 0
    np.testing.assert_array_equal(decoded(data, 5, 2, "float32"), vectors(5, 2, "float32"))


def test_the_shape_is_raised_and_never_lowered() -> None:
    info = info_of(3, "float32", 8, 4)
    _, metadata = create_metadata(info)
    assert shape_of(metadata, name="zarr.json") == 0
    raised = raise_shape(metadata, rows=5, name="zarr.json")
    assert raised is not None
    assert shape_of(raised, name="zarr.json") == 5
    assert raise_shape(raised, rows=5, name="zarr.json") is None
    assert raise_shape(raised, rows=4, name="zarr.json") is None
    with pytest.raises(CorruptStore, match=r"zarr\.json is not the metadata"):
        shape_of(b'{"shape": []}', name="zarr.json")


def test_the_group_tells_readers_which_embedder_made_the_vectors() -> None:
    info = dataclasses.replace(info_of(3, "float32", 8, 4), embedder=EmbedderSpec("jina/x", 3, revision="7"))
    group, _ = create_metadata(info)
    assert b'"jina/x"' in group
    assert info.embedder.fingerprint.encode() in group
