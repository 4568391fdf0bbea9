"""Small shards become full ones, rows that nothing reads go, and whoever looks sees the same documents throughout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from embedmill.dataset import layout
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.dead_letters import drop_letters, failed_rows
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import CANCELLED, Marker
from embedmill.dataset.passages import ShardOrigin, SourcePosition
from embedmill.dataset.purging import Purge
from embedmill.dataset.rewriting import Rewriting, read_shard, rows_that_count
from embedmill.dataset.spending import SpendLogs
from embedmill.dataset.summary import summarize
from embedmill.dataset.verification import verify_dataset
from embedmill.documents import Cursor
from scheduler.log_view import LogView
from tests.datasets import passage, small_dataset
from tests.invariants import check_dataset, newest
from tests.shard_log import ShardLog


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d")


def test_small_shards_become_full_ones_and_nothing_else_changes(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    for number in range(6):
        log.shard((f"a{number}", f"text {number}"), (f"b{number}", f"more {number}"))
    before, summary = newest(dataset.url), summarize(dataset)
    report = compact(dataset)
    assert (report.retired, report.written, report.rows, report.dropped) == (6, 2, 12, 0)
    assert newest(dataset.url) == before
    assert [dataset.marker(shard).rows for shard in dataset.committed()] == [8, 4]
    after = summarize(dataset)
    assert (after.admitted, after.embedded, after.billed_tokens) == (summary.admitted, summary.embedded, 42)
    assert after.committed_shards == 2
    check_dataset(dataset.url, source=log.source)
    assert verify_dataset(dataset).passed
    assert compact(dataset).retired == 0


def test_removed_versions_go_and_the_accounts_still_add_up(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"), ("c", "one"))
    log.shard(("a", "two"), ("b", None))
    log.shard(("a", "three"), ("d", "one"))
    before = newest(dataset.url)
    report = compact(dataset)
    # a: two old versions; b and its deletion, since it stands nowhere else and no collection was loaded.
    assert (report.rows, report.dropped) == (3, 4)
    assert newest(dataset.url) == before
    summary = summarize(dataset)
    assert (summary.admitted, summary.embedded, summary.deleted, summary.removed) == (7, 3, 0, 4)
    check_dataset(dataset.url)
    assert verify_dataset(dataset).passed


def test_a_deletion_stays_while_an_older_version_may_still_come(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    number = log.shard(("a", "one"), commit=False)
    log.shard(("a", None), ("b", "one"))
    log.shard(("c", "one"))
    compact(dataset)
    assert newest(dataset.url).keys() == {"b", "c"}
    log.commit_admitted(number)
    assert newest(dataset.url).keys() == {"b", "c"}
    check_dataset(dataset.url)


@pytest.mark.parametrize(("names", "stays"), [
    (["00000000.json", "00000001.json"], False),
    (["00000000.json"], True),
    (["00000000.json", "00000001.json", "00000001.intent.json"], True),
])  # fmt: skip
def test_a_deletion_stays_until_every_collection_has_it(dataset: Dataset, names: list[str], stays: bool) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"))
    log.shard(("a", None), ("c", "one"))
    for name in names:
        dataset.store.create(f"loads/one/{name}", b"{}")
    compact(dataset)
    assert summarize(dataset).deleted == int(stays)
    check_dataset(dataset.url)


def test_failures_move_with_their_causes_and_what_somebody_dropped_stays_dropped(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "!bad"), ("b", "!worse"))
    log.shard(("c", "!old"), ("d", "good"))
    log.shard(("c", "new"))
    drop_letters(dataset, [letter for letter in failed_rows(dataset) if letter.failure.id == "a"])
    compact(dataset)
    assert {(letter.failure.id, letter.state) for letter in failed_rows(dataset)} == {("a", "dropped"), ("b", "open")}
    for letter in failed_rows(dataset):
        table, _ = dataset.documents(letter.shard)
        assert table["id"][letter.failure.row].as_py() == letter.failure.id
    assert summarize(dataset).open_failures == 1
    check_dataset(dataset.url)
    log.shard(("e", "one"))
    compact(dataset)
    assert {(letter.failure.id, letter.state) for letter in failed_rows(dataset)} == {("a", "dropped"), ("b", "open")}
    check_dataset(dataset.url)


def test_what_is_tried_again_is_counted_once_wherever_it_stands(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    bad = log.shard(("a", "!bad"), ("b", "good"))
    log.shard(("a", "!bad"), retries={0: (bad, 0)})
    assert summarize(dataset).admitted == 2
    compact(dataset)
    summary = summarize(dataset)
    assert (summary.admitted, summary.embedded, summary.failed) == (2, 2, 0)
    check_dataset(dataset.url)


def test_a_retry_that_was_admitted_in_the_middle_of_a_compaction_finds_its_failure(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    bad = log.shard(("a", "!bad"), ("b", "good"))
    index = dataset.open_index()
    rewriting = Rewriting(dataset, index, [bad], job="main", reason="compaction")
    rewriting.add(read_shard(dataset, bad), np.ones(2, bool), retried=())
    log.shard(("a", "!bad"), retries={0: (bad, 0)})
    assert rewriting.switch() is not None
    dataset.publish_shape()
    assert failed_rows(dataset) == []
    assert index.versions(["a"]) == {"a": [(1, 1, 0)]}
    index.close()
    summary = summarize(dataset)
    assert (summary.admitted, summary.embedded, summary.failed) == (2, 2, 0)
    check_dataset(dataset.url)


def test_shards_of_cancelled_rows_of_other_jobs_and_damaged_ones_stay(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    log.shard(("b", "one"))
    damaged = log.shard(("c", "one"))
    given_up = log.shard(("d", "one"), commit=False)
    key = layout.documents_key(given_up)
    dataset.commit(
        Marker(given_up, np.array([CANCELLED], np.uint8), dataset.info.embedder.fingerprint, "a", "w", now_iso(),
               objects={key: dataset.describe_object(key)})
    )  # fmt: skip
    other = ShardLog(dataset, job="other")
    alone = other.shard(("e", "one"))
    path = Path(dataset.url) / layout.vectors_key(damaged)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    report = compact(dataset)
    assert [problem.shard for problem in report.problems] == [damaged]
    assert str(path) in report.problems[0].text
    assert (report.retired, report.rows) == (2, 2)
    assert set(dataset.committed()) >= {damaged, given_up, alone}


def test_the_index_knows_the_new_places_and_is_the_same_when_it_is_built_anew(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    for number in range(5):
        log.shard(("a", f"text {number}"), (f"b{number}", "one"))
    log.shard(("b0", None))
    index = dataset.open_index()
    compact(dataset, grace_s=0)
    dataset.catch_up(index)
    ids = ["a", *(f"b{number}" for number in range(5))]
    known = index.versions(ids)
    table, _ = dataset.documents(dataset.committed()[0])
    assert {id_: [places[0][2]] for id_, places in known.items()} == {
        id_: [row] for row, id_ in enumerate(table["id"].to_pylist())
    }
    assert {shard for places in known.values() for _, shard, _ in places} == set(dataset.committed())
    rows = index.rows
    index.clear()
    dataset.catch_up(index)
    assert index.versions(ids) == known
    assert index.rows == rows == 5
    index.close()


def test_what_was_retired_is_deleted_after_its_grace_and_the_log_stays_dense(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    for number in range(4):
        log.shard((f"a{number}", "one"))
    assert compact(dataset).deleted == 0
    assert all(dataset.store.exists(layout.vectors_key(shard)) for shard in range(4))
    assert compact(dataset, grace_s=0).deleted == 4
    assert not any(dataset.store.exists(layout.vectors_key(shard)) for shard in range(4))
    assert [dataset.origin(shard).erased for shard in range(5)] == [True] * 4 + [False]
    assert dataset.owed() == []
    check_dataset(dataset.url, source=log.source)
    assert verify_dataset(dataset).passed
    assert compact(dataset, grace_s=0).deleted == 0


def test_replacements_that_nobody_finished_never_count_and_are_given_up(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    first = log.shard(("a", "one"))
    second = log.shard(("b", "one"))
    before = newest(dataset.url)
    index = dataset.open_index()
    rewriting = Rewriting(dataset, index, [first, second], job="main", reason="compaction")
    for shard in (first, second):
        rewriting.add(read_shard(dataset, shard), np.ones(1, bool), retried=())
    rewriting._write()
    index.close()
    # And one that has not even a marker.
    dataset.append_passages(3, [passage("a", "one")], origin=ShardOrigin(3, "main", replaces=(first,)))
    assert newest(dataset.url) == before
    assert dataset.owed() == []
    assert summarize(dataset).admitted == 2
    check_dataset(dataset.url, at_rest=False)
    compact(dataset)
    assert newest(dataset.url) == before
    assert [dataset.origin(shard).erased for shard in (2, 3)] == [True, True]
    check_dataset(dataset.url, source=log.source)
    assert verify_dataset(dataset).passed


def test_of_two_that_rewrite_the_same_shards_one_gives_up(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    first, second = log.shard(("a", "one")), log.shard(("b", "one"))
    index = dataset.open_index()
    rewritings = [Rewriting(dataset, index, [first, second], job="main", reason="compaction") for _ in range(2)]
    for rewriting in rewritings:
        for shard in (first, second):
            rewriting.add(read_shard(dataset, shard), np.ones(1, bool), retried=())
    assert [rewriting.switch() is not None for rewriting in rewritings] == [True, False]
    index.close()
    check_dataset(dataset.url, source=log.source, at_rest=False)


@pytest.mark.parametrize("seed", range(8))
def test_random_histories_read_the_same_after_any_number_of_compactions(dataset: Dataset, seed: int) -> None:
    chance = random.Random(seed)
    log = ShardLog(dataset)
    held: list[int] = []
    for _ in range(25):
        ids = chance.sample("abcdefgh", chance.randint(1, 4))
        texts = [chance.choice([None, "!bad", f"text {chance.random()}", f"text {chance.random()}"]) for _ in ids]
        number = log.shard(*zip(ids, texts, strict=True), commit=False)
        held.append(number)
        while held and chance.random() < 0.6:
            log.commit_admitted(held.pop(chance.randrange(len(held))))
        if chance.random() < 0.3:
            before = newest(dataset.url)
            compact(dataset, grace_s=chance.choice([0, 3600]))
            assert newest(dataset.url) == before
            check_dataset(dataset.url, at_rest=False)
    for late in held:
        log.commit_admitted(late)
    before = newest(dataset.url)
    compact(dataset, grace_s=0)
    assert newest(dataset.url) == before
    summary = summarize(dataset)
    assert summary.admitted == sum(log.versions.values())
    check_dataset(dataset.url)
    assert verify_dataset(dataset).passed


def test_vectors_of_another_shard_are_not_taken_for_those_that_were_committed(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "two"))
    log.shard(("c", "three"), ("d", "four"))
    paths = [Path(dataset.url) / layout.vectors_key(shard) for shard in range(2)]
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    problems = verify_dataset(dataset).problems
    assert [problem.shard for problem in problems] == [0, 1]
    assert all("is not what was committed" in problem.text for problem in problems)
    assert compact(dataset).retired == 0


def test_a_damaged_replacement_that_is_put_aside_is_owed_like_any_other_shard(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"))
    log.shard(("c", "one"))
    before = newest(dataset.url)
    compact(dataset, grace_s=0)
    [replacement] = dataset.committed()
    dataset.put_aside(replacement)
    assert dataset.owed() == [replacement]
    assert summarize(dataset).admitted == 3
    log.commit_admitted(replacement)
    assert newest(dataset.url) == before
    check_dataset(dataset.url)


def test_what_was_billed_counts_once_against_a_cap_also_after_a_compaction(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    for number in range(3):
        log.shard((f"a{number}", "one"))
        line = {"at": now_iso(), "key": "k", "job": "main", "shard": number, "passages": 1, "tokens": 7, "requests": 1}
        dataset.store.append("spend/w.log", json.dumps(line).encode() + b"\n")
    assert SpendLogs(dataset).charged("main", with_markers=True) == 21
    compact(dataset, grace_s=0)
    log.shard(("b", "one"))
    compact(dataset, grace_s=0)
    # Of the last shard no log knows.
    assert SpendLogs(dataset).charged("main", with_markers=True) == 28


def test_a_compactor_whose_index_is_behind_keeps_the_newest_version(dataset: Dataset) -> None:
    """Another machine switches between its look at the index and its look at what counts."""
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"))
    log.shard(("c", "one"))
    log.shard(("a", "two"))
    log.shard(("d", "one"))
    mine = DatasetIndex(Path(dataset.url) / "mine" / "index.sqlite", dataset_id=dataset.info.id)
    dataset.catch_up(mine)
    other = dataset.open_index()
    theirs = Rewriting(dataset, other, [2, 3], job="main", reason="compaction")
    for shard in (2, 3):
        theirs.add(read_shard(dataset, shard), np.ones(1, bool), retried=())
    assert theirs.switch() is not None
    other.close()
    rewriting = Rewriting(dataset, mine, [0, 1, 4], job="main", reason="compaction")
    for shard in (0, 1, 4):
        content = read_shard(dataset, shard)
        keep = rows_that_count(
            dataset, mine, content,
            committed=dataset.committed(), retried=(), drops_deleted=True, leaving={0, 1, 4},
        )  # fmt: skip
        rewriting.add(content, keep, retried=())
    assert rewriting.switch() is not None
    mine.close()
    assert newest(dataset.url)["a"][:2] == (2, "two")


def test_a_group_of_hollow_shards_is_not_held_whole(dataset: Dataset) -> None:
    log = ShardLog(dataset)
    for number in range(12):
        log.shard(*((f"a{row}", f"text {number}") for row in range(7)), (f"b{number}", "one"))
    index = dataset.open_index()
    rewriting = Rewriting(dataset, index, list(range(11)), job="main", reason="compaction")
    for shard in range(7):
        rewriting.add(read_shard(dataset, shard), np.array([False] * 7 + [True]), retried=())
    assert sum(len(piece.vectors) for piece in rewriting._open) == 7
    assert all(piece.vectors.base is None for piece in rewriting._open)
    index.close()


def test_a_source_that_was_given_up_stays_so_when_its_cancelled_rows_are_written_anew(dataset: Dataset) -> None:
    key = "a" * 32
    origin = ShardOrigin(0, "main", (SourcePosition(key, "source", Cursor(record=2), 0),))
    dataset.append_passages(0, [passage("a", "one"), passage("b", "two")], origin=origin)
    documents = layout.documents_key(0)
    dataset.commit(
        Marker(0, np.array([CANCELLED] * 2, np.uint8), dataset.info.embedder.fingerprint, "a", "w", now_iso(),
               objects={documents: dataset.describe_object(documents)})
    )  # fmt: skip
    assert Purge(dataset, ["a"]).run().is_gone
    index = dataset.open_index()
    assert LogView(dataset, index).has_given_up(key)
    index.close()
