"""Datasets into a real Milvus Lite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import numpy as np
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED
from embedmill.errors import ConfigurationError
from embedmill.messages import Task
from loader.description import CollectionDescription
from loader.ledger import Ledger, LedgerTarget
from loader.service import Loader
from loader.target import MilvusTarget, open_target
from loader.verification import verify_target
from scheduler.embedded import embedded_server
from scheduler.queue import Queue
from tests.loader_bench import DIMENSIONS, Row, add, admit, commit, embedded, load, make_dataset, text_of
from worker.embedders.null import hash_vectors


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "corpus")


async def test_a_load_brings_every_row_and_verification_agrees(dataset: Dataset, target: MilvusTarget) -> None:
    add(dataset, embedded(1500), [*embedded(10, start=1500), ("bad", 1, FAILED)])
    uri = target.address.uri
    loader = await load(dataset, uri)
    assert (loader.counts.shards_loaded, loader.counts.rows_upserted, loader.counts.rows_skipped) == (2, 1510, 1)
    report = await verify_target(dataset, target)
    assert (report.ok, report.collection, report.expected, report.found, report.sampled) == (
        True, "corpus", 1510, 1510, 200
    )  # fmt: skip


async def test_loading_again_sends_nothing(dataset: Dataset, target: MilvusTarget) -> None:
    add(dataset, embedded(20), embedded(20, start=20))
    await load(dataset, target.address.uri)
    again = await load(dataset, target.address.uri)
    assert (again.counts.shards_loaded, again.counts.rows_upserted) == (0, 0)
    add(dataset, embedded(5, start=40))
    grown = await load(dataset, target.address.uri)
    assert (grown.counts.shards_loaded, grown.counts.rows_upserted) == (1, 5)
    assert (await verify_target(dataset, target)).ok


VERSIONS: list[list[Row]] = [
    [("a", 1, EMBEDDED), ("b", 1, EMBEDDED), ("c", 1, EMBEDDED), ("d", 1, EMBEDDED)],
    [("a", 2, EMBEDDED), ("b", 2, DELETED), ("c", 2, FAILED), ("e", 1, EMBEDDED)],
    [("b", 3, EMBEDDED), ("e", 2, DELETED), ("d", 2, DELETED)],
]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
async def test_versions_and_tombstones_committed_in_any_order_end_at_the_newest(
    dataset: Dataset, target: MilvusTarget, order: tuple[int, ...]
) -> None:
    for shard, rows in enumerate(VERSIONS):
        admit(dataset, shard, rows)
    async with Loader(dataset, target) as loader:
        for shard in order:
            commit(dataset, shard, VERSIONS[shard])
            assert await loader.load_shard(shard)
        await loader.finish()
        assert await target.versions() == {"a": 2, "b": 3, "c": 1}
        assert (await verify_target(dataset, target)).ok


async def test_a_shard_that_is_not_committed_is_not_loaded(dataset: Dataset, target: MilvusTarget) -> None:
    admit(dataset, 0, embedded(3))
    async with Loader(dataset, target) as loader:
        assert not await loader.load_shard(0)
        assert await loader.sweep() == 0


def ledger_of(dataset: Dataset) -> Ledger:
    (folder,) = (Path(dataset.url) / "loads").iterdir()
    record = json.loads((folder / "target.json").read_bytes())
    record.pop("format_version")
    return Ledger(dataset, LedgerTarget(**record))


async def test_a_send_without_a_result_in_the_ledger_is_applied_again(dataset: Dataset, target: MilvusTarget) -> None:
    add(dataset, embedded(30), embedded(30, start=30))
    await load(dataset, target.address.uri)
    ledger = ledger_of(dataset)
    ledger.forget([1])
    ledger.intend(1)
    again = await load(dataset, target.address.uri)
    assert (again.counts.shards_loaded, again.counts.rows_upserted) == (1, 30)
    assert ledger.intents() == set()
    assert set(ledger.results()) == {0, 1}
    assert (await verify_target(dataset, target)).found == 60


async def test_a_result_beside_its_intent_is_applied_again_and_leaves_no_intent(
    dataset: Dataset, target: MilvusTarget
) -> None:
    add(dataset, embedded(30), embedded(30, start=30))
    await load(dataset, target.address.uri)
    ledger = ledger_of(dataset)
    ledger.intend(1)
    again = await load(dataset, target.address.uri)
    assert again.counts.shards_loaded == 1
    assert ledger.intents() == set()
    assert set(ledger.results()) == {0, 1}
    assert (await verify_target(dataset, target)).ok


def index_files(uri: str) -> list[Path]:
    """What Milvus Lite keeps of its index, a file per segment."""
    return list(Path(uri).rglob("*.idx"))


async def test_an_index_that_a_kill_left_half_written_is_built_anew(dataset: Dataset, tmp_path: Path) -> None:
    uri = str(tmp_path / "milvus.db")
    add(dataset, embedded(30), embedded(30, start=30))
    await load(dataset, uri)
    [index] = index_files(uri)
    os.truncate(index, 128)
    async with open_target(uri) as target:
        assert (await verify_target(dataset, target)).ok
        hits = await target.search(hash_vectors([text_of("d31", 1)], DIMENSIONS)[0], limit=1)
        assert hits[0].id == "d31"


async def test_what_a_dead_loader_left_late_is_overruled_again(dataset: Dataset, target: MilvusTarget) -> None:
    add(dataset, [("a", 1, EMBEDDED), ("b", 1, EMBEDDED)], [("a", 2, EMBEDDED), ("b", 2, DELETED)])
    await load(dataset, target.address.uri)
    ledger = ledger_of(dataset)
    ledger.forget([0])
    ledger.intend(0)
    vector = np.ones(DIMENSIONS, dtype=np.float32)
    await target.connect()
    target.collection = "corpus"
    await target.upsert([{"id": id_, "vector": vector, "text": "", "metadata": {}, "version": 1} for id_ in "ab"])
    await load(dataset, target.address.uri)
    assert await target.versions() == {"a": 2}
    assert (await verify_target(dataset, target)).ok


async def test_a_sweep_cancelled_anywhere_leaves_what_the_next_one_completes(
    dataset: Dataset, target: MilvusTarget
) -> None:
    add(dataset, *(embedded(300, start=300 * shard) for shard in range(6)))
    async with Loader(dataset, target) as loader:
        for delay_s in (0.0, 0.02, 0.1, 0.2):
            with anyio.move_on_after(delay_s):
                await loader.sweep()
        await loader.sweep()
        await loader.finish()
        assert (await verify_target(dataset, target)).found == 1800
        assert await loader.sweep() == 0


_KILLED = """
import sys, anyio
from embedmill.dataset.dataset import Dataset
from loader.service import Loader
from loader.target import MilvusTarget
async def main():
    async with Loader(Dataset.open(sys.argv[1]), MilvusTarget(sys.argv[2])) as loader:
        await loader.sweep()
        print("done", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.parametrize("moment", ["while sending", "when done"])
async def test_a_loader_killed_leaves_what_the_next_one_completes(
    dataset: Dataset, tmp_path: Path, moment: str
) -> None:
    add(dataset, *(embedded(1500, start=1500 * shard) for shard in range(3)))
    uri, folder = str(tmp_path / "killed.db"), Path(dataset.url)
    command = [sys.executable, "-c", _KILLED, dataset.url, uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert process.stdout is not None
    try:
        if moment == "when done":
            assert process.stdout.readline() == b"done\n"
            with pytest.raises(ConfigurationError, match=r"another process has .* open"):
                await load(dataset, uri)
        else:
            await until(lambda: process.poll() is not None or list(folder.glob("loads/*/*.intent.json")))
            assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    loader = await load(dataset, uri)
    assert (loader.counts.shards_loaded > 0) == (moment == "while sending")
    async with open_target(uri, must_exist=True) as target:
        report = await verify_target(dataset, target)
    assert (report.ok, report.found) == (True, 4500)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - another process, or a counter
            await anyio.sleep(0.005)


async def test_a_collection_dropped_and_made_anew_is_loaded_from_the_beginning(
    dataset: Dataset, target: MilvusTarget
) -> None:
    add(dataset, embedded(25))
    await load(dataset, target.address.uri)
    await target.connect()
    target._client.drop_collection("corpus")
    report = await verify_target(dataset, target)
    assert (report.ok, len(report.missing)) == (False, 25)
    again = await load(dataset, target.address.uri)
    assert again.counts.rows_upserted == 25
    assert (await verify_target(dataset, target)).ok


async def test_a_collection_of_other_vectors_is_refused_with_the_difference(tmp_path: Path, dataset: Dataset) -> None:
    add(dataset, embedded(3))
    uri = str(tmp_path / "milvus.db")
    await load(dataset, uri, collection="shared")
    wider = make_dataset(tmp_path / "wider", dimensions=16)
    with pytest.raises(ConfigurationError, match=r"dimensions 8 here, 16 in the dataset.*--collection"):
        await load(wider, uri, collection="shared")
    twin = make_dataset(tmp_path / "twin")
    with pytest.raises(ConfigurationError, match=r"another dataset.*--collection"):
        await load(twin, uri, collection="shared")


async def test_a_collection_that_is_not_ours_is_refused(dataset: Dataset, target: MilvusTarget) -> None:
    await target.connect()
    target._client.create_collection("corpus", dimension=4)
    with pytest.raises(ConfigurationError, match="embedmill did not make it"):
        await load(dataset, target.address.uri)


async def test_a_second_loader_of_one_collection_is_refused(dataset: Dataset, target: MilvusTarget) -> None:
    async with Loader(dataset, target):
        with pytest.raises(ConfigurationError, match="another loader"):
            await load(dataset, target.address.uri)


@pytest.mark.parametrize(
    ("make", "uri", "words"),
    [
        ("file", "thing.db", "is a file"),
        ("folder", "thing.db", "other things in it"),
        ("file", "thing.db/deeper/milvus.db", "cannot create the folder"),
        ("nothing", "milvus", "milvus.db"),
        ("nothing", "localhost:19530", "http://localhost:19530"),
        ("nothing", "ftp://localhost/x.db", "http://HOST:19530"),
        ("nothing", "http://127.0.0.1:9", "cannot reach Milvus at http://127.0.0.1:9"),
    ],
)
async def test_a_place_that_is_something_else_is_refused_in_one_line(
    tmp_path: Path, make: str, uri: str, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.target._CONNECT_S", 1.0)
    thing = tmp_path / "thing.db"
    if make == "file":
        thing.write_text("a text")
    if make == "folder":
        thing.mkdir()
        (thing / "notes.txt").write_text("a text")
    plain = "://" in uri or ":" in uri or uri == "milvus"
    with pytest.raises(ConfigurationError, match=words) as caught:
        async with open_target(uri if plain else str(tmp_path / uri)):
            pass
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


async def test_a_broken_database_is_refused_in_one_line(
    dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    add(dataset, embedded(3))
    uri = tmp_path / "milvus.db"
    await load(dataset, str(uri))
    (uri / "collections" / "corpus" / "schema.json").write_text("{")
    with pytest.raises(Exception, match=r"corpus|schema") as caught:
        await load(dataset, str(uri))
    assert type(caught.value).__module__ == "embedmill.errors"
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["pymilvus", "milvus_lite.server_manager"])
async def test_a_client_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'embedmill\[milvus\]'"):
        async with open_target(str(tmp_path / "milvus.db")):
            pass


async def test_a_database_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no Milvus database"):
        async with open_target(str(tmp_path / "none.db"), must_exist=True):
            pass
    assert not (tmp_path / "none.db").exists()


async def test_verification_finds_missing_extra_stale_and_different_rows_and_repair_mends_them(
    dataset: Dataset, target: MilvusTarget
) -> None:
    add(dataset, embedded(40), [("late", 3, EMBEDDED)])
    vector = np.ones(DIMENSIONS, dtype=np.float32)
    async with Loader(dataset, target) as loader:
        await loader.sweep()
        await loader.finish()
        assert (await verify_target(dataset, target)).ok
        await target.delete(["d1", "d2"])
        await target.upsert(
            [
                {"id": "stranger", "vector": vector, "text": "", "metadata": {}, "version": 1},
                {"id": "late", "vector": vector, "text": "", "metadata": {}, "version": 2},
                {"id": "d3", "vector": vector, "text": "", "metadata": {}, "version": 1},
            ]
        )
        report = await verify_target(dataset, target)
        assert not report.ok
        assert (report.missing, report.extra_ids, report.stale, report.different) == (
            ("d1", "d2"), ("stranger",), ("late",), ("d3",)
        )  # fmt: skip
        assert report.as_dict()["examples"] == {
            "missing": ["d1", "d2"], "extra": ["stranger"], "stale": ["late"], "different": ["d3"]
        }  # fmt: skip
        assert await loader.repair(report) == 2
        assert (await verify_target(dataset, target)).ok


async def test_a_text_longer_than_milvus_takes_is_cut_there_and_counted(dataset: Dataset, target: MilvusTarget) -> None:
    rows = [("long", 1, EMBEDDED), ("short", 1, EMBEDDED)]
    admit(dataset, 0, rows, texts={"long": "é" * 40_000})
    commit(dataset, 0, rows)
    loader = await load(dataset, target.address.uri)
    assert loader.counts.rows_cut == 1
    assert (await verify_target(dataset, target)).ok


async def test_following_loads_what_is_announced_until_it_is_stopped(dataset: Dataset, target: MilvusTarget) -> None:
    add(dataset, embedded(5))
    connection = Connection(FAKE_URL)
    queue = Queue(connection)
    stop = anyio.Event()
    async with Loader(dataset, target) as loader, anyio.create_task_group() as group:

        async def follow() -> None:
            await loader.follow(queue, stop, sweep_every_s=60)

        group.start_soon(follow)
        await until(lambda: loader.counts.shards_loaded == 1)
        add(dataset, embedded(5, start=5))
        task = Task(dataset.url, dataset.info.id, 1, "main", 5, 100)
        await queue.enqueue([task])
        await queue.lease("worker")
        await queue.finish(task)
        with anyio.fail_after(20):
            await until(lambda: loader.counts.shards_loaded == 2)
        stop.set()
    await connection.aclose()
    assert loader.counts.rows_upserted == 10


async def test_the_loader_service_loads_until_it_is_terminated(dataset: Dataset, tmp_path: Path) -> None:
    add(dataset, embedded(10))
    uri, folder = str(tmp_path / "milvus.db"), Path(dataset.url)
    with embedded_server() as redis:
        assert redis != FAKE_URL, "the server that comes along did not start"
        code = "from embedmill.commands.main import run; run()"
        options = ["--milvus", uri, "--to", dataset.url, "--redis", redis]
        command = [sys.executable, "-c", code, "loader", *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe)  # noqa: ASYNC220
        try:
            await until(lambda: process.poll() is not None or list(folder.glob("loads/*/00000000.json")))
            process.send_signal(signal.SIGTERM)
            said, complained = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, said) == (0, "")
    assert "stopped; 10 rows loaded" in complained
    assert "Traceback" not in complained
    async with open_target(uri, must_exist=True) as target:
        assert (await verify_target(dataset, target)).ok


async def test_ids_with_quotes_backslashes_and_other_scripts_are_loaded_read_back_and_deleted(
    dataset: Dataset, tmp_path: Path
) -> None:
    ids = ["a'b", 'a"b', "back\\slash", "\u65e5\u672c\u8a9e", "'", "\\", "x y", "%"]
    async with open_target(str(tmp_path / "milvus.db"), collection="odd") as target:
        await target.create(CollectionDescription.of_dataset(dataset.info))
        rows = [{"id": id_, "vector": np.ones(8, np.float32), "text": "", "metadata": {}, "version": 1} for id_ in ids]
        await target.upsert(rows)
        await target.make_searchable()
        assert set(await target.vectors(ids)) == set(ids)
        await target.delete(ids[:4])
        assert set(await target.versions()) == set(ids[4:])
