"""The table of bad inputs: what is given, the status that `run` ends with, and the line that it prints.

No input may show a traceback, nor harm the dataset that is there.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import Command, write_jsonl
from tests.invariants import check_dataset, final_set

NULL = ("--model", "null/8", "--no-milvus")
MILVUS = ("--model", "null/8", "--to", "out", "--milvus")
TEXTS = {"a": "One.", "b": "Two."}
GOOD = '{"id":"a","text":"One."}\n'
CLOSED_PORT = 1


def given(name: str, content: str | bytes = GOOD) -> Callable[[Path], None]:
    """A preparation: this file, and always a good source beside it."""
    data = content.encode() if isinstance(content, str) else content

    def prepare(folder: Path) -> None:
        (folder / "in.jsonl").write_text(GOOD)
        (folder / name).write_bytes(data)

    return prepare


good_source = given("in.jsonl")


def folder_with_other_things(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "thing").write_text("x")
    (folder / "in.jsonl").write_text(GOOD)


def dangling_link(folder: Path) -> None:
    (folder / "in.jsonl").symlink_to("nowhere")


def device(folder: Path) -> None:
    (folder / "in.jsonl").symlink_to("/dev/null")


def folder_with_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "a").write_text("never read: not a text file's name")
    (folder / "in" / "fine.md").write_text("Fine.")
    (folder / "in" / "gone.md").symlink_to("nowhere")


def large_document(folder: Path) -> None:
    write_jsonl(folder / "in.jsonl", [{"id": "large", "text": "word " * 4_000_000}])


@dataclass(frozen=True)
class Case:
    """One row. says: fragments of stderr, or of stdout where the status is 0 or 1; admitted: ids that the dataset has then
    (None: there is no dataset); rejects: reasons in the reject file, by place."""

    name: str
    status: int
    says: str | tuple[str, ...]
    prepare: Callable[[Path], None] = good_source
    source: str = "in.jsonl"
    options: tuple[str, ...] = (*NULL, "--to", "out")
    environment: dict[str, str] = field(default_factory=dict)
    admitted: frozenset[str] | None = None
    rejects: dict[str, str] = field(default_factory=dict)


def ids(*names: str) -> frozenset[str]:
    return frozenset(names)


def after_good(line: str) -> Callable[[Path], None]:
    return given("in.jsonl", GOOD + line + '\n{"id":"z","text":"Last."}\n')


def to(target: str) -> tuple[str, ...]:
    return (*NULL, "--to", target)


def model(name: str, *more: str) -> tuple[str, ...]:
    return ("--model", name, "--no-milvus", "--to", "out", *more)


RECORDS = [
    Case("an empty file", 0, "nothing to add", given("in.jsonl", ""), admitted=ids()),
    Case("blank lines", 0, "nothing to add", given("in.jsonl", "\n \n\n"), admitted=ids()),
    Case(
        "a line that is no JSON", 1, "rejected    1, listed", after_good("no json"),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "not valid JSON: Expecting value (column 1)"},
    ),
    Case(
        "a line that is no object", 1, "rejected    1, listed", after_good("[1]"),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "not a JSON object but an array"},
    ),
    Case(
        "a record without text", 1, "rejected    1, listed", after_good('{"id":"b","body":"x"}'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "no text: field 'text' is missing; fields here: body"},
    ),
    Case(
        "a record with a blank text", 1, "rejected    1, listed", after_good('{"id":"b","text":"  "}'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "the text is empty"},
    ),
    Case(
        "a record whose text is a number", 1, "rejected    1, listed", after_good('{"id":"b","text":7}'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "field 'text' holds a number, not text"},
    ),
    Case(
        "an id given twice", 1, "rejected    1, listed", after_good('{"id":"a","text":"Again."}'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "this id stands twice in this source; the first one is kept"},
    ),
    Case(
        "an id that is too long", 1, "rejected    1, listed", after_good(json.dumps({"id": "x" * 600, "text": "x"})),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "the id is longer than 512 bytes"},
    ),
    Case(
        "a lone surrogate", 1, "rejected    1, listed", after_good('{"id":"b","text":"\\ud800"}'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "the text has a lone surrogate, which UTF-8 cannot hold"},
    ),
    Case(
        "a NUL in a text", 0, "2 new", given("in.jsonl", GOOD + '{"id":"b","text":"x\\u0000y"}\n'), admitted=ids("a", "b"),
    ),
    Case(
        "bytes that are not UTF-8", 1, "rejected    1, listed",
        given("in.jsonl", GOOD.encode() + b'{"id":"b","text":"\xff"}\n{"id":"z","text":"Last."}\n'),
        admitted=ids("a", "z"), rejects={"in.jsonl:2": "not UTF-8: byte 0xff at column 19"},
    ),
    Case(
        "a gzip file that breaks off", 1, "rejected    1, listed",
        given("in.jsonl.gz", gzip.compress(GOOD.encode() + os.urandom(9000).hex().encode())[:6000]),
        source="in.jsonl.gz", admitted=ids("a"), rejects={"in.jsonl.gz:2": "the file cannot be read from here on"},
    ),
    Case(
        "a row with a column too many", 1, "rejected    1, listed", given("in.csv", "id,text\na,One.\nb,Two.,x\n"),
        source="in.csv", admitted=ids("a"), rejects={"in.csv:3": "the row has 3 columns, the header has 2"},
    ),
    Case(
        "a file of the folder that cannot be read", 1, "rejected    1, listed", folder_with_a_file_that_cannot_be_read,
        source="in", admitted=ids("fine.md"), rejects={"gone.md": "the file cannot be read: No such file or directory"},
    ),
    Case("a document of 20 MB", 0, "1 new", large_document, admitted=ids("large")),
    Case(
        "a text field that no record has", 1, "rejected    1, listed", options=(*to("out"), "--text-field", "body"),
        admitted=ids(), rejects={"in.jsonl:1": "no text: field 'body' is missing; fields here: text"},
    ),
]  # fmt: skip

SOURCES = [
    Case("a file that is not there", 2, "nothere.jsonl: no such file or folder", source="nothere.jsonl"),
    Case("a dangling link", 2, "in.jsonl: no such file or folder", dangling_link),
    Case("a device", 2, "in.jsonl: not a regular file; pipe it into `-`", device),
    Case("a binary file", 2, "in.jsonl: looks binary", given("in.jsonl", b"\x7fELF\x00\x00\xff\xfe")),
    Case("no gzip file", 2, "cannot be read as gzip", given("in.jsonl.gz"), source="in.jsonl.gz"),
    Case("no Parquet file", 2, "in.parquet: cannot be read as Parquet", given("in.parquet"), source="in.parquet"),
    Case("a JSON array", 2, "is a JSON array; make JSON Lines of it", given("in.json", '[{"text":"x"}]'), source="in.json"),
    Case("an empty CSV file", 2, "in.csv: is empty; its first line", given("in.csv", ""), source="in.csv"),
    Case(
        "a CSV file without the column", 2, "no column 'text'; columns here: id, body (choose with --text-field)",
        given("in.csv", "id,body\na,One.\n"), source="in.csv",
    ),
    Case("an unknown kind of file", 2, "in.exe: unknown kind of file; known are .jsonl", given("in.exe"), source="in.exe"),
    Case("a folder without text files", 2, "other: no text files", folder_with_other_things, source="other"),
    Case("a URL of another kind", 2, "s3://, gs://, az://, http://, https:// are); download it first", source="ftp://example.org/x.jsonl"),
]  # fmt: skip

TARGETS = [
    Case("a target that is a file", 2, "in.jsonl is a file: --to takes a folder", options=to("in.jsonl")),
    Case("a target below a file", 3, "in.jsonl/x/dataset.json: Not a directory; see to the path", options=to("in.jsonl/x")),
    Case("a target that cannot be made", 3, "cannot write /proc/x/dataset.json", options=to("/proc/x")),
    Case(
        "a folder with other things", 2, "is a folder with other things in it (thing, ...): --to takes a new or empty",
        folder_with_other_things, options=to("other"),
    ),
    Case("an ftp server", 2, "no dataset can be on ftp://; use a folder, or s3://", options=to("ftp://bucket/x")),
]  # fmt: skip

OPTIONS = [
    Case("an unknown provider", 2, "unknown model 'opneai/x': --model takes PROVIDER/NAME", options=model("opneai/x")),
    Case("a model without a provider", 2, "unknown model 'nonsense': --model takes", options=model("nonsense")),
    Case(
        "an unknown model", 2, "no model 'jina/jina-embeddings-v9'; did you mean jina/jina-embeddings-v",
        options=model("jina/jina-embeddings-v9"), environment={"JINA_API_KEY": "k"},
    ),
    Case("no API key", 2, "no Jina API key: get one at https://jina.ai", options=model("jina/jina-embeddings-v3")),
    Case(
        "a provider that is not there", 3, f"cannot connect to http://127.0.0.1:{CLOSED_PORT}/v1",
        options=model("jina/jina-embeddings-v3", "--api-base", f"http://127.0.0.1:{CLOSED_PORT}/v1"),
        environment={"JINA_API_KEY": "k"},
    ),
    Case(
        "dimensions that the model has not", 2, "the nearest that works is --dimensions 1024",
        options=model("jina/jina-embeddings-v3", "--dimensions", "5000"), environment={"JINA_API_KEY": "k"},
    ),
    Case("no dimensions at all", 2, "its dimensions, for example null/384", options=model("null/0")),
    Case("an option of another model", 2, "--task does not apply to null/8", options=(*to("out"), "--task", "x")),
    Case(
        "an unknown tier", 2, "no tier 'piad'; did you mean paid?",
        options=model("jina/jina-embeddings-v3", "--tier", "piad"), environment={"JINA_API_KEY": "k"},
    ),
    Case("a number out of range", 2, "Invalid value for '--concurrency'", options=(*to("out"), "--concurrency", "0")),
    Case("a misspelt option", 2, "Did you mean '--concurrency'?", options=(*to("out"), "--concurency", "3")),
    Case("a job that is no name", 2, "--job 'a/b': use letters, digits", options=(*to("out"), "--job", "a/b")),
    Case("a field named twice", 2, "each --text-field may be named once", options=(*to("out"), "--text-field", "text,text")),
    Case(
        "a misspelt variable", 2, "sets EMBEDMILL_MODLE, which is no setting; did you mean EMBEDMILL_MODEL?",
        environment={"EMBEDMILL_MODLE": "x"},
    ),
    Case("a variable that is no number", 2, "EMBEDMILL_DIMENSIONS", environment={"EMBEDMILL_DIMENSIONS": "many"}),
    Case(
        "no configuration where one is named", 2, "EMBEDMILL_CONFIG names x.toml, which does not exist",
        environment={"EMBEDMILL_CONFIG": "x.toml"},
    ),
    Case(
        "a setting that there is not", 2, "embedmill.toml sets 'modle', which is no setting; did you mean model?",
        given("embedmill.toml", 'modle = "x"'),
    ),
    Case(
        "a configuration that is no TOML", 2, "cannot read embedmill.toml: Invalid value (at ",
        given("embedmill.toml", "model ="),
    ),
    Case(
        "a setting with two values", 2, "embedmill.toml: rpm takes one value, not list",
        given("embedmill.toml", "rpm = [1]"),
    ),
]  # fmt: skip

SERVERS = [
    Case("no Redis URL", 2, "--redis 'nonsense' is not a Redis URL", options=(*to("out"), "--redis", "nonsense")),
    Case(
        "a Redis that is not there", 2, (f"cannot reach Redis at redis://127.0.0.1:{CLOSED_PORT}", "is it running"),
        options=(*to("out"), "--redis", f"redis://127.0.0.1:{CLOSED_PORT}"),
    ),
    Case(
        "a Redis socket that is not there", 2, "cannot reach Redis at unix:///nowhere/socket",
        options=(*to("out"), "--redis", "unix:///nowhere/socket"),
    ),
    Case(
        "a password in the URL of Redis, which is not shown", 2, f"redis://user:***@127.0.0.1:{CLOSED_PORT}",
        options=(*to("out"), "--redis", f"redis://user:secret@127.0.0.1:{CLOSED_PORT}"),
    ),
    Case(
        "a Milvus address that is none", 2, "a server looks like http://HOST:19530, a local database like wiki.db",
        options=(*MILVUS, "ftp://x"),
    ),
    Case("a Milvus database without its ending", 2, "try other.db", folder_with_other_things, options=(*MILVUS, "other")),
    Case(
        "a Milvus database that is a file", 2, "x.db is a file: a Milvus Lite database is a folder",
        given("x.db"), options=(*MILVUS, "x.db"),
    ),
    Case("--milvus and --no-milvus", 2, "exclude each other", options=(*to("out"), "--milvus", "x.db")),
]  # fmt: skip

CASES = [*RECORDS, *SOURCES, *TARGETS, *OPTIONS, *SERVERS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_bad_input_ends_with_its_status_and_one_line(case: Case, embedmill: Command) -> None:
    case.prepare(embedmill.folder)
    ended = embedmill("run", case.source, *case.options, environment=case.environment)
    assert ended.status == case.status, ended.output
    for fragment in (case.says,) if isinstance(case.says, str) else case.says:
        assert fragment in (ended.stdout if case.status < 2 else ended.stderr)
    assert "secret" not in ended.output
    if case.status >= 2:
        assert ended.stdout == ""
        assert_one_line(ended.stderr)
    if case.admitted is not None:
        check_dataset(embedmill.folder / "out")
        assert {id_ for id_, _ in final_set(embedmill.folder / "out")} == case.admitted
    assert_rejects(embedmill.folder / "out", case.rejects)


def assert_one_line(stderr: str) -> None:
    """One line of ours, maybe behind what is waited for, or what click says: usage, a blank line, and one line."""
    said = ("Usage:", "Try '", "embedmill: waiting for the provider to answer a first request")
    lines = [line for line in stderr.splitlines() if line and not line.startswith(said)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith(("embedmill: ", "Error: "))
    assert "internal error" not in stderr


def assert_rejects(out: Path, expected: dict[str, str]) -> None:
    lines = [line for path in out.glob("rejects/*") for line in path.read_text().splitlines()]
    found = {reject["place"]: reject["reason"] for reject in map(json.loads, lines)}
    assert found.keys() == expected.keys()
    for place, reason in expected.items():
        assert found[place].startswith(reason)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


def written(content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(content)

    return damage


DAMAGE = [
    ("dataset.json", written("{"), 3, "dataset.json is not JSON"),
    ("dataset.json", written('{"format":"other"}'), 2, "dataset.json does not describe an embedmill dataset"),
    (
        "dataset.json",
        lambda path: path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9')),
        2,
        "has format version 9, and this embedmill reads up to 1: upgrade embedmill",
    ),
    (
        "dataset.json",
        lambda path: path.write_text(path.read_text().replace('"dimensions": 8', '"dimensions": 9')),
        3,
        "was edited: its fingerprint is not that of its embedder",
    ),
    ("vectors.zarr/vectors/zarr.json", written("x"), 3, "zarr.json is not the metadata of the vector array"),
    ("commits/00000000.json", written("{}"), 3, "commits/00000000.json has no format version"),
    ("jobs/main.json", written("x"), 3, "jobs/main.json is not JSON"),
    ("documents/00000000.parquet", Path.unlink, 3, "documents/00000000.parquet is missing, and its marker is there"),
]


@pytest.mark.parametrize(
    ("name", "damage", "status", "says"), DAMAGE, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(DAMAGE)]
)
def test_a_damaged_dataset_is_named_and_left_as_it_is(
    name: str, damage: Callable[[Path], object], status: int, says: str, embedmill: Command
) -> None:
    out = embedmill.folder / "out"
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in TEXTS.items()])
    assert embedmill("run", "in.jsonl", *to("out")).status == 0
    damage(out / name)
    # Other metadata: the vectors are to be taken over from the damaged shard.
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text, "x": 1} for id_, text in TEXTS.items()])
    kept = {path: path.read_bytes() for path in out.glob("*/0*") if path.is_file()}
    ended = embedmill("run", "in.jsonl", *to("out"))
    assert ended.status == status, ended.output
    assert says in ended.stderr
    assert_one_line(ended.stderr)
    assert all(path.read_bytes() == data for path, data in kept.items())


@pytest.mark.parametrize(
    ("damage", "says"),
    [(flip_a_bit, "c/0/0 does not hold"), (Path.unlink, "c/0/0 is missing, and its marker says that it was written")],
    ids=["a flipped bit", "missing"],
)
def test_damaged_vectors_are_not_taken_over_but_embedded_again_and_verify_names_them(
    damage: Callable[[Path], object], says: str, embedmill: Command
) -> None:
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in TEXTS.items()])
    assert embedmill("run", "in.jsonl", *to("out")).status == 0
    damage(embedmill.folder / "out" / "vectors.zarr/vectors/c/0/0")
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text, "x": 1} for id_, text in TEXTS.items()])
    ended = embedmill("run", "in.jsonl", *to("out"), "--json")
    assert (ended.status, ended.record["now"]["embedded"]) == (0, len(TEXTS))
    proven = embedmill("verify", "out")
    assert proven.status == 4
    assert says in proven.stdout


@pytest.mark.parametrize("damage", [written("junk"), Path.unlink], ids=["junk", "missing"])
def test_a_damaged_index_is_built_anew_without_a_word(damage: Callable[[Path], object], embedmill: Command) -> None:
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in TEXTS.items()])
    embedmill("run", "in.jsonl", *to("out"))
    damage(embedmill.folder / "out" / "index" / "index.sqlite")
    ended = embedmill("run", "in.jsonl", *to("out"), "--json")
    assert (ended.status, ended.stderr) == (0, "")
    assert ended.record["now"]["embedded"] == 0
    check_dataset(embedmill.folder / "out", source=TEXTS)


def test_a_dataset_of_another_model_is_refused_and_left_as_it_is(embedmill: Command) -> None:
    given("in.jsonl")(embedmill.folder)
    assert embedmill("run", "in.jsonl", *to("out")).status == 0
    ended = embedmill("run", "in.jsonl", "--to", "out", "--model", "null/16", "--no-milvus")
    assert ended.status == 2
    assert "holds vectors of another embedder (model 'null/8' here, 'null/16' asked for; dimensions 8" in ended.stderr
    assert_one_line(ended.stderr)
    check_dataset(embedmill.folder / "out", source={"a": "One."})


@pytest.fixture
def small_disk(embedmill: Command) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a given size; called again, it makes that one larger."""
    place = embedmill.folder / "disk"
    place.mkdir()

    def make(size: str) -> Path:
        options = f"remount,size={size}" if place.is_mount() else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        # Only the want of that right is a reason to pass over it; a file-size limit stands for the full disk then.
        if mounted.returncode and re.search("permi|superuser", mounted.stderr, re.IGNORECASE) and not place.is_mount():
            pytest.skip("needs the right to mount a file system")
        assert mounted.returncode == 0, mounted.stderr
        return place

    yield make
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


