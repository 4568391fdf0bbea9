"""The document log: Parquet objects that come back as they went, or say that they are damaged."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.passages import (
    Passage,
    ShardOrigin,
    SourcePosition,
    decode_passages,
    encode_passages,
    passages_table,
    read_footer,
)
from embedmill.documents import Cursor, canonical_json, hash16
from embedmill.errors import ConfigurationError, CorruptStore

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
passage_rows = st.builds(
    lambda id_, text, value, version, deleted, group: Passage(
        id_, text, metadata := canonical_json({"k": value}), version, hash16(text), hash16(metadata), deleted, group
    ),
    texts,
    texts,
    st.none() | st.integers() | texts,
    st.integers(1, 2**62),
    st.booleans(),
    st.none() | texts,
)
cursors = st.builds(Cursor, *[st.integers(0, 2**53)] * 4)
origins = st.builds(
    ShardOrigin,
    st.integers(0, 10**8),
    texts,
    st.lists(st.builds(SourcePosition, texts, texts, cursors, st.integers(0, 9)), max_size=3).map(tuple),
    st.dictionaries(st.integers(0, 9), st.tuples(st.integers(0, 99), st.integers(0, 4095)), max_size=4),
    st.lists(st.integers(0, 99), max_size=3).map(tuple),
)
SAMPLE = [Passage("a", "über", "{}", 3, hash16("über"), hash16("{}"), False, "g")]
ORIGIN = ShardOrigin(2, "main", (SourcePosition("p", "x.jsonl", Cursor(0, 3, 40, 3), 0),), {0: (1, 5)}, (1,))


@settings(max_examples=80, deadline=None)
@given(passages=st.lists(passage_rows, min_size=1, max_size=6), origin=origins)
def test_rows_and_origin_come_back_as_they_went(passages: list[Passage], origin: ShardOrigin) -> None:
    table, back = decode_passages(encode_passages(passages_table(passages, origin=origin)), name="d")
    assert back == origin
    assert [
        Passage(
            r["id"],
            r["text"],
            r["metadata"],
            r["version"],
            r["text_hash"],
            r["metadata_hash"],
            r["deleted"],
            r["group"],
        )
        for r in table.to_pylist()
    ] == passages
    assert set(table["job"].to_pylist()) == {origin.job}


@settings(max_examples=20, deadline=None)
@given(passages=st.lists(passage_rows, min_size=1, max_size=6), origin=origins)
def test_equal_rows_make_equal_bytes(passages: list[Passage], origin: ShardOrigin) -> None:
    def encode() -> bytes:
        return encode_passages(passages_table(list(passages), origin=origin))

    assert encode() == encode()


def test_the_order_in_which_carried_rows_were_found_does_not_show() -> None:
    ways = [{0: (1, 5), 1: (1, 6)}, {1: (1, 6), 0: (1, 5)}]
    rows = SAMPLE * 2
    assert len({encode_passages(passages_table(rows, origin=ShardOrigin(2, "m", (), way))) for way in ways}) == 1


def test_some_columns_are_read_without_the_others() -> None:
    data = encode_passages(passages_table(SAMPLE, origin=ORIGIN))
    table, origin = decode_passages(data, name="d", columns=["version", "id"])
    assert table.to_pylist() == [{"version": 3, "id": "a"}]
    assert origin == ORIGIN


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_object_is_named(keep: int) -> None:
    data = encode_passages(passages_table(SAMPLE, origin=ORIGIN))[:keep]
    with pytest.raises(CorruptStore, match="documents/7 is not readable Parquet"):
        decode_passages(data, name="documents/7")


def test_every_object_damaged_in_one_byte_is_named_or_read_but_never_a_traceback() -> None:
    data = encode_passages(passages_table(SAMPLE, origin=ORIGIN))
    refusals = []
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        try:
            decode_passages(bytes(damaged), name="documents/7")
        except (CorruptStore, ConfigurationError) as error:
            refusals.append(str(error))
    assert refusals
    assert all("documents/7" in refusal for refusal in refusals)


def test_a_footer_tells_rows_origin_and_about_how_many_bytes_of_text() -> None:
    texts = [f"passage {row} of some length, ü" * 20 for row in range(300)]
    rows = [Passage(str(row), text, "{}", 1, hash16(text), hash16("{}")) for row, text in enumerate(texts)]
    footer = read_footer(io.BytesIO(encode_passages(passages_table(rows, origin=ORIGIN))), name="d")
    assert (footer.rows, footer.origin) == (300, ORIGIN)
    assert footer.text_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.05)


def test_a_footer_damaged_in_one_byte_is_named_or_read_but_never_a_traceback() -> None:
    data = encode_passages(passages_table(SAMPLE, origin=ORIGIN))
    refusals = []
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        try:
            read_footer(io.BytesIO(damaged), name="documents/7")
        except (CorruptStore, ConfigurationError) as error:
            refusals.append(str(error))
    assert refusals
    assert all("documents/7" in refusal for refusal in refusals)


def test_the_footer_of_somebody_else_is_named() -> None:
    with pytest.raises(CorruptStore, match="documents/7 has no embedmill metadata"):
        read_footer(io.BytesIO(parquet_with(None)), name="documents/7")


def parquet_with(metadata: dict[bytes, bytes] | None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def test_parquet_of_somebody_else_is_named() -> None:
    with pytest.raises(CorruptStore, match="documents/7 has no embedmill metadata"):
        decode_passages(parquet_with(None), name="documents/7")


@pytest.mark.parametrize(
    "origin", [b"{", b"[]", b'{"format_version": 1}', b'{"format_version": 1, "shard": 0, "job": "m", "sources": [{}]}']
)
def test_damaged_metadata_is_named(origin: bytes) -> None:
    with pytest.raises(CorruptStore, match="documents/7"):
        decode_passages(parquet_with({b"embedmill": origin}), name="documents/7")


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"format version 9.*upgrade embedmill"):
        decode_passages(parquet_with({b"embedmill": b'{"format_version": 9}'}), name="documents/7")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metadata_that_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"a": value})


@given(st.dictionaries(texts, st.integers() | texts))
def test_equal_metadata_has_equal_bytes_whatever_its_order(metadata: dict[str, int | str]) -> None:
    backwards = dict(reversed(metadata.items()))
    assert canonical_json(metadata) == canonical_json(backwards)
    assert json.loads(canonical_json(metadata)) == metadata
