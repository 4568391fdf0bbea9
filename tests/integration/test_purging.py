"""What is purged is nowhere any more, byte by byte, and everything else is as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from anyio import to_thread

from embedmill.connection import Connection
from embedmill.dataset import layout
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.dead_letters import drop_letters, failed_rows
from embedmill.dataset.passages import ShardOrigin
from embedmill.dataset.purging import Purge
from embedmill.dataset.summary import summarize
from embedmill.dataset.verification import verify_dataset
from embedmill.errors import CorruptStore
from embedmill.messages import DeadLetter, job_key
from loader.service import Loader
from loader.target import open_target
from loader.verification import verify_target
from scheduler.queue import Queue
from tests.datasets import admit_texts, passage
from tests.invariants import check_dataset, final_set
from tests.shard_log import ShardLog
from worker.embedders.null import hash_vectors

SECRET = "patient-4711"
TEXT = "the secret of the patient"


def holders(root: Path, *needles: bytes) -> list[str]:
    """Files under a folder in which any of these bytes stand, decompressed where they are Parquet."""
    found = []
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += json.dumps(pq.read_table(path, columns=["id", "text", "group"]).to_pydict()).encode()
        if any(needle in data for needle in needles):
            found.append(str(path.relative_to(root)))
    return found


def embedmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedmill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def vector_of(dataset: Dataset, text: str) -> bytes:
    return hash_vectors([text], dataset.info.dimensions).tobytes()


@pytest.fixture
def log(dataset: Dataset) -> ShardLog:
    """Two versions of it, a failure that was dropped, one that was retired and stays readable, and others beside it."""
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "one"))
    log.shard(("c", "one"), ("b", "two"))
    compact(dataset)
    log.shard((SECRET, TEXT + " again"), ("d", "one"))
    log.shard((f"{SECRET}", "!bad " + TEXT), ("e", "!bad"))
    drop_letters(dataset, failed_rows(dataset))
    log.shard(("f", "one"))
    log.shard((SECRET, None), ("g", "one"))
    rejects = Path(dataset.url) / "rejects"
    rejects.mkdir()
    (rejects / "source-1.jsonl").write_text(f'{{"id": "{SECRET}", "place": "x"}}\n{{"id": "other", "place": "y"}}\n')
    return log


def test_every_version_is_gone_from_every_file_and_others_are_as_they_were(dataset: Dataset, log: ShardLog) -> None:
    needles = [SECRET.encode(), TEXT.encode(), vector_of(dataset, TEXT), vector_of(dataset, TEXT + " again")]
    dataset.open_index().close()
    assert len(holders(Path(dataset.url), *needles)) >= 8
    others = {key: row for key, row in final_set(dataset.url).items() if key[0] != SECRET}
    before = summarize(dataset)
    report = Purge(dataset, [SECRET]).run()
    assert report.is_gone
    assert (report.found, report.rewritten) == (5, 4)
    assert holders(Path(dataset.url), *needles) == []
    assert final_set(dataset.url) == others
    assert summarize(dataset).admitted == before.admitted
    assert [letter.failure.id for letter in failed_rows(dataset) if letter.state == "dropped"] == ["e"]
    assert (Path(dataset.url) / "rejects/source-1.jsonl").read_text() == '{"id": "other", "place": "y"}\n'
    check_dataset(dataset.url)
    assert verify_dataset(dataset).passed
    assert Purge(dataset, [SECRET]).run().found == 0


def test_a_document_that_was_split_goes_with_all_of_its_passages(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    rows = [replace(passage(f"doc#{n}", f"part {n}"), group="doc") for n in range(3)] + [passage("doc2", "other")]
    origin = ShardOrigin(0, "main")
    dataset.append_passages(0, rows, origin=origin)
    log.commit(0, rows, origin)
    assert Purge(dataset, ["doc"]).run().found == 3
    assert {id_ for id_, _ in final_set(dataset.url)} == {"doc2"}


def test_what_is_still_owed_is_said_and_gone_once_it_is_committed(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    number = log.shard((SECRET, TEXT), ("b", "one"), commit=False)
    report = Purge(dataset, [SECRET]).run()
    assert (report.owed, report.is_gone, report.rewritten) == ([number], False, 0)
    table, origin = dataset.documents(number)
    log.commit(
        number, [passage(*row) for row in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)], origin
    )
    assert Purge(dataset, [SECRET]).run().is_gone
    assert holders(Path(dataset.url), SECRET.encode()) == []


def test_a_shard_that_cannot_be_read_is_named_and_stays(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "one"))
    path = Path(dataset.url) / layout.vectors_key(0)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    report = Purge(dataset, [SECRET]).run()
    assert report.left == ["documents/00000000.parquet", "index"]
    with pytest.raises(CorruptStore):
        dataset.vectors(0)


def test_what_a_repair_put_aside_goes_too(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "!bad"))
    dataset.put_aside(0)
    table, origin = dataset.documents(0)
    log.commit(
        0, [passage(*row) for row in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)], origin
    )
    assert Purge(dataset, [SECRET]).run().is_gone
    assert not any(path.is_file() for path in (Path(dataset.url) / "damaged").rglob("*"))


async def test_the_command_erases_from_the_collection_and_the_queue_too(
    dataset: Dataset, log: ShardLog, tmp_path: Path, queue: Queue, server_url: str
) -> None:
    milvus = tmp_path / "milvus.db"
    dataset.write_job(layout.Job("main"))
    [failure] = [letter for letter in failed_rows(dataset) if letter.failure.id == SECRET]
    letter = DeadLetter(dataset.url, "main", SECRET, 3, *failure.place, "gate", "no vector")
    connection: Connection = queue.connection
    dead = f"{queue._prefix}:dead:{job_key(dataset.info.id, 'main')}"
    await connection.command("HSET", dead, letter.key, letter.to_json())
    async with open_target(str(milvus)) as target, Loader(Dataset.open(dataset.url), target) as loader:
        await loader.sweep()
        await loader.finish()
    command = ["purge", dataset.url, "d"]
    first = await to_thread.run_sync(embedmill, *command)
    assert first.returncode == 0, first.stderr
    assert "with --milvus URI" in first.stdout
    command = [*command[:-1], SECRET, "d", "--milvus", str(milvus), "--redis", server_url, "--namespace", "tested"]
    second = await to_thread.run_sync(embedmill, *command)
    assert second.returncode == 0, second.stderr
    assert second.stdout.endswith(f"and in {milvus}: gone\n")
    async with open_target(str(milvus)) as target:
        report = await verify_target(Dataset.open(dataset.url), target)
    assert report.ok, report.as_dict()
    assert report.found == 4
    assert not await connection.command("HLEN", dead)


def test_bad_input_is_one_line(tmp_path: Path, dataset: Dataset) -> None:
    admit_texts(dataset, 0, ["one"])
    bad = tmp_path / "ids"
    bad.write_bytes(b"\xff\xfe")
    for arguments in ([], ["--ids-file", str(bad)]):
        done = embedmill("purge", dataset.url, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert dataset.owed() == [0]
