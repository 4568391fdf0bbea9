"""Reading up to any record and then behind its cursor gives what one reading gives, for every format."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.sources import FieldRules, Source, open_source

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
garbage = st.sampled_from([b"", b"  ", b"{", b"\xff", b"[]", b'{"text": ""}', b'{"no": 1}'])
json_line = st.one_of(garbage, st.builds(lambda text: json.dumps({"text": text, "n": 1}).encode(), texts))
line_end = st.sampled_from([b"\n", b"\r\n"])
jsonl_bytes = st.lists(st.tuples(json_line, line_end), max_size=12).map(
    lambda pairs: b"".join(line + end for line, end in pairs)
)

csv_cell = st.sampled_from(["a", "", '"quoted, ""cell"""', '"two\nlines"', '"\r\n"', "é", '"open'])
csv_row = st.lists(csv_cell, min_size=1, max_size=3).map(lambda cells: ",".join(cells).encode())
csv_bytes = st.lists(st.one_of(csv_row, st.sampled_from([b"", b"\xff,b"])), max_size=12).map(
    lambda rows: b"\n".join([b"text,lang", *rows])
)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True) if data else b""


def assert_resumable(source: Source, split: int) -> None:
    whole = list(source.read())
    split = min(split, len(whole))
    head = list(islice(source.read(), split))
    tail = list(source.read(after=head[-1].cursor)) if head else list(source.read())
    assert head + tail == whole
    cursors = [item.cursor for item in whole]
    assert all(earlier < later for earlier, later in pairwise(cursors))
    positions = [source.position_bytes(cursor) for cursor in cursors]
    assert positions == sorted(positions)
    assert not positions or positions[-1] <= (source.total_bytes() or 0)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("name", "encode"),
    [("d.jsonl", bytes), ("d.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstd)],
)
@settings(deadline=None, max_examples=60)
@given(data=jsonl_bytes, marked=st.booleans(), split=st.integers(0, 14))
def test_json_lines_resume_behind_any_record(folder, name, encode, data, marked, split) -> None:  # type: ignore[no-untyped-def]
    path = folder / name
    path.write_bytes(encode((b"\xef\xbb\xbf" if marked else b"") + data))
    assert_resumable(open_source(str(path), rules=FieldRules()), split)


@pytest.mark.parametrize(("name", "encode"), [("d.csv", bytes), ("d.csv.gz", gzip.compress)])
@settings(deadline=None, max_examples=60)
@given(data=csv_bytes, split=st.integers(0, 14))
def test_csv_resumes_behind_any_row(folder, name, encode, data, split) -> None:  # type: ignore[no-untyped-def]
    path = folder / name
    path.write_bytes(encode(data))
    assert_resumable(open_source(str(path), rules=FieldRules()), split)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.one_of(st.none(), texts), st.floats() | st.none()), max_size=20),
    group=st.integers(1, 7),
    split=st.integers(0, 20),
)
def test_parquet_resumes_behind_any_row(folder, rows, group, split) -> None:  # type: ignore[no-untyped-def]
    table = pa.table({"text": pa.array([row[0] for row in rows], pa.string()), "score": [row[1] for row in rows]})
    pq.write_table(table, folder / "d.parquet", row_group_size=group)
    assert_resumable(open_source(str(folder / "d.parquet"), rules=FieldRules()), split)


@settings(deadline=None, max_examples=20)
@given(
    contents=st.lists(st.one_of(st.just(b"\xff"), texts.map(str.encode)), min_size=1, max_size=6),
    split=st.integers(0, 6),
)
def test_a_folder_resumes_behind_any_file(contents: list[bytes], split: int) -> None:
    with TemporaryDirectory() as name:
        for number, data in enumerate(contents):
            Path(name, f"{number}.md").write_bytes(data)
        assert_resumable(open_source(name, rules=FieldRules()), split)


@settings(deadline=None, max_examples=10)
@given(split=st.integers(0, 4000))
def test_pydoc_resumes_behind_any_passage(split: int) -> None:
    assert_resumable(open_source("pydoc:", rules=FieldRules()), split)
