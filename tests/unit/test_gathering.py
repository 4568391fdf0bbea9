"""Late chunking: a document's passages are admitted together, into one shard, and anew as soon as one of them changes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex, Known
from embedmill.documents import Cursor
from tests.datasets import document
from tests.late_documents import (
    admitter_on,
    carried,
    check_contexts,
    close_indexes,
    late_dataset,
    push,
    shards,
    split,
)


@pytest.fixture
def dataset(late: Dataset) -> Dataset:
    return late


def test_a_document_never_crosses_a_shard(dataset: Dataset) -> None:
    records = [*split("a", "1", "2", "3", record=1), *split("b", *"45678", record=2), document("c", "9", record=3)]
    push(dataset, "k", *records)
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [
        ["a#0", "a#1", "a#2"],
        ["b#0", "b#1", "b#2", "b#3", "b#4", "c"],
    ]


def test_a_document_of_more_passages_than_a_shard_has_rows_is_refused_whole(dataset: Dataset) -> None:
    admitter, rejects = push(dataset, "k", *split("a", *"123456", record=1), *split("b", "x", "y", record=2))
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["b#0", "b#1"]]
    assert len(rejects) == admitter.counts.rejected == 6
    assert "longer passages" in rejects[0].reason


def test_one_changed_passage_makes_the_whole_document_new(dataset: Dataset) -> None:
    push(dataset, "k", *split("a", "1", "2", "3", record=1), *split("b", "4", "5", record=2))
    admitter, _ = push(dataset, "k2", *split("a", "1", "new", "3", record=1), *split("b", "4", "5", record=2))
    assert (admitter.counts.updated, admitter.counts.unchanged) == (3, 2)
    assert shards(dataset)[1] == [("a#0", 2, False), ("a#1", 2, False), ("a#2", 2, False)]
    assert carried(dataset) == [{}, {}]


def test_a_passage_that_is_gone_or_added_makes_the_others_new(dataset: Dataset) -> None:
    push(dataset, "k", *split("a", "1", "2", "3", record=1))
    push(dataset, "k2", *split("a", "1", "2", record=1))
    push(dataset, "k3", *split("a", "1", "2", "4", record=1))
    assert shards(dataset)[1] == [("a#2", 2, True), ("a#0", 2, False), ("a#1", 2, False)]
    assert shards(dataset)[2] == [("a#0", 3, False), ("a#1", 3, False), ("a#2", 3, False)]
    assert carried(dataset) == [{}, {}, {}]


def test_a_document_that_stays_as_it_is_is_passed_over(dataset: Dataset) -> None:
    push(dataset, "k", *split("a", "1", "2", record=1))
    admitter, _ = push(dataset, "k2", *split("a", "1", "2", record=1))
    assert (admitter.counts.unchanged, admitter.counts.admitted, len(shards(dataset))) == (2, 0, 1)


def test_vectors_are_carried_over_for_the_whole_document_when_only_metadata_changed(dataset: Dataset) -> None:
    push(dataset, "k", document("x", "0", record=1), *split("a", "1", "2", record=2))
    push(dataset, "k2", *split("a", "1", "2", record=1, metadata='{"a":1}'))
    assert carried(dataset)[1] == {0: (0, 1), 1: (0, 2)}


def test_a_text_that_became_a_document_of_its_own_is_embedded_alone(dataset: Dataset) -> None:
    push(dataset, "k", *split("a", "1", "2", record=1))
    push(dataset, "k2", document("a#0", "", record=1, deleted=True))
    push(dataset, "k3", *split("a", "1", "2", record=1))
    assert shards(dataset)[2] == [("a#0", 3, False), ("a#1", 2, False)]
    assert carried(dataset)[2] == {}


def test_removed_passages_spill_over_and_the_last_of_them_shares_the_shard_of_the_document(dataset: Dataset) -> None:
    push(dataset, "k", *split("a", *"12345", record=1))
    push(dataset, "k2", *split("x", *"6789", record=1), *split("a", "1", "2", record=2))
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)[1:]] == [
        ["x#0", "x#1", "x#2", "x#3", "a#2", "a#3"],
        ["a#4", "a#0", "a#1"],
    ]


@pytest.mark.parametrize("before", ["6789", "678", "67"])
def test_who_reads_again_after_a_crash_between_the_removed_and_the_document_embeds_it_anew(
    dataset: Dataset, before: str
) -> None:
    push(dataset, "k", *split("a", *"12345", record=1))
    admitter = admitter_on(dataset)
    admitter.admit("k2", "k2", [*split("x", *before, record=1), *split("a", "1", "2", record=2)])
    # The shard of the document itself was never written.
    key, cursor = admitter_on(dataset).reading("k2")
    assert cursor == Cursor(record=1)
    push(dataset, key, *split("a", "1", "2", record=2))
    assert shards(dataset)[-1] == [("a#4", 2, True), ("a#0", 2, False), ("a#1", 2, False)]


def test_a_lost_race_keeps_the_document_together(dataset: Dataset) -> None:
    admitter = admitter_on(dataset)
    admitter.admit("k", "k", [document("x", "0", record=1), *split("a", "1", "2", "3", record=2)])
    push(dataset, "other", *split("a", "1", "changed", record=1))
    admitter.close_shard()
    assert shards(dataset)[1] == [("x", 1, False), ("a#0", 2, False), ("a#1", 2, False), ("a#2", 1, False)]
    assert admitter.counts.admitted == 4


def test_a_race_that_is_lost_while_room_is_made_takes_the_document_once(dataset: Dataset) -> None:
    admitter = admitter_on(dataset)
    admitter.admit("k", "k", [*split("x", *"123", record=1), *split("a", *"45", record=2)[:1]])
    push(dataset, "other", *split("y", *"12345", record=1), *split("a", "4", "5", record=2))
    admitter.admit("k", "k", [*split("a", *"4567", record=2)[1:]])
    admitter.close_shard()
    rows = [row for shard in shards(dataset) for row in shard]
    assert [row for row in rows if row[0].startswith("a")][-4:] == [
        ("a#0", 2, False), ("a#1", 2, False), ("a#2", 1, False), ("a#3", 1, False),
    ]  # fmt: skip
    assert [id_ for id_, _, _ in rows].count("x#0") == 1
    assert shards(dataset)[-1][0][0] == "a#0"


def test_a_document_that_comes_in_many_blocks_is_looked_up_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    newest = DatasetIndex.newest

    def counted(index: DatasetIndex, ids: Sequence[str]) -> dict[str, Known]:
        asked.extend(ids)
        return newest(index, ids)

    monkeypatch.setattr(DatasetIndex, "newest", counted)
    texts = [str(number) for number in range(200)]
    _, rejects = push(dataset, "k", *split("a", *texts, record=1), *split("b", "x", "y", record=2))
    assert len(rejects) == 200
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["b#0", "b#1"]]
    assert len(asked) < 3 * 200


def test_a_passage_that_another_document_has_is_seen_also_where_it_came_in_an_earlier_block(dataset: Dataset) -> None:
    push(dataset, "k", document("a#0", "alone", record=1))
    _, rejects = push(dataset, "k2", *split("a", "1", "2", record=1))
    assert {reject.reason for reject in rejects} == {"the id of its passage 'a#0' is another document's"}


def test_a_passage_that_stands_twice_in_a_source_is_seen_also_where_it_was_found_unchanged_before(
    dataset: Dataset,
) -> None:
    push(dataset, "k", *split("a", "1", "2", record=1))
    _, rejects = push(dataset, "k2", *split("a", "1", "2", record=1), *split("a", "3", "4", record=2))
    assert {reject.reason for reject in rejects} == {"this id stands twice in this source; the first one is kept"}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_pushed_lost_and_read_again_every_passage_knows_its_whole_document(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = late_dataset(Path(folder) / "d")
        current: dict[str, tuple[str, ...]] = {}
        for number in range(data.draw(st.integers(1, 5))):
            names = data.draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1))
            said = {name: tuple(data.draw(st.lists(st.sampled_from("xy"), min_size=1, max_size=5))) for name in names}
            metadata = data.draw(st.sampled_from(["{}", '{"m":1}']))
            records = [
                passage
                for record, (name, texts) in enumerate(said.items(), start=1)
                for passage in split(name, *texts, record=record, metadata=metadata)
            ]
            if data.draw(st.booleans()):
                # A first attempt that ends anywhere: what was not in a shard by then is read again.
                lost = admitter_on(dataset)
                lost.admit(f"k{number}", "k", records[: data.draw(st.integers(0, len(records)))])
                _, cursor = admitter_on(dataset).reading(f"k{number}")
                records = [record for record in records if cursor is None or record.cursor > cursor]
            admitter = admitter_on(dataset)
            while records:
                size = data.draw(st.integers(1, len(records)))
                assert admitter.admit(f"k{number}", "k", records[:size]).rejects == []
                records = records[size:]
            admitter.close_shard()
            current |= said
            check_contexts(dataset, current)
        close_indexes()
