"""Which field becomes id, text and metadata; what names a push; what the built-in sources hold."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ConfigurationError
from embedmill.sources import FieldRules, RejectFile, open_source
from embedmill.sources.fields import RecordRefused, build_document, encode_metadata
from embedmill.sources.pydoc import collect_passages


def build(record: dict[str, object], **rules: object) -> SourceDocument | Reject:
    return build_document(
        dict(record), rules=FieldRules(**rules), fallback_id="f:1", place="f:1", cursor=Cursor(record=1)
    )


def built(record: dict[str, object], **rules: object) -> SourceDocument:
    document = build(record, **rules)
    assert isinstance(document, SourceDocument)
    return document


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"id": "a", "_id": "b"}, "a"),
        ({"id": None, "_id": "b"}, "b"),
        ({"_id": 12}, "12"),
        ({}, "f:1"),
        ({"id": "x" * 512}, "x" * 512),
        ({"id": "é" * 256}, "é" * 256),
        ({"id": -(10**30)}, "-1" + "0" * 30),
    ],
)
def test_the_id_is_id_then_underscore_id_then_the_place(record: dict[str, object], expected: str) -> None:
    assert built({**record, "text": "t"}).id == expected


def test_a_named_id_field_must_be_there_and_leaves_id_in_the_metadata() -> None:
    document = built({"text": "t", "key": 5, "id": "other"}, id_field="key")
    assert (document.id, document.metadata) == ("5", '{"id":"other"}')
    refused = build({"text": "t", "key": None}, id_field="key")
    assert isinstance(refused, Reject)
    assert refused.reason == "no id: field 'key' is missing or null"


def test_text_fields_are_joined_in_order_and_absent_null_and_blank_ones_passed_over() -> None:
    rules = {"text_fields": ("title", "lead", "intro", "body")}
    document = built({"body": "B", "title": "T", "lead": None, "intro": " ", "n": 1}, **rules)
    assert (document.text, document.metadata) == ("T\n\nB", '{"n":1}')


def test_metadata_is_canonical_and_nul_in_the_text_is_kept() -> None:
    document = built({"z": 1, "text": "a\0b", "a": ["é"]})
    assert (document.text, document.metadata) == ("a\0b", '{"a":["é"],"z":1}')


@pytest.mark.parametrize(
    "rules", [{"text_fields": ()}, {"text_fields": ("a", "a")}, {"text_fields": ("a",), "id_field": "a"}]
)
def test_rules_that_no_record_can_meet_are_refused(rules: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        FieldRules(**rules)


def test_the_push_key_changes_with_the_file_and_the_rules_and_with_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n')

    def key(argument: Path = path, **rules: object) -> str:
        return open_source(str(argument), rules=FieldRules(**rules)).push_key

    first = key()
    assert key() == first == key(tmp_path / "." / "d.jsonl")
    assert key(id_field="id") != first
    assert key(text_fields=("body",)) != first
    os.utime(path, ns=(1, 1))
    assert key() != first


def test_a_folder_push_key_changes_with_any_text_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    first = open_source(str(tmp_path), rules=FieldRules()).push_key
    (tmp_path / "picture.png").write_bytes(b"x")
    assert open_source(str(tmp_path), rules=FieldRules()).push_key == first
    (tmp_path / "b.txt").write_text("b")
    assert open_source(str(tmp_path), rules=FieldRules()).push_key != first


def test_a_folder_is_read_recursively_in_path_order_without_hidden_files(tmp_path: Path) -> None:
    contents = {
        "b.md": "```\n# not this\n```\n## The *title* ##\ntext",
        "a/z.txt": "# no title in plain text",
        "a.markdown": "plain",
        ".hidden.md": "x",
        ".git/c.md": "x",
        "d.py": "x",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = list(open_source(str(tmp_path), rules=FieldRules()).read())
    assert [(item.id, json.loads(item.metadata)) for item in documents if isinstance(item, SourceDocument)] == [
        ("a.markdown", {"path": "a.markdown", "title": None}),
        ("a/z.txt", {"path": "a/z.txt", "title": None}),
        ("b.md", {"path": "b.md", "title": "The *title*"}),
    ]


def test_one_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    [document] = open_source(str(tmp_path / "notes.md"), rules=FieldRules()).read()
    assert (document.id, document.place) == ("notes.md", "notes.md")


def test_pydoc_holds_thousands_of_unique_passages_and_good_answers_on_waiting_for_coroutines() -> None:
    passages = {passage.id: passage for passage in collect_passages()}
    assert len(passages) == len(collect_passages())
    assert 2500 <= len(passages) <= 6000
    assert "aggregating results from the given coroutines" in passages["asyncio.gather"].text
    assert passages["asyncio.wait"].text == "asyncio.wait\n\nWait for the Futures or Tasks given by fs to complete."
    assert "managing groups of tasks" in passages["asyncio.TaskGroup"].text
    assert passages["topic:with#2"].text.startswith('The "with" statement\n\n')
    assert json.loads(passages["asyncio.wait"].metadata) == {
        "kind": "function",
        "module": "asyncio",
        "name": "asyncio.wait",
        "signature": str(inspect.signature(asyncio.wait)),
    }


def test_pydoc_is_the_same_in_another_process_with_another_hash_seed_and_home(tmp_path: Path) -> None:
    script = "from embedmill.sources.pydoc import collect_passages; print(ascii(collect_passages()))"
    root = Path(__file__).parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "HOME": home},
            cwd=home,
            capture_output=True,
            check=True,
        ).stdout
        for seed, home in (("1", str(tmp_path)), ("2", "/"))
    }
    assert len(outputs) == 1


def test_a_resumed_reject_file_holds_each_reject_once_even_after_a_torn_write(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    rejects = [Reject(f"d:{n}", "bad \ud800", Cursor(record=n, offset=n * 10, line=n), None) for n in range(1, 6)]
    file = RejectFile(path)
    for reject in rejects[:4]:
        file.add(reject)
    file.close()
    with path.open("a") as torn:
        torn.write('{"place": "d:5", "reas')

    resumed = RejectFile(path)
    assert resumed.resume(rejects[1].cursor) == 2
    for reject in rejects[2:]:
        resumed.add(reject)
    resumed.close()
    assert resumed.count == 5
    assert [json.loads(line)["place"] for line in path.read_text().splitlines()] == [f"d:{n}" for n in range(1, 6)]
    assert resumed.resume(None) == 0
    assert not path.exists()


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, {"a": [1, {"b": 10**30}]}])
def test_an_integer_that_milvus_cannot_hold_is_refused_with_its_field(value: object) -> None:
    with pytest.raises(RecordRefused, match="more than 64 bits in field 'n'"):
        encode_metadata({"ok": 1, "n": value})


def test_the_largest_integers_and_long_digits_in_strings_are_kept() -> None:
    record: dict[str, object] = {"low": -(2**63), "high": 2**64 - 1, "text": "9" * 40, "share": 0.1234567890123456789}
    assert json.loads(encode_metadata(record)) == record
