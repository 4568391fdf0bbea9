"""Reading a dataset: what counts, whole and checked, in bounded memory, whatever was replaced."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embedmill
from embedmill import open_dataset
from embedmill.dataset import layout
from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED
from embedmill.dataset.passages import ShardOrigin
from embedmill.dataset.reader import DatasetReader
from embedmill.errors import ConfigurationError, SnapshotOutdated
from loader.rows import plan_shard
from tests.committed import Made, Row, made_dataset, newest_rows, rows_of


def content(reader: DatasetReader) -> dict[str, tuple[int, list[float]]]:
    found = {}
    for block in reader.blocks():
        assert block.addresses.dtype == np.int64
        assert block.vectors.flags.c_contiguous
        assert block.vectors.flags.writeable
        for id_, address, vector in zip(block.ids, block.addresses, block.vectors, strict=True):
            assert id_ not in found
            found[id_] = (int(address), vector.tolist())
    return found


def expected(made: Made, live: list[int]) -> dict[str, tuple[int, list[float]]]:
    return {row.id: (shard * 8 + place, row.vector.tolist()) for shard, place, row in newest_rows(made.log, live)}


def test_the_newest_decided_version_of_each_id_is_read(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    assert content(reader) == expected(mixed, [0, 1, 2, 3])
    assert list(reader.ids) == ["a", "d", "b", "e", "f"]
    assert len(reader) == 5
    assert reader.shards == (0, 1, 2, 3)
    assert reader.rows_per_shard.tolist() == [2, 2, 0, 1]


def test_a_reader_tells_what_made_the_vectors(mixed: Made) -> None:
    reader = open_dataset(Path(mixed.url))
    assert (reader.url, reader.dimensions, reader.dtype) == (mixed.url, 3, np.dtype("float32"))
    assert reader.embedder == mixed.dataset.info.embedder
    assert "4 shards of null/3, 3 x float32" in repr(reader)


def test_documents_come_with_their_vectors(mixed: Made) -> None:
    for block in open_dataset(mixed.url).blocks(("text", "metadata", "version")):
        assert block.documents.column_names == ["id", "text", "metadata", "version"]
        assert block.documents["id"].to_pylist() == block.ids
        for id_, text, version, vector in zip(
            block.ids, block.documents["text"], block.documents["version"], block.vectors, strict=True
        ):
            assert text.as_py() == f"{id_} v{version}"
            assert vector[1] == version.as_py()


def test_an_unknown_column_is_refused(mixed: Made) -> None:
    with pytest.raises(ConfigurationError, match="no column 'body': they have id, text, metadata"):
        open_dataset(mixed.url).blocks(["body"])


def test_a_snapshot_stays_until_it_is_refreshed(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    mixed.add([Row("a", 2), Row("g")])
    assert not {"g"} & set(reader.ids)
    assert content(reader) == expected(mixed, [0, 1, 2, 3])
    mixed.commit(4)
    assert reader.refresh()
    assert content(reader) == expected(mixed, [0, 1, 2, 3, 4, 5])
    assert len(reader) == len(expected(mixed, [0, 1, 2, 3, 4, 5]))
    assert not reader.refresh()


def test_replacements_count_from_the_switch_on(made: Made) -> None:
    made.add("ab")
    made.add([Row("c"), Row("a", 2)])
    replacement = made.replace([0, 1], [(0, 1), (1, 0), (1, 1)], retire=False)
    reader = open_dataset(made.url)
    assert content(reader) == expected(made, [0, 1])
    made.retire([0, 1], [replacement])
    assert content(reader) == expected(made, [0, 1])
    assert reader.refresh()
    assert reader.shards == (2,)
    assert list(reader.ids) == ["b", "c", "a"]
    assert content(reader) == expected(made, [2])


def test_a_deletion_that_was_compacted_away_overrules_nothing_any_more(made: Made) -> None:
    made.add("ab")
    made.add([Row("a", 3, DELETED)])
    reader = open_dataset(made.url)
    assert list(reader.ids) == ["b"]
    made.replace([0, 1], [(0, 1)])
    made.add("a")
    assert reader.refresh()
    assert list(reader.ids) == ["b", "a"]


def test_a_retired_shard_whose_objects_are_gone_asks_for_a_refresh(made: Made) -> None:
    made.add("ab")
    made.add("cd")
    reader = open_dataset(made.url)
    made.replace([0], [(0, 0), (0, 1)])
    made.erase(0)
    for read in (lambda: list(reader.blocks()), lambda: reader[0], lambda: list(reader.ids)):
        with pytest.raises(SnapshotOutdated, match=r"shard 0 .* refresh\(\)"):
            read()
    assert reader.refresh()
    assert list(reader.ids) == ["c", "d", "a", "b"]


def test_a_switch_while_the_dataset_is_looked_at_shows_either_side_of_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.add("ab")
    made.add("cd")
    names = type(made.dataset.store).names
    switched = []

    def switch_after_the_markers(store: object, folder: str) -> list[str]:
        found = names(store, folder)  # type: ignore[arg-type]
        if folder == layout.COMMITS_FOLDER and not switched:
            switched.append(made.replace([0, 1], [(0, 0), (0, 1), (1, 0), (1, 1)]))
        return found

    monkeypatch.setattr(type(made.dataset.store), "names", switch_after_the_markers)
    assert list(open_dataset(made.url).ids) == ["a", "b", "c", "d"]
    assert switched


@st.composite
def histories(draw: st.DrawFn) -> list[list[Row]]:
    """Shards in which every (id, version) stands once, but for failures, which may be tried again."""
    pairs = draw(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), unique=True, min_size=1, max_size=10))
    rows = []
    for id_, version in pairs:
        status = draw(st.sampled_from([EMBEDDED, EMBEDDED, DELETED, FAILED, CANCELLED]))
        rows.append(Row(id_, version, status))
        if status == FAILED and draw(st.booleans()):
            rows.append(Row(id_, version, draw(st.sampled_from([EMBEDDED, FAILED]))))
    rows = draw(st.permutations(rows))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    shards = [list(rows[start:end]) for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return [part for shard in shards for part in (shard[:8], shard[8:]) if part]


def loaded(log: list[list[Row]], live: list[int]) -> dict[str, int]:
    """What the loader would put into a target."""
    target: dict[str, int] = {}
    places = [(row.id, (row.version, shard, place)) for shard in live for place, row in enumerate(log[shard])]
    for shard in live:
        rows = log[shard]
        plan = plan_shard(
            shard,
            ids=[row.id for row in rows],
            versions=[row.version for row in rows],
            statuses=np.array([row.status for row in rows], dtype=np.uint8),
            known={id_: [place for other, place in places if other == id_] for id_, _ in places},
            status_of=lambda other, row: log[other][row].status,
        )
        target |= {rows[row].id: rows[row].version for row in plan.upsert}
        for id_ in plan.delete:
            target.pop(id_, None)
    return target


@settings(max_examples=40, deadline=None)
@given(log=histories(), data=st.data())
def test_what_is_read_is_what_the_rule_and_the_loader_say(
    tmp_path_factory: pytest.TempPathFactory, log: list[list[Row]], data: st.DataObject
) -> None:
    made = made_dataset(tmp_path_factory.mktemp("reader") / "d")
    committed = data.draw(st.lists(st.integers(0, len(log) - 1), unique=True), label="committed first")
    for shard, rows in enumerate(log):
        made.add(rows, commit=shard in committed)
    reader = open_dataset(made.url)
    assert content(reader) == expected(made, committed)
    for shard in data.draw(st.permutations(range(len(log))), label="order"):
        if shard not in committed:
            made.commit(shard)
            committed.append(shard)
            assert reader.refresh()
            assert content(reader) == expected(made, committed)
    leaving = data.draw(st.lists(st.integers(0, len(log) - 1), unique=True), label="replaced")
    counting = [(shard, place) for shard, place, _ in newest_rows(made.log, committed) if shard in leaving][:8]
    # Compaction keeps a deletion whose older versions stay elsewhere.
    kept = [
        (shard, place)
        for shard in leaving
        for place, row in enumerate(log[shard])
        if row.status == DELETED and (shard, place) not in counting
    ]
    live = committed
    if leaving and 0 < len(counting) + len(kept) <= 8:
        replacement = made.replace(leaving, [*counting, *kept])
        live = [shard for shard in [*committed, replacement] if shard not in leaving]
        assert reader.refresh()
    everything = expected(made, live)
    assert content(reader) == everything
    assert content(open_dataset(made.url)) == everything
    assert len(reader) == len(everything)
    versions = {row.id: row.version for _, _, row in newest_rows(made.log, live)}
    assert versions == loaded(made.log, live)
    assert [row["address"] for row in reader] == sorted(address for address, _ in everything.values())


def test_blocks_read_ahead_are_the_same(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    ahead = list(reader.blocks(("text",), prefetch=True))
    plain = list(reader.blocks(("text",)))
    assert [block.shard for block in ahead] == [block.shard for block in plain] == [0, 1, 3]
    for one, other in zip(ahead, plain, strict=True):
        assert one.ids == other.ids
        assert one.documents.equals(other.documents)
        np.testing.assert_array_equal(one.vectors, other.vectors)
    stopped = reader.blocks(prefetch=True)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_batches_hold_every_row_once(mixed: Made, size: int, shuffle: int | None) -> None:
    reader = open_dataset(mixed.url)
    found = list(reader.batches(size, ("text",), shuffle=shuffle))
    assert [len(batch) for batch in found] == [size] * (5 // size) + [5 % size] * (5 % size > 0)
    together = {}
    for batch in found:
        assert batch.vectors.flags.c_contiguous
        assert batch.vectors.flags.writeable
        assert batch.documents["id"].to_pylist() == batch.ids
        for id_, address, vector in zip(batch.ids, batch.addresses, batch.vectors, strict=True):
            together[id_] = (int(address), vector.tolist())
    assert together == expected(mixed, [0, 1, 2, 3])
    if shuffle is None:
        assert [id_ for batch in found for id_ in batch.ids] == list(reader.ids)


def test_a_seed_decides_the_order_and_parts_share_the_rows(made: Made) -> None:
    for shard in range(6):
        made.add([Row(f"{shard}-{row}") for row in range(8)])
    reader = open_dataset(made.url)

    def order(seed: int | None, part: tuple[int, int] = (0, 1)) -> list[str]:
        return [id_ for batch in reader.batches(5, shuffle=seed, part=part, prefetch=True) for id_ in batch.ids]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(None) == list(reader.ids)
    assert sorted(order(1)) == sorted(order(None))
    parts = [order(1, (number, 4)) for number in range(4)]
    assert sorted(id_ for part in parts for id_ in part) == sorted(order(None))
    assert sum(map(len, parts)) == 48


@pytest.mark.parametrize(("size", "part"), [(0, (0, 1)), (3, (2, 2)), (3, (-1, 2)), (3, (0, 0))])
def test_batches_of_nothing_and_parts_that_are_none_are_refused(made: Made, size: int, part: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least one row"):
        open_dataset(made.url).batches(size, part=part)


def test_rows_are_had_by_number_as_torch_asks_for_them(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    rows = list(reader)
    assert [row["address"] for row in rows] == [0, 3, 8, 12, 24]
    for place, row in enumerate(rows):
        for number in (place, np.int64(place), place - 5):
            assert reader[number]["address"] == row["address"]
            np.testing.assert_array_equal(reader[number]["vector"], row["vector"])
    several = reader.__getitems__([4, 0, 4, 2])
    assert [row["address"] for row in several] == [24, 0, 24, 8]
    for number in (5, -6):
        with pytest.raises(IndexError, match="has 5 rows"):
            reader[number]


def test_a_reader_can_be_pickled_and_shows_the_same_rows(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    before = content(reader)
    mixed.commit(4)
    copied = pickle.loads(pickle.dumps(reader))
    assert content(copied) == before
    assert len(copied) == len(reader)
    assert copied.refresh()
    assert len(copied) == len(reader) + 4


def test_an_empty_dataset_is_read_as_nothing(made: Made) -> None:
    reader = open_dataset(made.url)
    assert len(reader) == 0
    assert list(reader.ids) == list(reader.blocks()) == list(reader.batches(3)) == list(reader) == []
    assert reader.vectors.shape == (0, 3)
    with pytest.raises(IndexError):
        reader[0]


def test_the_array_shows_all_committed_rows_although_nobody_has_published_its_shape(mixed: Made) -> None:
    reader = open_dataset(mixed.url)
    assert json.loads((Path(mixed.url) / layout.ZARR_ARRAY_KEY).read_bytes())["shape"] == [0, 3]
    array = reader.vectors
    assert array.shape == (25, 3)
    assert array.read_only
    np.testing.assert_array_equal(array[0], Row("a").vector)
    np.testing.assert_array_equal(array[[24, 8]], [Row("f").vector, Row("b", 2).vector])
    copied = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(copied[24], Row("f").vector)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_versions_are_read_where_the_documents_have_no_statistics(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    write = pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda *args, **kwargs: write(*args, **kwargs, write_statistics=False))
    made.add("ab")
    made.add([Row("a", 2)])
    assert made.dataset.admission(0).max_version is None
    assert list(open_dataset(made.url).ids) == ["b", "a"]


def test_only_ids_with_several_versions_are_remembered(made: Made) -> None:
    made.add("abcdefgh")
    made.add([Row("a", 2), Row("b", 3, FAILED), Row("i")])
    snapshot = open_dataset(made.url)._snapshot
    assert snapshot.newest == {"a": 2}
    assert snapshot.first_versions == {0}


def test_half_precision_is_kept(tmp_path: Path) -> None:
    made = made_dataset(tmp_path / "d", dtype="float16")
    made.add("ab")
    reader = open_dataset(made.url)
    (block,) = reader.blocks()
    assert reader.dtype == block.vectors.dtype == np.float16
    np.testing.assert_array_equal(block.vectors, [row.vector.astype(np.float16) for row in rows_of("ab")])


@pytest.mark.server
def test_a_dataset_in_a_bucket_is_read_as_one_in_a_folder(s3_folder: str) -> None:
    made = made_dataset(f"{s3_folder}/d")
    made.add("abc")
    made.add([Row("b", 2), Row("c", 2, DELETED)])
    reader = pickle.loads(pickle.dumps(open_dataset(made.url)))
    assert content(reader) == expected(made, [0, 1])
    assert reader[1]["address"] == 8
    np.testing.assert_array_equal(reader.vectors[[0, 8]], reader.to_numpy())
    made.replace([0, 1], [(0, 0), (1, 0)])
    assert [block.shard for block in reader.follow(until=lambda: True, from_start=False)] == []
    assert reader.refresh()
    assert content(reader) == expected(made, [2])


def test_a_row_whose_text_was_carried_is_a_row_of_its_own(made: Made) -> None:
    made.add("a")
    made.add([Row("a", 2)], origin=ShardOrigin(1, "main", carried={0: (0, 0)}))
    assert content(open_dataset(made.url)) == expected(made, [0, 1])


def test_the_reader_is_had_from_the_package() -> None:
    assert embedmill.open_dataset is open_dataset
    assert "open_dataset" in embedmill.__all__


@pytest.mark.parametrize("prefetch", [False, True])
def test_memory_stays_under_two_shards(tmp_path: Path, prefetch: bool) -> None:
    made = made_dataset(tmp_path / "d", shard_rows=256, chunk_rows=64, dimensions=512)
    for shard in range(12):
        made.add([Row(f"{shard}-{row}") for row in range(256)])
    shard_bytes = 256 * 512 * 4
    reader = open_dataset(made.url)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for block in reader.blocks(prefetch=prefetch):
            assert len(block) == 256
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 2.5 * shard_bytes