# From a disk that holds nothing to one that holds all but the vectors. What comes through a pipe has no size to judge by.
@pytest.mark.parametrize("size", ["8k", "60k", "240k", "600k"])
def test_a_full_disk_ends_with_3_and_the_same_command_goes_on_when_there_is_space(
    size: str, embedmill: Command, small_disk: Callable[[str], Path]
) -> None:
    texts = {f"d{number}": os.urandom(60).hex() for number in range(1500)}
    piped = "".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in texts.items()).encode()
    out = small_disk(size) / "out"
    command = ("run", "-", "--model", "null/128", "--no-milvus", "--to", str(out))
    ended = embedmill(*command, stdin=piped)
    assert ended.status == 3
    assert "No space left" in ended.stderr or "disk is full" in ended.stderr
    assert_one_line(ended.stderr)
    small_disk("20m")
    assert embedmill(*command, stdin=piped).status == 0
    check_dataset(out, source=texts)


def test_a_disk_that_is_too_small_for_a_file_is_said_before_anything_is_admitted(
    embedmill: Command, small_disk: Callable[[str], Path]
) -> None:
    texts = {f"d{number}": os.urandom(60).hex() for number in range(1500)}
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    out = small_disk("240k") / "out"
    command = ("run", "in.jsonl", "--model", "null/128", "--no-milvus", "--to", str(out))
    ended = embedmill(*command)
    assert ended.status == 3
    assert re.search(r"needs about .* and its disk has .* free: nothing was admitted", ended.stderr)
    assert_one_line(ended.stderr)
    assert not list(out.glob("documents/*"))
    small_disk("20m")
    assert embedmill(*command).status == 0
    check_dataset(out, source=texts)


def test_a_file_that_may_grow_no_further_ends_with_3_and_goes_on_when_it_may(embedmill: Command) -> None:
    texts = {f"d{number}": os.urandom(60).hex() for number in range(1500)}
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    command = ("run", "in.jsonl", "--model", "null/128", "--no-milvus", "--to", "out")
    ended = embedmill(*command, largest_file_bytes=400_000)
    assert ended.status == 3
    assert "File too large" in ended.stderr
    assert_one_line(ended.stderr)
    assert embedmill(*command).status == 0
    check_dataset(embedmill.folder / "out", source=texts)
