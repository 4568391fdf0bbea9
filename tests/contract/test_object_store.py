"""What a dataset's store must do when it is an object store: contention, lost answers, requests, and what goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.store import Store, open_store
from embedmill.embedder import EmbedderSpec
from embedmill.errors import ConfigurationError, CorruptStore, ObjectChanged, ObjectExists, StorageError

pytest.importorskip("obstore")
pytest.importorskip("moto.server")

from embedmill.dataset import object_store
from embedmill.object_reader import TAIL_BYTES
from tests.datasets import admit_texts
from tests.object_server import Fault, ObjectServer

PROCESSES = 4
LOST: list[Fault] = ["503 afterwards", "reset afterwards"]


@pytest.fixture
def store(s3_folder: str, object_server: ObjectServer) -> Store:
    """One that has written before, so that no first requests are among those that count."""
    opened = open_store(s3_folder)
    opened.create("first", b"")
    object_server.forget()
    return opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_RETRY_S", "RETRY_S", "FIRST_TIMEOUT_S", "TIMEOUT_S"):
        monkeypatch.setattr(object_store, name, 0.5)


def in_processes(act: Callable[..., None], *arguments: Any) -> None:
    """`act(*arguments, number)` in four processes at once."""
    context = multiprocessing.get_context("forkserver")
    children = [
        context.Process(target=_with_environment, args=(dict(os.environ), act, *arguments, number))
        for number in range(PROCESSES)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * PROCESSES


def _with_environment(environment: dict[str, str], act: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    act(*arguments)


def _count(url: str, _number: int) -> None:
    store = open_store(url)
    for _ in range(15):
        while True:
            current = store.read("count")
            try:
                store.swap("count", b"%d" % (int(current) + 1), expected=current)
                break
            except ObjectChanged:
                continue


def test_a_counter_that_four_processes_swap_ends_exact(s3_folder: str) -> None:
    open_store(s3_folder).create("count", b"0")
    in_processes(_count, s3_folder)
    assert open_store(s3_folder).read("count") == b"60"


def _append(url: str, number: int) -> None:
    store = open_store(url)
    for line in range(30):
        store.append("batches.jsonl", b"%d:%d" % (number, line) + b"." * 1000 + b"\n")


def test_of_four_processes_that_append_to_one_log_no_line_is_lost_or_torn(s3_folder: str) -> None:
    in_processes(_append, s3_folder)
    store = open_store(s3_folder)
    lines = [line.rstrip(b".") for line in store.read_from("batches.jsonl", 0).splitlines()]
    for number in range(PROCESSES):
        mine = [line for line in lines if line.startswith(b"%d:" % number)]
        assert mine == [b"%d:%d" % (number, line) for line in range(30)]
    assert len(lines) == PROCESSES * 30
    assert store.names("batches.jsonl") == ["00000000", "00000001"]


def _create(url: str, barrier: str, number: int) -> None:
    store = open_store(url)
    store.create(f"{barrier}/{number}", b"")
    while len(store.names(barrier)) < PROCESSES:
        time.sleep(0.01)
    for key in range(30):
        try:
            # Whoever creates, the bytes are the same: it is not by them that the winner is known.
            store.create(f"same/{key}", b"same")
            store.append(f"won/{number}", b"%d\n" % key)
        except ObjectExists:
            continue


def test_of_processes_that_create_the_same_bytes_exactly_one_wins(s3_folder: str) -> None:
    in_processes(_create, s3_folder, "barrier")
    store = open_store(s3_folder)
    won = b"".join(store.read_from(f"won/{number}", 0) for number in range(PROCESSES))
    assert sorted(map(int, won.split())) == list(range(30))


def test_an_object_a_line_and_a_look_are_one_request_each(store: Store, object_server: ObjectServer) -> None:
    def requests(act: Callable[[], object]) -> dict[str, int]:
        object_server.forget()
        act()
        return dict(object_server.requests)

    assert requests(lambda: store.create("vectors/0", b"x" * (20 << 20))) == {"PUT vectors": 1}
    assert requests(lambda: store.read("vectors/0")) == {"GET vectors": 1}
    assert requests(lambda: store.read_or_none("commits/0")) == {"GET commits": 1}
    assert requests(lambda: store.names("commits")) == {"GET LIST commits": 1}
    assert requests(lambda: store.exists("commits/0")) == {"HEAD commits": 1}
    store.append("spend/w.log", b"first\n")
    assert requests(lambda: store.append("spend/w.log", b"second\n")) == {"PUT spend": 1}


@pytest.mark.parametrize("fault", LOST)
def test_a_creation_whose_answer_is_lost_has_succeeded_once(
    store: Store, object_server: ObjectServer, fault: Fault
) -> None:
    object_server.fail(fault, method="PUT", path="documents/1")
    store.create("documents/1", b"mine")
    assert store.read("documents/1") == b"mine"
    with pytest.raises(ObjectExists):
        store.create("documents/1", b"mine")


@pytest.mark.parametrize("fault", ["503", "reset", "409", "429"])
def test_a_creation_that_was_not_obeyed_is_tried_again(store: Store, object_server: ObjectServer, fault: Fault) -> None:
    object_server.fail(fault, method="PUT", path="documents/1", times=2)
    store.create("documents/1", b"mine")
    assert store.read("documents/1") == b"mine"


@pytest.mark.parametrize("fault", LOST)
def test_what_somebody_else_created_with_the_same_bytes_is_not_taken_for_ones_own(
    store: Store, object_server: ObjectServer, fault: Fault
) -> None:
    open_store(store.url).create("documents/1", b"same")
    object_server.fail(fault, method="PUT", path="documents/1")
    with pytest.raises(ObjectExists):
        store.create("documents/1", b"same")


@pytest.mark.parametrize("fault", [*LOST, "503", "reset"])
def test_a_swap_and_an_append_whose_answers_are_lost_happen_once(
    store: Store, object_server: ObjectServer, fault: Fault
) -> None:
    store.create("job", b"1")
    object_server.fail(fault, method="PUT", path="job")
    store.swap("job", b"2", expected=b"1")
    assert store.read("job") == b"2"
    for line in (b"a\n", b"b\n", b"c\n"):
        object_server.fail(fault, method="PUT", path="spend")
        store.append("spend/w.log", line)
    assert store.read_from("spend/w.log", 0) == b"a\nb\nc\n"


@pytest.mark.parametrize("fault", ["503", "reset", "429"])
def test_reading_and_listing_ride_out_a_server_in_trouble(
    store: Store, object_server: ObjectServer, fault: Fault
) -> None:
    store.create("f/a", b"a")
    for method, act in (("GET", lambda: store.read("f/a")), ("HEAD", lambda: store.exists("f/a"))):
        object_server.fail(fault, method=method, times=2)
        assert act()
    object_server.fail(fault, method="GET", times=2)
    assert store.names("f") == ["a"]
    object_server.fail(fault, method="POST", times=2)
    store.delete("f/a")
    assert not store.exists("f/a")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["503", "hang", "reset"])
def test_a_server_that_stays_in_trouble_is_one_line_that_names_the_object(
    s3_folder: str, object_server: ObjectServer, fault: Fault
) -> None:
    store = open_store(f"{s3_folder}/dataset")
    store.create("first", b"")
    acts: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("f/a"),
        "write": lambda: store.create("f/a", b""),
        "list": lambda: store.names("f/a"),
        "delete": lambda: store.delete("f/a"),
    }
    for verb, act in acts.items():
        begin = time.monotonic()
        with object_server.failing(fault), pytest.raises(StorageError) as caught:
            act()
        assert str(caught.value).startswith(f"cannot {verb} {s3_folder}/dataset/f/a: ")
        assert str(caught.value).endswith("nothing is lost, the same command goes on")
        assert "\n" not in str(caught.value)
        assert time.monotonic() - begin < 5


def test_a_server_that_is_not_there_is_a_storage_error_soon(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    begin = time.monotonic()
    with pytest.raises(StorageError, match=rf"cannot read {s3_folder}/dataset\.json: .*127\.0\.0\.1:1"):
        Dataset.open(s3_folder)
    assert time.monotonic() - begin < 10


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    missing = "s3://no-such-bucket/wiki"
    acts: list[Callable[[], object]] = [
        lambda: Dataset.open(missing),
        lambda: open_store(missing).exists("dataset.json"),
        lambda: open_store(missing).names(""),
        lambda: open_store(missing).create("dataset.json", b""),
        lambda: Dataset.open_or_create(missing, embedder=EmbedderSpec(model="null/3", dimensions=3)),
    ]
    for act in acts:
        with pytest.raises(ConfigurationError, match=r"^s3://no-such-bucket: no such bucket$"):
            act()


def test_a_key_that_is_refused_says_what_to_set_and_later_that_access_was_lost(
    store: Store, object_server: ObjectServer
) -> None:
    with object_server.failing("403"):
        with pytest.raises(ConfigurationError, match=r"cannot read .*: access denied: set AWS_ACCESS_KEY_ID"):
            open_store(store.url).read("f/a")
        with pytest.raises(StorageError, match=r"cannot write .*/f/a: access denied"):
            store.create("f/a", b"")


def test_a_request_that_is_refused_as_it_is_is_not_tried_again(s3_folder: str, object_server: ObjectServer) -> None:
    store = open_store(s3_folder)
    with object_server.failing("400"):
        with pytest.raises(ConfigurationError) as caught:
            store.read("dataset.json")
        assert str(caught.value).startswith(f"cannot read {s3_folder}/dataset.json: GET http://")
        assert str(caught.value).endswith("status code: 400 Bad Request (AuthorizationHeaderMalformed)")
        assert len(object_server.log) == 1
    assert store.read_or_none("dataset.json") is None
    object_server.forget()
    with object_server.failing("400"), pytest.raises(StorageError):
        store.read("dataset.json")
    assert len(object_server.log) == 1


def test_the_footer_of_a_shards_documents_is_one_request(s3_folder: str, object_server: ObjectServer) -> None:
    dataset = Dataset.open_or_create(s3_folder, embedder=EmbedderSpec(model="null/3", dimensions=3))
    texts = [f"{number} " * 400 for number in range(3000)]
    admit_texts(dataset, 0, texts)
    assert dataset.describe_object("documents/00000000.parquet").bytes > TAIL_BYTES
    object_server.forget()
    assert dataset.admission(0).rows == 3000
    assert dict(object_server.requests) == {"GET documents": 1}


def test_no_credentials_are_one_line(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    begin = time.monotonic()
    with pytest.raises(ConfigurationError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
        open_store(s3_folder).read("f/a")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 10


def test_a_store_that_passes_over_conditions_is_refused_before_anything_is_written(
    s3_folder: str, object_server: ObjectServer
) -> None:
    object_server.ignores_conditions = True
    try:
        for write in ("create", "append"):
            with pytest.raises(ConfigurationError, match="passes over If-None-Match or If-Match"):
                getattr(open_store(s3_folder), write)("documents/0", b"first")
    finally:
        object_server.ignores_conditions = False
    assert open_store(s3_folder).names("") == [".conditions"]


def test_a_log_goes_on_where_a_dataset_was_copied_between_a_folder_and_a_bucket(s3_folder: str, tmp_path: Path) -> None:
    here, there = LocalStore(tmp_path), open_store(s3_folder)
    here.append("log", b"one\n")
    there.create("log", here.read("log"))
    there.append("log", b"two\n")
    assert there.read_from("log", 0) == b"one\ntwo\n"
    assert there.read_from("log", 5) == b"wo\n"
    (tmp_path / "back").mkdir()
    for number, part in enumerate((b"one\n", b"two\n")):
        (tmp_path / f"back/{number:08d}").write_bytes(part)
    here.append("back", b"three\n")
    for offset in (0, 3, 4, 6, 8, 20):
        assert here.read_from("back", offset) == b"one\ntwo\nthree\n"[offset:]


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "embedmill.dataset.object_store")
    with pytest.raises(ConfigurationError, match=r"pip install 'embedmill\[objects\]'"):
        open_store("s3://bucket/wiki")


@pytest.mark.parametrize("url", ["s3://b/a//c", "s3://b/../c", "s3://b/./c"])
def test_a_prefix_that_no_tool_would_find_again_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no empty parts"):
        open_store(url)


def test_a_prefix_may_have_any_letters_and_a_slash_at_its_end(s3_folder: str) -> None:
    store = open_store(f"{s3_folder}/a b/ü%41~*+&?#/")
    store.create("f/one", b"1")
    store.append("log", b"2")
    assert store.url == f"{s3_folder}/a b/ü%41~*+&?#"
    assert (store.read("f/one"), store.read_from("log", 0)) == (b"1", b"2")
    assert [name for name in store.names("") if not name.startswith(".")] == ["f", "log"]


def test_a_prefix_with_other_things_in_it_is_refused(s3_folder: str) -> None:
    open_store(s3_folder).create("thesis.doc", b"")
    with pytest.raises(ConfigurationError, match=r"other things in it \(thesis\.doc"):
        Dataset.open_or_create(s3_folder, embedder=EmbedderSpec(model="null/3", dimensions=3))


def test_a_truncated_shard_is_corrupt_and_names_its_url(s3_folder: str) -> None:
    dataset = Dataset.open_or_create(s3_folder, embedder=EmbedderSpec(model="null/3", dimensions=3))
    dataset.create_vectors(0, np.ones((5, 3), dtype=np.float32))
    data = dataset.store.read("vectors.zarr/vectors/c/0/0")
    dataset.store.swap("vectors.zarr/vectors/c/0/0", data[:-5], expected=data)
    with pytest.raises(CorruptStore, match=f"{s3_folder}/vectors.zarr"):
        dataset.stored_vectors(0, rows=5)
