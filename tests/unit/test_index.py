"""The index against a plain model of the log, and against a file that was lost or damaged."""

from __future__ import annotations

import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex, Known
from embedmill.dataset.passages import BatchPosition, Passage, ShardOrigin, SourcePosition, passages_table
from embedmill.documents import Cursor
from embedmill.errors import StorageError
from tests.datasets import admit_texts, passage, small_dataset

IDS = ["a", "b", "c", "d", "ü"]
Log = list[tuple[list[Passage], ShardOrigin]]


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Shards as an admitter makes them: versions of an id grow, the rows of a push stand together."""
    versions = dict.fromkeys(IDS, 0)
    log: Log = []
    read = {"p": 0, "q": 0}
    for shard in range(draw(st.integers(0, 4))):
        passages: list[Passage] = []
        sources: list[SourcePosition] = []
        for push in draw(st.lists(st.sampled_from(["p", "q"]), min_size=1, max_size=3)):
            first = len(passages)
            for id_ in draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=3)):
                versions[id_] += draw(st.integers(1, 3))
                passages.append(passage(id_, f"{push}{shard}", version=versions[id_], deleted=draw(st.booleans())))
            read[push] += len(passages) - first
            sources.append(SourcePosition(push, f"{push}.jsonl", Cursor(record=read[push]), first))
        log.append((passages, ShardOrigin(shard, "main", tuple(sources))))
    return log


def newest_in(log: Log) -> dict[str, Known]:
    newest: dict[str, Known] = {}
    for passages, origin in log:
        for row, p in enumerate(passages):
            push = [source.push_key for source in origin.sources if source.first_row <= row][-1]
            if p.id not in newest or p.version > newest[p.id].version:
                newest[p.id] = Known(p.version, origin.shard, row, p.text_hash, p.metadata_hash, p.deleted, push)
    return newest


@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_the_index_knows_what_reading_the_whole_log_would_tell(log: Log) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = DatasetIndex(Path(folder) / "index" / "index.sqlite", dataset_id="d0")
        for passages, origin in log:
            assert index.absorb(origin.shard, passages_table(passages, origin=origin), origin)
        assert index.next_shard == len(log)
        assert index.rows == sum(len(passages) for passages, _ in log)
        newest = newest_in(log)
        assert index.newest([*IDS, "unknown"]) == newest
        expected = [(id_, known.version, known.shard, known.row) for id_, known in sorted(newest.items())]
        assert list(index.newest_rows()) == expected
        everything: dict[str, list[tuple[int, int, int]]] = {}
        for passages, origin in log:
            for row, p in enumerate(passages):
                everything.setdefault(p.id, []).insert(0, (p.version, origin.shard, row))
        assert index.versions(IDS) == everything
        cursors = {source.push_key: source.cursor for _, origin in log for source in origin.sources}
        assert {push: index.cursor(push) for push in ("p", "q")} == {push: cursors.get(push) for push in ("p", "q")}
        index.close()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = small_dataset(tmp_path / "d")
    for shard in range(3):
        admit_texts(dataset, shard, [f"text {shard} {row}" for row in range(8)])
    return dataset


def contents(dataset: Dataset) -> list[tuple[str, int, int, int]]:
    index = dataset.open_index()
    try:
        assert index.next_shard == 3
        return list(index.newest_rows())
    finally:
        index.close()


def test_a_shard_is_absorbed_once_and_in_its_order(dataset: Dataset) -> None:
    index = dataset.open_index()
    table, origin = dataset.documents(1)
    assert not index.absorb(1, table, origin)
    assert not index.absorb(4, table, origin)
    assert (index.next_shard, index.rows) == (3, 24)
    index.close()


def test_more_ids_than_one_statement_takes_are_looked_up(dataset: Dataset) -> None:
    index = dataset.open_index()
    found = index.newest([f"{shard}-{row}" for shard in range(3) for row in range(1000)])
    assert len(found) == 24
    assert len(index.versions([f"{shard}-{row}" for shard in range(3) for row in range(1000)])) == 24
    index.close()


def test_a_deleted_index_is_built_anew(dataset: Dataset) -> None:
    before = contents(dataset)
    for path in (Path(dataset.url) / "index").iterdir():
        path.unlink()
    assert contents(dataset) == before


@pytest.mark.parametrize("garbage", [b"garbage" * 1000, b"\0" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_garbage_index_is_built_anew(dataset: Dataset, garbage: bytes) -> None:
    before = contents(dataset)
    (Path(dataset.url) / "index" / "index.sqlite").write_bytes(garbage)
    assert contents(dataset) == before


def test_an_index_with_damaged_pages_is_built_anew_or_refused_with_what_to_do(dataset: Dataset) -> None:
    before = contents(dataset)
    path = Path(dataset.url) / "index" / "index.sqlite"
    whole = path.read_bytes()
    for start in range(100, len(whole), 4096):
        damaged = bytearray(whole)
        damaged[start : start + 3000] = b"\xa5" * len(damaged[start : start + 3000])
        path.write_bytes(damaged)
        try:
            assert contents(dataset) == before
        except StorageError as error:
            assert f"delete the folder {path.parent}" in str(error)  # noqa: PT017
            path.write_bytes(whole)


def test_the_index_of_another_dataset_is_not_believed(dataset: Dataset) -> None:
    path = Path(dataset.url) / "index" / "index.sqlite"
    before = contents(dataset)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE stamp SET value = '1:another'")
        connection.execute("DELETE FROM passages")
    connection.close()
    assert contents(dataset) == before


def test_opened_by_several_at_once_it_is_built_once_and_whole(tmp_path: Path) -> None:
    for number in range(5):
        dataset = small_dataset(tmp_path / str(number))
        for shard in range(3):
            admit_texts(dataset, shard, ["text"] * 8)
        barrier = Barrier(4)

        def read(
            _: int, url: str = dataset.url, barrier: Barrier = barrier
        ) -> tuple[int, list[tuple[str, int, int, int]]]:
            mine = Dataset.open(url)
            barrier.wait(10)
            index = mine.open_index()
            try:
                return index.rows, list(index.newest_rows())
            finally:
                index.close()

        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(read, range(4)))
        assert [rows for rows, _ in seen] == [24] * 4
        assert seen == seen[:1] * 4


def test_keys_of_batches_are_kept_and_those_made_of_message_ids_while_they_may_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedmill.dataset.index._KEPT_SHARDS", 2)
    dataset = small_dataset(tmp_path / "d")
    for shard in range(6):
        # Shards that came another way do not count.
        batches = [BatchPosition(f"mine/{shard}", 1, 0), BatchPosition(f"inbox/{shard}-0/x", 2, 1)]
        origin = ShardOrigin(shard, "main", batches=tuple(batches) if shard % 2 == 0 or shard == 5 else ())
        admit_texts(dataset, shard, ["one", "two", "three"], origin=origin)
    keys = [f"{kind}{shard}{end}" for kind, end in (("mine/", ""), ("inbox/", "-0/x")) for shard in range(6)]
    expected = {"mine/0": 1, "mine/2": 1, "mine/4": 1, "mine/5": 1, "inbox/4-0/x": 2, "inbox/5-0/x": 2}
    for _ in range(2):
        index = dataset.open_index()
        assert index.batches(keys) == expected
        index.close()
        for path in (Path(dataset.url) / "index").iterdir():
            path.unlink()


def test_a_source_is_read_anew_when_something_came_through_the_inbox_since(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d")
    source = SourcePosition("p", "p.jsonl", Cursor(record=1), 0)
    admit_texts(dataset, 0, ["one"], origin=ShardOrigin(0, "main", (source,)))
    index = dataset.open_index()
    assert index.reading("p") == ("p", Cursor(record=1))
    admit_texts(dataset, 1, ["two"], origin=ShardOrigin(1, "main", batches=(BatchPosition("k", 1, 0),)))
    dataset.catch_up(index)
    assert index.reading("p") == ("p.2", None)
    index.close()
