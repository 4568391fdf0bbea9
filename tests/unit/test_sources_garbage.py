"""What a reader does with bad input: each record becomes a document or a reject with a reason, never a traceback."""

import datetime
import decimal
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedmill.documents import Reject, SourceDocument
from embedmill.errors import ConfigurationError
from embedmill.sources import FieldRules, Source, lines, open_source
from embedmill.sources.jsonl import JsonLinesSource
from embedmill.sources.lines import StandardInput

RULES = FieldRules()


def open_bytes(folder: Path, name: str, data: bytes, *, rules: FieldRules = RULES) -> Source:
    path = folder / name
    path.write_bytes(data)
    return open_source(str(path), rules=rules)


def read_parts(source: Source) -> tuple[list[SourceDocument], list[Reject]]:
    items = list(source.read())
    documents = [item for item in items if isinstance(item, SourceDocument)]
    return documents, [item for item in items if isinstance(item, Reject)]


GARBAGE_LINES = {
    "broken JSON": (b'{"text": "a"', "not valid JSON"),
    "plain words": (b"hello", "not valid JSON: Expecting value (column 1)"),
    "two values": (b'{"text": "a"} {"text": "b"}', "more text after the first value"),
    "array": (b'["text"]', "not a JSON object but an array"),
    "string": (b'"text"', "not a JSON object but a string"),
    "null": (b"null", "not a JSON object but null"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8: byte 0xff at column 11"),
    "deep nesting": (b"[" * 100_000, "nested too deeply"),
    "huge number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number is too long"),
    "no text": (b'{"id": "1", "title": "t", "body": "b"}', "field 'text' is missing; fields here: title, body"),
    "null text": (b'{"text": null}', "no text"),
    "blank text": (b'{"text": " \\n\\t"}', "the text is empty"),
    "number as text": (b'{"text": 3}', "field 'text' holds a number, not text"),
    "surrogate in text": (b'{"text": "\\ud800"}', "the text has a lone surrogate"),
    "surrogate in metadata": (b'{"text": "a", "m": "\\udfff"}', "the metadata has a lone surrogate"),
    "surrogate in id": (b'{"text": "a", "id": "\\ud800"}', "the id has a lone surrogate"),
    "boolean id": (b'{"text": "a", "id": true}', "not a boolean"),
    "float id": (b'{"text": "a", "id": 1.0}', "not a number"),
    "object id": (b'{"text": "a", "id": {}}', "not an object"),
    "empty id": (b'{"text": "a", "id": ""}', "the id is empty"),
    "control character in id": (b'{"text": "a", "id": "a\\u0000b"}', "control characters"),
    "long id": (b'{"text": "a", "id": "' + b"x" * 513 + b'"}', "longer than 512 bytes"),
    "long id in two-byte letters": (b'{"text": "a", "id": "' + "é".encode() * 257 + b'"}', "longer than 512 bytes"),
    "NaN": (b'{"text": "a", "score": NaN}', "metadata that JSON cannot hold in field 'score'"),
    "infinity by overflow": (b'{"text": "a", "score": 1e999}', "field 'score'"),
    "big metadata": (b'{"text": "a", "k": 1, "blob": "' + b"x" * 61_500 + b'"}', "the largest field is 'blob'"),
}


@pytest.mark.parametrize("case", GARBAGE_LINES)
def test_a_bad_line_is_one_reject_with_its_place_and_the_lines_around_it_are_read(tmp_path: Path, case: str) -> None:
    line, reason = GARBAGE_LINES[case]
    source = open_bytes(tmp_path, "d.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    documents, [reject] = read_parts(source)
    assert [document.id for document in documents] == ["d.jsonl:1", "d.jsonl:3"]
    assert reject.place == "d.jsonl:2"
    assert reason in reject.reason
    assert "\n" not in reject.reason


def test_a_reject_carries_the_id_when_the_record_has_a_good_one(tmp_path: Path) -> None:
    _, [reject] = read_parts(open_bytes(tmp_path, "d.jsonl", b'{"id": 7, "text": ""}'))
    assert reject.id == "7"


def test_byte_order_mark_blank_lines_crlf_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}'
    documents, rejects = read_parts(open_bytes(tmp_path, "d.jsonl", data))
    assert [(document.id, document.text) for document in documents] == [("d.jsonl:1", "a"), ("d.jsonl:4", "b")]
    assert rejects == []


def test_a_line_of_twenty_megabytes_is_a_document(tmp_path: Path) -> None:
    text = "x" * 20_000_000
    [document], _ = read_parts(open_bytes(tmp_path, "d.jsonl", json.dumps({"text": text}).encode() + b"\n"))
    assert document.text == text


def test_a_line_beyond_the_limit_is_a_reject_and_the_next_line_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    data = b'{"text": "' + b"x" * 500 + b'"}\n{"text": "next"}\n'
    [document], [reject] = read_parts(open_bytes(tmp_path, "d.jsonl", data))
    assert "longer than" in reject.reason
    assert (document.text, document.cursor.offset) == ("next", len(data))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst"])
