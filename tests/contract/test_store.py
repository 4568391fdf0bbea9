"""What every store of a dataset must do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.store import Store, open_store
from embedmill.errors import ConfigurationError, CorruptStore, ObjectChanged, ObjectExists, StorageError
from embedmill.objects import ObjectUrl

LINK_ERRORS = [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK]


def refusing(number: int) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture(params=["links", "no links", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "s3":
        return open_store(f"{request.getfixturevalue('s3_folder')}/dataset")
    if request.param == "memory":
        pytest.importorskip("obstore")
        from obstore.store import MemoryStore

        from embedmill.dataset.object_store import ObjectStore

        return ObjectStore(ObjectUrl("s3://m/dataset", "s3", "s3://m", "dataset"), bucket=MemoryStore())
    if request.param == "no links":
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    return open_store(str(tmp_path / "dataset"))


def attempt_to_create(store: Store, key: str, data: bytes) -> bool:
    try:
        store.create(key, data)
    except ObjectExists:
        return False
    return True


def test_what_was_created_is_read_back_whole(store: Store) -> None:
    store.create("a/b/one", [b"first ", bytearray(b"second "), memoryview(b"third")])
    store.create("a/b/two", b"")
    assert store.read("a/b/one") == b"first second third"
    assert store.read_or_none("a/b/two") == b""
    assert store.exists("a/b/one")


def test_creating_again_is_refused_and_the_first_content_stays(store: Store) -> None:
    store.create("one", b"first")
    with pytest.raises(ObjectExists, match="one exists already"):
        store.create("one", b"second")
    assert store.read("one") == b"first"
    assert store.names("") == [name for name in store.names("") if name in ("one", ".lock", ".conditions")]


def test_of_threads_that_create_one_object_exactly_one_wins(store: Store) -> None:
    for number in range(30):
        barrier = threading.Barrier(2)

        def race(content: bytes, key: str = f"race/{number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(5)
            return attempt_to_create(store, key, content * 10_000)

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(race, [b"left", b"right"]))
        assert sorted(results) == [False, True]
        winner = (b"left", b"right")[results.index(True)]
        assert store.read(f"race/{number}") == winner * 10_000


def _create_many(folder: str, content: bytes, kind: str, environment: dict[str, str], results: Any) -> None:
    os.environ.update(environment)
    if kind == "no links":
        os.link = refusing(errno.EPERM)
    store = open_store(folder)
    results.put((content, [number for number in range(100) if attempt_to_create(store, f"p/{number}", content * 999)]))


@pytest.mark.parametrize("kind", ["links", "no links", "s3"])
def test_of_processes_that_create_the_same_objects_each_is_won_once(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder = request.getfixturevalue("s3_folder") if kind == "s3" else str(tmp_path)
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    contents = [b"left", b"right"]
    environment = dict(os.environ)
    children = [context.Process(target=_create_many, args=(folder, c, kind, environment, results)) for c in contents]
    for child in children:
        child.start()
    won = dict(results.get(timeout=30) for _ in children)
    for child in children:
        child.join(30)
    assert sorted(won[b"left"] + won[b"right"]) == list(range(100))
    store = open_store(folder)
    for content, numbers in won.items():
        assert all(store.read(f"p/{number}") == content * 999 for number in numbers)


def test_a_reader_never_sees_an_object_in_part_nor_a_temporary(store: Store) -> None:
    content = bytes(range(256)) * 8192
    seen: list[bytes] = []
    names: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            names.update(store.names("big"))
            data = store.read_or_none("big/one")
            if data is not None:
                seen.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        store.create("big/one", content)
        store.delete("big/one")
    store.create("big/one", content)
    done.set()
    reader.join(10)
    assert all(data == content for data in seen)
    assert names <= {"one"}


def test_swap_replaces_exactly_what_was_expected(store: Store) -> None:
    store.swap("job", b"1", expected=None)
    store.swap("job", b"2", expected=b"1")
    for wrong in (b"1", None):
        with pytest.raises(ObjectChanged):
            store.swap("job", b"3", expected=wrong)
    assert store.read("job") == b"2"
    with pytest.raises(ObjectChanged):
        store.swap("absent", b"1", expected=b"0")


def test_counting_by_swap_from_several_threads_loses_no_count(store: Store) -> None:
    store.create("count", b"0")

    def count(_: int) -> None:
        for _ in range(20):
            while True:
                current = store.read("count")
                try:
                    store.swap("count", b"%d" % (int(current) + 1), expected=current)
                    break
                except ObjectChanged:
                    continue

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(count, range(3)))
    assert store.read("count") == b"60"


def test_appended_lines_stay_whole_whoever_appends(store: Store) -> None:
    def append(worker: int) -> None:
        for number in range(100):
            store.append("spend/log", b"%d:%d\n" % (worker, number))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append, range(3)))
    lines = store.read_from("spend/log", 0).splitlines()
    assert sorted(lines) == sorted(b"%d:%d" % (worker, number) for worker in range(3) for number in range(100))
    assert [line for line in lines if line.startswith(b"1:")] == [b"1:%d" % number for number in range(100)]


def test_a_log_is_read_on_from_any_place_and_is_a_name_of_its_folder(store: Store) -> None:
    assert store.read_from("spend/log", 0) == b""
    whole = b""
    for number in range(12):
        line = b"%d" % number * 10_000 + b"\n"
        store.append("spend/log", line, durable=True)
        whole += line
        assert store.read_from("spend/log", len(whole) - len(line)) == line
    for offset in (0, 1, 65_535, 65_536, 70_000, len(whole) - 1, len(whole), len(whole) + 1):
        assert store.read_from("spend/log", offset) == whole[offset:]
        assert store.read_end("spend/log", offset + 1) == whole[-offset - 1 :]
    store.create("spend/batch.log", b"one line\n")
    assert store.read_from("spend/batch.log", 4) == store.read_end("spend/batch.log", 5) == b"line\n"
    assert store.read_end("spend/none.log", 5) == b""
    assert store.names("spend") == ["batch.log", "log"]
    assert store.sizes("spend") == {"batch.log": 9, "log": len(whole)}
    assert store.sizes("nothing") == {}


def test_many_objects_are_read_in_the_order_asked_for(store: Store) -> None:
    for number in range(5):
        store.create(f"many/{number}", b"%d" % number)
    keys = [f"many/{number}" for number in (4, 0, 9, 2)]
    assert store.read_many(keys) == [b"4", b"0", None, b"2"]
    assert store.read_many([]) == []


def test_an_object_is_read_in_parts(store: Store) -> None:
    content = bytes(range(256)) * 1024
    store.create("parts", content)
    with store.open("parts") as file:
        assert file.seek(0, 2) == len(content)
        file.seek(-1000, 2)
        assert file.read(500) == content[-1000:-500]
        file.seek(10)
        assert file.read(200_000) == content[10:200_010]
    with pytest.raises(CorruptStore, match="absent is missing"):
        store.open("absent")


def test_names_are_sorted_and_of_one_folder_only(store: Store) -> None:
    for key in ("f/b", "f/a", "f/deeper/c", "g"):
        store.create(key, b"")
    assert store.names("f") == ["a", "b", "deeper"]
    assert store.names("nowhere") == []
    assert store.names("g") == []


def test_deleting_twice_is_fine_and_a_folder_goes_only_when_it_is_empty(store: Store) -> None:
    store.create("f/a", b"")
    store.delete_folder("f")
    assert store.exists("f/a")
    for _ in range(2):
        store.delete("f/a")
        store.delete_folder("f")
    assert not store.exists("f")


def test_a_missing_object_is_named(store: Store) -> None:
    assert store.read_or_none("f/a") is None
    with pytest.raises(CorruptStore, match=r"dataset/f/a is missing"):
        store.read("f/a")
    store.create("g", b"")
    assert store.read_or_none("g/below") is None


@pytest.mark.parametrize("number", LINK_ERRORS)
def test_without_hard_links_creation_is_still_exclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refusing(number))
    store = LocalStore(tmp_path)
    store.create("one", b"first")
    with pytest.raises(ObjectExists):
        store.create("one", b"second")
    assert store.read("one") == b"first"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_full_disk_says_what_to_free_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(tmp_path)
    monkeypatch.setattr(os, call, refusing(errno.ENOSPC))
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/one: .*; free some space and run"):
        store.create("one", b"x" * 100)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    store.create("one", b"later")
    assert store.read("one") == b"later"


@pytest.mark.parametrize("write", ["create", "swap", "append"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_refusing_disk_is_a_storage_error_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, number: int
) -> None:
    store = LocalStore(tmp_path)
    monkeypatch.setattr(os, "fsync" if write != "append" else "write", refusing(number))
    writes: dict[str, Callable[[], None]] = {
        "create": lambda: store.create("one", b"x"),
        "swap": lambda: store.swap("one", b"x", expected=None),
        "append": lambda: store.append("one", b"x"),
    }
    with pytest.raises(StorageError) as caught:
        writes[write]()
    assert str(caught.value).startswith(f"cannot write {tmp_path}/one: {os.strerror(number)}")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_swap_that_the_disk_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = LocalStore(tmp_path)
    store.create("one", b"before")
    monkeypatch.setattr(Path, "replace", refusing(number))
    with pytest.raises(StorageError, match=f"{tmp_path}/one"):
        store.swap("one", b"after", expected=b"before")
    monkeypatch.undo()
    assert store.read("one") == b"before"
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_append_that_the_disk_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    store = LocalStore(tmp_path)
    store.append("log", b"a long line\n")
    assert store.read("log") == b"a long line\n"


def test_reading_or_listing_what_the_disk_refuses_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.create("f/one", b"")
    with pytest.raises(StorageError, match=f"cannot read {tmp_path}/f"):
        store.read("f")
    monkeypatch.setattr(os, "scandir", refusing(errno.EACCES))
    with pytest.raises(StorageError, match=f"cannot list {tmp_path}/f"):
        store.names("f")


def test_a_sweep_removes_old_temporaries_and_nothing_else(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create("f/one", b"")
    for name, age_s in ((".old.1.tmp", 500), (".new.2.tmp", 0)):
        path = tmp_path / "f" / name
        path.touch()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age_s))
    assert store.sweep(older_than_s=100) == 1
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [".new.2.tmp", "one"]


def test_an_unknown_scheme_is_refused_and_file_urls_are_folders(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no dataset can be on https://; use a folder, or s3://, gs://, az://"
    ):
        open_store("https://host/wiki")
    with pytest.raises(ConfigurationError, match="names no bucket"):
        open_store("s3://")
    assert open_store(f"file://{tmp_path}").url == str(tmp_path)
    assert open_store(f"file://localhost{tmp_path}").url == str(tmp_path)
