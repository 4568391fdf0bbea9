"""What is purged is nowhere any more, byte by byte, and everything else is as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from anyio import to_thread

import worker.commit
from embedmill.connection import Connection
from embedmill.dataset import layout
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.dead_letters import drop_letters, failed_rows
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import Marker
from embedmill.dataset.passages import ShardOrigin
from embedmill.dataset.purging import Purge
from embedmill.dataset.summary import summarize
from embedmill.dataset.verification import verify_dataset
from embedmill.errors import CorruptStore
from embedmill.messages import DeadLetter, job_key
from loader.service import Loader
from loader.target import open_target
from loader.verification import verify_target
from scheduler.admission import Admitter
from scheduler.housekeeping import Housekeeping
from scheduler.queue import Queue
from tests.datasets import admit_texts, document, passage
from tests.invariants import check_dataset, final_set
from tests.shard_log import ShardLog
from worker.checkpoints import Checkpoint
from worker.commit import commit_shard
from worker.embedders.null import hash_vectors
from worker.results import Increment, ShardResults

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
    # It failed at a place that compaction has emptied since.
    letter = DeadLetter(dataset.url, "main", SECRET, 3, failure.shard + 70, 5, "gate", "no vector")
    connection: Connection = queue.connection
    dead = f"{queue._prefix}:dead:{job_key(dataset.info.id, 'main')}"
    await connection.command("HSET", dead, letter.key, letter.to_json())
    async with open_target(str(milvus)) as target, Loader(Dataset.open(dataset.url), target) as loader:
        await loader.sweep()
        await loader.finish()
    command = [
        "purge",
        dataset.url,
        SECRET,
        "d",
        "--milvus",
        str(milvus),
        "--redis",
        server_url,
        "--namespace",
        "tested",
    ]
    second = await to_thread.run_sync(embedmill, *command)
    assert second.returncode == 0, second.stderr
    assert second.stdout.endswith(f"and in {milvus}: gone\n")
    async with open_target(str(milvus)) as target:
        report = await verify_target(Dataset.open(dataset.url), target)
    assert report.ok, report.as_dict()
    assert report.found == 4
    assert not await connection.command("HLEN", dead)


def split_document(log: ShardLog, name: str, *parts: str) -> None:
    rows = [replace(passage(f"{name}#{n}", text), group=name) for n, text in enumerate(parts)]
    number = len(log.dataset.admitted())
    origin = ShardOrigin(number, "main")
    log.dataset.append_passages(number, rows, origin=origin)
    log.commit(number, rows, origin)


async def load(dataset: Dataset, milvus: Path, collection: str | None = None) -> None:
    opened = open_target(str(milvus), collection=collection)
    async with opened as target, Loader(Dataset.open(dataset.url), target) as loader:
        await loader.sweep()
        await loader.finish()


async def ids_in(milvus: Path, collection: str) -> set[str]:
    async with open_target(str(milvus), collection=collection) as target:
        await target.make_searchable()
        return set(await target.versions())


async def purge(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await to_thread.run_sync(embedmill, "purge", *arguments)


@pytest.mark.parametrize("where", ["environment", "file"])
async def test_one_milvus_may_be_set_for_all_commands(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    milvus = tmp_path / "my milvus.db"
    ShardLog(dataset).shard((SECRET, TEXT), ("b", "one"))
    await load(dataset, milvus)
    if where == "environment":
        monkeypatch.setenv("EMBEDMILL_MILVUS", str(milvus))
    else:
        (tmp_path / "settings.toml").write_text(f'milvus = "{milvus}"\n')
        monkeypatch.setenv("EMBEDMILL_CONFIG", str(tmp_path / "settings.toml"))
    done = await purge(dataset.url, SECRET, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["left_in_milvus"], said["not_reached"]) == (0, [])
    assert await ids_in(milvus, Path(dataset.url).name) == {"b"}


async def test_collections_that_are_not_named_are_named_before_anything_is_erased(
    dataset: Dataset, tmp_path: Path
) -> None:
    log, milvus, name = ShardLog(dataset), tmp_path / "milvus.db", Path(dataset.url).name
    split_document(log, "doc_1", "one", "two")
    log.shard(("docX1#0", "another"), ("doc_1#7", "not a part of it"))
    await load(dataset, milvus)
    await load(dataset, milvus, "second")
    before = final_set(dataset.url)
    for refused, said in (
        ([], f"collection {name} of {milvus}, collection second of {milvus}"),
        (["--milvus", str(milvus), "--collection", "second"], f"was loaded into collection {name} of {milvus};"),
        (["--milvus", str(tmp_path / "milvos.db")], "there is no Milvus database"),
        (["--milvus", str(milvus), "--collection", "typo"], "has no collection typo"),
        (["--milvus", str(milvus), "--redis", "redis://127.0.0.1:1"], "127.0.0.1:1"),
    ):
        done = await purge(dataset.url, "doc_1", *refused)
        assert done.returncode != 0, done.stdout
        assert (done.stderr.count("\n"), said in done.stderr) == (1, True), done.stderr
    assert final_set(dataset.url) == before
    left_alone = await purge(dataset.url, "doc_1", "--no-milvus")
    assert left_alone.returncode == 0, left_alone.stderr
    assert f"not reached: collection second of {milvus}" in left_alone.stdout
    assert {id_ for id_, _ in final_set(dataset.url)} == {"docX1#0", "doc_1#7"}
    assert len(await ids_in(milvus, "second")) == 4
    # The log has forgotten that there were two parts.
    again = await purge(dataset.url, "doc_1", "--milvus", str(milvus))
    assert again.returncode == 0, again.stderr
    for collection in (name, "second"):
        assert await ids_in(milvus, collection) == {"docX1#0", "doc_1#7"}


@pytest.mark.parametrize(
    "place",
    [
        "compaction.after_documents",
        "compaction.before_switch",
        "compaction.after_switch",
        "compaction.after_vectors_deleted",
        "compaction.after_rows_deleted",
        "before the lists",
    ],
)
def test_a_purge_that_was_killed_is_ended_by_the_same_one(
    dataset: Dataset, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ShardLog(dataset)
    split_document(log, SECRET, "!" + TEXT, TEXT)
    log.shard(("b", "one"), (SECRET, TEXT))
    drop_letters(dataset, failed_rows(dataset))
    dataset.store.create("checkpoints/00000000/x-00001", SECRET.encode())
    dataset.put_aside(1)
    log.commit_admitted(1)
    command = [sys.executable, "-m", "embedmill", "purge", dataset.url, SECRET]
    if place == "before the lists":
        killed = Purge(Dataset.open(dataset.url), [SECRET])
        monkeypatch.setattr(killed, "_clean_aside", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    else:
        environment = {**os.environ, "EMBEDMILL_FAILPOINTS": f"{place}=crash"}
        assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 137
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert holders(Path(dataset.url), SECRET.encode(), TEXT.encode(), vector_of(dataset, TEXT)) == []
    assert set(final_set(dataset.url)) == {("b", 1)}
    assert dataset.store.names("checkpoints") == []
    check_dataset(dataset.url)


def test_what_was_put_aside_of_a_shard_that_compaction_erased_is_gone(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "!one"))
    log.shard(("c", "one"))
    dataset.put_aside(0)
    log.commit_admitted(0)
    compact(dataset, grace_s=0)
    assert Purge(dataset, [SECRET]).run().is_gone
    assert not any(path.is_file() for path in (Path(dataset.url) / "damaged").rglob("*"))


def test_a_file_that_a_killed_writer_left_is_reported_and_gone_once_nobody_can_be_writing_it(dataset: Dataset) -> None:
    ShardLog(dataset).shard(("b", "one"))
    left = Path(dataset.url) / "documents/.00000009.parquet.abc.tmp"
    left.write_bytes(SECRET.encode())
    assert Purge(dataset, [SECRET]).run().left == ["documents/.00000009.parquet.abc.tmp"]
    minutes_ago = time.time() - 120
    os.utime(left, (minutes_ago, minutes_ago))
    assert Purge(dataset, [SECRET]).run().is_gone
    assert not left.exists()


def test_rejects_lose_the_lines_that_name_it_and_no_others(dataset: Dataset) -> None:
    ShardLog(dataset).shard(("doc#7", "a document of its own"))
    folder = Path(dataset.url) / "rejects"
    folder.mkdir()
    about = [
        {"id": SECRET, "place": "x:1", "reason": "no text"},
        {"id": None, "place": f"{SECRET}.txt", "reason": "not UTF-8"},
        {"id": None, "place": "x:2", "reason": f"the id {SECRET!r} is no id"},
        {"id": "doc#0", "place": "x:3", "reason": "no text"},
        {"id": None, "place": "x:4", "reason": "the key 'a' is not there"},
    ]
    others = [
        {"id": "doc#7", "place": "x:5", "reason": "no text"},
        {"id": "patient-47110", "place": "x:6", "reason": "no text"},
        {"id": None, "place": "x:7", "reason": "a text is not a number"},
    ]
    for name in ("source-1.jsonl", "inbox-a.jsonl.old"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in [*about, *others]))
    (folder / "source-2.jsonl.rewritten").write_text(SECRET)
    assert Purge(dataset, [SECRET, "doc", "a"]).run().is_gone
    for name in ("source-1.jsonl", "inbox-a.jsonl.old"):
        assert [json.loads(line) for line in (folder / name).read_text().splitlines()] == others
    assert not (folder / "source-2.jsonl.rewritten").exists()


def late_results(dataset: Dataset, *texts: str) -> ShardResults:
    results = ShardResults(len(texts), dataset.info.dimensions)
    vectors = hash_vectors(list(texts), dataset.info.dimensions)
    results.add(Increment(np.arange(len(texts), dtype=np.int32), vectors))
    return results


def commit_late(dataset: Dataset, *, ids: list[str], texts: list[str]) -> Marker:
    return commit_shard(
        dataset, 0, late_results(dataset, *texts), origin=ShardOrigin(0, "main"), passages=[(id_, 1) for id_ in ids],
        attempt="late", worker="w",
    )  # fmt: skip


@pytest.mark.parametrize("at", ["before", "storing", "worker.after_vectors", "worker.after_marker"])
def test_a_worker_that_is_late_brings_nothing_back(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """It may have been about to store the vectors, or the marker, of a shard that was committed by another and purged."""
    log = ShardLog(dataset)
    number = log.shard((SECRET, TEXT), ("b", "one"), commit=False)
    needles = [SECRET.encode(), vector_of(dataset, TEXT)]

    def purge_meanwhile(reached: str) -> None:
        if reached == at:
            other = Dataset.open(dataset.url)
            if other.marker(number) is None:
                other.store.delete(layout.vectors_key(number))
                ShardLog(other).commit_admitted(number)
            assert Purge(other, [SECRET]).run().is_gone

    if at == "before":
        purge_meanwhile(at)
    store_vectors = worker.commit._store_vectors

    def store_late(*arguments: Any, **named: Any) -> Any:
        purge_meanwhile("storing")
        return store_vectors(*arguments, **named)

    monkeypatch.setattr(worker.commit, "_store_vectors", store_late)
    monkeypatch.setattr(worker.commit, "failpoint", purge_meanwhile)
    marker = commit_late(dataset, ids=[SECRET, "b"], texts=[TEXT, "one"])
    assert marker.failures == ()
    Checkpoint(dataset, number, attempt="late").keep(late_results(dataset, TEXT, "one").take_unkept())
    assert holders(Path(dataset.url), *needles) == []
    assert dataset.store.names("checkpoints") == []
    assert dataset.stored_markers() == {1}
    check_dataset(dataset.url)


def test_a_late_worker_leaves_what_is_still_read_of_a_retired_shard(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    log.shard(("b", "one"))
    compact(dataset)
    stored = Path(dataset.url) / layout.vectors_key(0)
    before = stored.read_bytes()
    commit_late(Dataset.open(dataset.url), ids=["a"], texts=["one"])
    assert stored.read_bytes() == before
    assert dataset.stored_markers() == {0, 1, 2}


@pytest.mark.parametrize("with_marker", [True, False])
def test_what_a_late_worker_died_over_is_swept(dataset: Dataset, with_marker: bool) -> None:
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "one"))
    assert Purge(dataset, [SECRET]).run().is_gone
    dataset.store.create("checkpoints/00000000/late-00001", b"vectors")
    dataset.create_vectors(0, hash_vectors([TEXT, "one"], dataset.info.dimensions))
    if with_marker:
        dataset.store.create(layout.commit_key(0), dataset.store.read(layout.commit_key(1)))
    other = Dataset.open(dataset.url)
    Housekeeping(other).sweep()
    assert holders(Path(dataset.url), vector_of(dataset, TEXT)) == []
    assert (other.store.names("checkpoints"), other.stored_markers()) == ([], {1})


@pytest.mark.parametrize("purges", [[SECRET], [SECRET, "b"]])
def test_another_index_forgets_what_was_erased_before_it_looked_again(
    dataset: Dataset, tmp_path: Path, purges: list[str]
) -> None:
    log = ShardLog(dataset)
    log.shard((SECRET, TEXT), ("b", "one"), ("c", "one"))
    with closing(DatasetIndex(tmp_path / "other.sqlite", dataset_id=dataset.info.id)) as other:
        dataset.catch_up(other)
        for id_ in purges:
            assert Purge(Dataset.open(dataset.url), [id_]).run().is_gone
        behind = Dataset.open(dataset.url)
        behind.catch_up(other)
        assert other.versions([*purges, "c"]) == {"c": [(1, len(purges), 2 - len(purges))]}
        admitter = Admitter(behind, other, job="main")
        admitter.admit("k", "source", [document(SECRET, TEXT, record=1)])
        assert [task.rows for task in admitter.close_shard()] == [1]


def test_bad_input_is_one_line(tmp_path: Path, dataset: Dataset) -> None:
    admit_texts(dataset, 0, ["one"])
    bad = tmp_path / "ids"
    bad.write_bytes(b"\xff\xfe")
    for arguments in ([], ["--ids-file", str(bad)]):
        done = embedmill("purge", dataset.url, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert dataset.owed() == [0]


@pytest.mark.parametrize("id_", ["", "a\nb", "x" * 513, "\udcff\udcfe"])
def test_what_can_be_no_id_is_refused(dataset: Dataset, id_: str) -> None:
    ShardLog(dataset).shard((SECRET, TEXT))
    done = embedmill("purge", dataset.url, "--", id_)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_ids_that_nothing_held_are_named_and_the_mark_of_a_file_is_none_of_them(
    dataset: Dataset, tmp_path: Path
) -> None:
    ShardLog(dataset).shard((SECRET, TEXT), ("b", "one"))
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{SECRET}\nmistyped\n", encoding="utf-8-sig")
    done = embedmill("purge", dataset.url, "--ids-file", str(ids))
    assert done.returncode == 0, done.stderr
    assert "nothing held 1 of the ids: mistyped" in done.stdout
    assert holders(Path(dataset.url), SECRET.encode()) == []