def test_an_empty_file_has_no_documents(tmp_path: Path, name: str) -> None:
    assert read_parts(open_bytes(tmp_path, name, b"")) == ([], [])


def test_truncated_gzip_gives_every_whole_line_then_one_reject_that_names_the_place(tmp_path: Path) -> None:
    whole = b"".join(b'{"text": "%d %s"}\n' % (n, str(n**99).encode()) for n in range(2000))
    source = open_bytes(tmp_path, "d.jsonl.gz", gzip.compress(whole)[:-4000])
    documents, [reject] = read_parts(source)
    assert len(documents) > 1800
    assert [document.cursor.line for document in documents] == list(range(1, len(documents) + 1))
    assert reject.place == f"d.jsonl.gz:{len(documents) + 1}"
    assert "cannot be read from here on" in reject.reason
    assert list(source.read(after=reject.cursor)) == []
    assert list(source.read(after=documents[-1].cursor)) == [reject]


def test_truncated_zstandard_ends_with_a_reject(tmp_path: Path) -> None:
    whole = b"".join(b'{"text": "%d %s"}\n' % (n, str(n**99).encode()) for n in range(5000))
    source = open_bytes(tmp_path, "d.jsonl.zst", pa.compress(whole, codec="zstd", asbytes=True)[:-1000])
    documents, [reject] = read_parts(source)
    assert documents
    assert reject.place == f"d.jsonl.zst:{len(documents) + 1}"
    assert list(source.read(after=reject.cursor)) == []


REFUSED_FILES = {
    "binary": ("d.jsonl", b"PK\x03\x04\x00\x00", "looks binary"),
    "UTF-16": ("d.csv", "id,text".encode("utf-16"), "looks binary"),
    "JSON array": ("d.json", b' \n[{"text": "a"}]', "jq -c '.[]'"),
    "JSON over several lines": ("d.json", b'{\n  "text": "a"\n}', "jq -c ."),
    "unknown kind": ("d.docx", b"x", "known are .jsonl"),
    "no extension": ("d", b"x", "known are .jsonl"),
    "gz of an unknown kind": ("d.gz", b"x", "known are .jsonl"),
    "not gzip": ("d.jsonl.gz", b'{"text": "a"}', "cannot be read as gzip"),
    "not Zstandard": ("d.jsonl.zst", b'{"text": "a"}', "cannot be read as zstd"),
    "not Parquet": ("d.parquet", b"PAR1 and nothing", "cannot be read as Parquet"),
    "empty CSV": ("d.csv", b"", "is empty"),
    "CSV without the text column": ("d.csv", b"id,body\n1,a\n", "no column 'text'; columns here: id, body"),
    "CSV header with an open quote": ("d.csv", b'id,"body\n1,a\n', "columns here: id, body 1,a"),
    "CSV that names a column twice": ("d.csv", b"text,text\na,b\n", "occurs more than once"),
    "CSV header that is not UTF-8": ("d.csv", b"text,\xff\na,b\n", "not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_file_that_cannot_be_a_source_is_refused_at_once_with_one_line(tmp_path: Path, case: str) -> None:
    name, data, message = REFUSED_FILES[case]
    with pytest.raises(ConfigurationError) as caught:
        open_bytes(tmp_path, name, data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argument", ["nowhere.jsonl", "ftp://example.org/d.jsonl", "s3:///d.jsonl", "a\0b.jsonl", "/dev/null", "x" * 300]
)
def test_an_argument_that_is_no_file_is_refused(argument: str) -> None:
    with pytest.raises(ConfigurationError):
        open_source(argument, rules=RULES)


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigurationError, match="no text files"):
        open_source(str(tmp_path), rules=RULES)


def test_a_terminal_on_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(ConfigurationError, match="terminal"):
        open_source("-", rules=RULES)


def test_standard_input_goes_on_where_it_stands_and_is_never_read_twice() -> None:
    stream = StandardInput(io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'))
    source = JsonLinesSource(stream, rules=RULES, push_key="k")
    first = next(iter(source.read()))
    assert [item.place for item in source.read(after=first.cursor)] == ["stdin:2", "stdin:3"]
    with pytest.raises(ConfigurationError, match="cannot be read again"):
        list(source.read())


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: pa.compress(data, codec="zstd", asbytes=True)])
def test_compressed_standard_input_is_known_by_its_first_bytes(compress: Callable[[bytes], bytes]) -> None:
    plain = b"".join(b'{"text": "%d"}\n' % number for number in range(50_000))
    source = JsonLinesSource(StandardInput(io.BytesIO(compress(plain))), rules=RULES, push_key="k")
    documents, rejects = read_parts(source)
    assert ([document.text for document in documents], rejects) == ([str(number) for number in range(50_000)], [])
    assert documents[-1].cursor.offset == len(plain)


@pytest.mark.parametrize("data", [b"", b"\n", b"{}", b'{"text": "a"}'])
def test_standard_input_may_be_shorter_than_what_is_looked_at(data: bytes) -> None:
    items = list(JsonLinesSource(StandardInput(io.BytesIO(data)), rules=RULES, push_key="k").read())
    assert len(items) == (1 if data.strip() else 0)


def test_compressed_standard_input_that_breaks_off_gives_what_it_held_and_one_reject() -> None:
    data = gzip.compress(b"".join(b'{"text": "%d %s"}\n' % (n, str(n**99).encode()) for n in range(2000)))
    documents, [reject] = read_parts(
        JsonLinesSource(StandardInput(io.BytesIO(data[:-4000])), rules=RULES, push_key="k")
    )
    assert len(documents) > 1800
    assert "cannot be read from here on" in reject.reason


def test_csv_rows_with_wrong_columns_bad_bytes_and_quoted_newlines(tmp_path: Path) -> None:
    data = b'id,text\n1,"two\nlines"\n2\n3,a,b\n\n4,"bad \xff\nquoted"\n5,fine\n6,\n'
    documents, rejects = read_parts(open_bytes(tmp_path, "d.csv", data))
    assert [(document.id, document.text, document.place) for document in documents] == [
        ("1", "two\nlines", "d.csv:2"),
        ("5", "fine", "d.csv:9"),
    ]
    assert [(reject.place, reject.reason) for reject in rejects] == [
        ("d.csv:4", "the row has 1 columns, the header has 2"),
        ("d.csv:5", "the row has 3 columns, the header has 2"),
        ("d.csv:7", "line 7 is not UTF-8: byte 0xff at column 8"),
        ("d.csv:10", "the text is empty"),
    ]


def test_tsv_splits_at_tabs_and_csv_takes_long_fields(tmp_path: Path) -> None:
    [document], _ = read_parts(open_bytes(tmp_path, "d.tsv", b"\xef\xbb\xbftext\tlang\na, b\ten\n"))
    assert (document.id, document.text, document.metadata) == ("d.tsv:1", "a, b", '{"lang":"en"}')
    long = b"x" * 1_000_000
    [document], _ = read_parts(open_bytes(tmp_path, "d.csv", b"text\n" + long + b"\n"))
    assert len(document.text) == len(long)


def test_parquet_metadata_is_converted_to_what_json_can_hold(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b", None],
            "day": [datetime.date(2024, 2, 29)] * 3,
            "price": [decimal.Decimal("1.50")] * 3,
            "moment": pa.array([1_700_000_000_123_456_789] * 3, pa.timestamp("ns")),
            "far": pa.array([1, 2**50, 1], pa.timestamp("ms")),
            "blob": [None, b"bytes\xff", None],
            "score": [1.5, float("nan"), 0.0],
            "scores": [[float("inf"), 2.0], None, None],
        }
    )
    path = tmp_path / "d.parquet"
    pq.write_table(table, path)
    [first, second], [reject] = read_parts(open_source(str(path), rules=RULES))
    alike = {"day": "2024-02-29", "moment": "2023-11-14T22:13:20.123456", "price": "1.50"}
    rest = {"blob": None, "far": "1970-01-01T00:00:00.001000", "score": 1.5, "scores": [None, 2.0]}
    assert json.loads(first.metadata) == {**alike, **rest}
    assert json.loads(second.metadata) == {**alike, "blob": "Ynl0ZXP/", "far": None, "score": None, "scores": None}
    assert reject.place == "d.parquet:3"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("text", b"bytes", "field 'text' holds bytes, not text"),
        ("id", b"bytes", "the id must be a string or an integer, not bytes"),
        ("id", float("nan"), "the id must be a string or an integer, not a number"),
    ],
)
def test_a_parquet_id_or_text_is_never_converted(tmp_path: Path, column: str, value: object, reason: str) -> None:
    pq.write_table(pa.table({"text": ["a"], column: [value]}), tmp_path / "d.parquet")
    documents, [reject] = read_parts(open_source(str(tmp_path / "d.parquet"), rules=RULES))
    assert (documents, reject.reason) == ([], reason)


def test_a_parquet_row_group_that_cannot_be_decoded_is_one_reject_and_the_next_group_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    texts = [f"text {n}" for n in range(300)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="snappy", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    source = open_bytes(tmp_path, "d.parquet", bytes(data))
    documents, [reject] = read_parts(source)
    assert [document.text for document in documents] == texts[:100] + texts[200:]
    assert (reject.place, reject.cursor.record) == ("d.parquet:101", 200)
    assert next(item.place for item in source.read(after=reject.cursor)) == "d.parquet:201"


def test_parquet_without_the_text_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigurationError, match="columns here: body"):
        open_source(str(tmp_path / "d.parquet"), rules=RULES)


def test_text_files_that_are_blank_not_utf8_or_gone_are_rejects(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n \n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d.rst").write_text("fine")
    documents, rejects = read_parts(open_source(str(tmp_path), rules=RULES))
    assert [document.id for document in documents] == ["d.rst"]
    assert [reject.reason for reject in rejects] == [
        "the text is empty",
        "not UTF-8: byte 0xe9 at offset 3",
        "the file cannot be read: No such file or directory",
    ]
