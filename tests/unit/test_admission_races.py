"""Another admitter writes first: what was decided on rows that lost the race is decided anew, behind the winner's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex
from embedmill.documents import Reject, SourceDocument
from scheduler.admission import Admitter
from scheduler.readings import AdmissionCounts, Batch
from tests.datasets import document, passage_of, small_dataset

_indexes: list[DatasetIndex] = []


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d", shard_rows=8)


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    yield
    while _indexes:
        _indexes.pop().close()


def admitter_on(dataset: Dataset, *, job: str = "main") -> Admitter:
    opened = Dataset.open(dataset.url)
    _indexes.append(opened.open_index())
    return Admitter(opened, _indexes[-1], job=job)


def write(dataset: Dataset, key: str, *records: SourceDocument) -> None:
    """Somebody else's push, from beginning to end."""
    admitter = admitter_on(dataset, job="other")
    admitter.admit(key, key, records)
    admitter.close_shard()


def alive(dataset: Dataset) -> dict[str, str]:
    """The text of the newest version of every id that is not deleted."""
    found: dict[str, tuple[int, str, bool]] = {}
    for shard in dataset.admitted():
        for row in dataset.documents(shard)[0].to_pylist():
            found[row["id"]] = max(found.get(row["id"], (0, "", False)), (row["version"], row["text"], row["deleted"]))
    return {id_: text for id_, (_, text, deleted) in found.items() if not deleted}


def split(name: str, text: str, passages: int) -> list[SourceDocument]:
    return [passage_of(name, n, f"{text}{n}", last=n == passages - 1) for n in range(passages)]


def close_all(admitter: Admitter) -> AdmissionCounts:
    admitter.close_batches()
    return admitter.counts


def test_what_equalled_an_open_row_is_news_again_when_that_row_lost(dataset: Dataset) -> None:
    late = admitter_on(dataset)
    first, again = Batch("k1", [document("x", "old", record=1)]), Batch("k3", [document("x", "old", record=1)])
    late.admit_batches([first])
    other = admitter_on(dataset)
    other.admit_batches([Batch("k1", first.records), Batch("k2", [document("x", "new", record=1)])])
    other.close_batches()
    late.admit_batches([again])
    late.close_batches()
    assert alive(dataset) == {"x": "old"}
    assert (first.counts.repeated, first.counts.new) == (1, 0)
    assert (again.counts.updated, again.counts.unchanged) == (1, 0)


def test_a_delete_of_a_row_that_lost_is_a_delete_of_what_won(dataset: Dataset) -> None:
    write(dataset, "before", document("x", "old", record=1))
    late = admitter_on(dataset)
    gone, again = (Batch(key, [document("x", "", record=1, deleted=True)]) for key in ("k1", "k3"))
    late.admit_batches([gone])
    write(dataset, "between", document("x", "back", record=1))
    late.admit_batches([again])
    late.close_batches()
    assert alive(dataset) == {}
    assert gone.counts.deleted + again.counts.deleted == 1


@pytest.mark.parametrize(("ours", "theirs"), [(2, 5), (5, 2)])
def test_a_split_document_is_never_a_mix_of_two_versions(dataset: Dataset, ours: int, theirs: int) -> None:
    late = admitter_on(dataset)
    late.admit("ours", "ours", split("D", "ours ", ours))
    write(dataset, "theirs", *split("D", "theirs ", theirs))
    late.close_shard()
    assert alive(dataset) == {f"D#{n}": f"ours {n}" for n in range(ours)}
    assert late.counts.removed == max(0, theirs - ours)


def test_a_delete_that_loses_takes_the_passages_of_the_winner_with_it(dataset: Dataset) -> None:
    write(dataset, "before", *split("D", "p", 1))
    late = admitter_on(dataset)
    late.admit_batches([Batch("k", [document("D", "", record=1, deleted=True)])])
    write(dataset, "theirs", *split("D", "new ", 3))
    late.close_batches()
    assert alive(dataset) == {}


def test_what_cannot_be_taken_any_more_is_a_reject(dataset: Dataset) -> None:
    pushed, inbox = admitter_on(dataset), admitter_on(dataset)
    rejects: list[tuple[str, Reject]] = []
    pushed.on_late_reject = lambda key, reject: rejects.append((key, reject))
    records = [document("G#0", "whole", record=1), document("y", "y", record=2)]
    batch = Batch("k", records)
    pushed.admit("push", "push", records)
    inbox.admit_batches([batch])
    write(dataset, "theirs", *split("G", "passage ", 1))
    pushed.close_shard()
    inbox.close_batches()
    assert alive(dataset) == {"G#0": "passage 0", "y": "y"}
    assert [(key, reject.id) for key, reject in rejects] == [("push", "G#0")]
    assert "document 'G'" in rejects[0][1].reason
    assert [reject.id for reject in batch.rejects] == ["G#0"]
    for counts in (pushed.counts, batch.counts):
        assert (counts.new + counts.unchanged, counts.rejected) == (1, 1)


def test_more_than_a_shard_may_be_left_to_write_after_a_lost_race(dataset: Dataset) -> None:
    late = admitter_on(dataset)
    records = [*split("D", "ours ", 2), *(document(f"x{n}", "x", record=10 + n) for n in range(5))]
    admitted = late.admit("ours", "ours", records)
    assert admitted.tasks == []
    write(dataset, "theirs", *split("D", "theirs ", 7))
    tasks = late.close_shard()
    assert [task.shard for task in tasks] == [1, 2]
    assert sum(task.rows for task in tasks) == 2 + 5 + 5
    assert alive(dataset) == {"D#0": "ours 0", "D#1": "ours 1"} | {f"x{n}": "x" for n in range(5)}
    origins = [dataset.origin(task.shard).sources for task in tasks]
    assert [sources[0].cursor.record for sources in origins] == sorted(s[0].cursor.record for s in origins)
    assert origins[-1][0].cursor.record == 14


def test_the_log_is_read_before_anything_is_called_unchanged(dataset: Dataset) -> None:
    write(dataset, "before", document("x", "old", record=1), document("y", "y", record=2))
    admitter = admitter_on(dataset)
    admitter.admit_batches([])
    write(dataset, "between", document("x", "new", record=1), document("z", "z", record=2))
    batch = Batch("k", [document("x", "old", record=1), document("z", "", record=2, deleted=True)])
    admitter.admit_batches([batch])
    admitter.close_batches()
    assert (batch.counts.updated, batch.counts.deleted, batch.counts.unchanged) == (1, 1, 0)
    assert alive(dataset) == {"x": "old", "y": "y"}


def test_batches_without_a_row_are_known_by_their_key_for_good(dataset: Dataset) -> None:
    def admit(key: str, text: str) -> Batch:
        admitter, batch = admitter_on(dataset), Batch(key, [document("x", text, record=1)])
        admitter.admit_batches([batch])
        admitter.close_batches()
        return batch

    assert admit("k0", "old").counts.new == 1
    assert admit("k1", "old").counts.unchanged == 1
    assert admit("k2", "new").counts.updated == 1
    assert admit("k1", "old").counts.repeated == 1
    index = _indexes[-1]
    index.clear()
    dataset.catch_up(index)
    assert index.batches(["k0", "k1", "k2", "k3"]) == {"k0": 1, "k1": 1, "k2": 1}
    assert admit("k1", "old").counts.repeated == 1
    assert alive(dataset) == {"x": "new"}


def test_a_line_of_rowless_batches_that_was_cut_short_costs_only_itself(dataset: Dataset) -> None:
    dataset.keep_rowless([("a", 1)])
    dataset.store.append("batches.jsonl", b'\n{"key": "torn')
    index = dataset.open_index()
    _indexes.append(index)
    assert index.batches(["a", "torn"]) == {"a": 1}
    dataset.keep_rowless([("b", 2), ("c", 3)])
    dataset.catch_up(index)
    assert index.batches(["a", "b", "c", "torn"]) == {"a": 1, "b": 2, "c": 3}


def test_a_passage_that_another_document_has_now_stays_when_its_former_one_changes(dataset: Dataset) -> None:
    def passage(id_: str, group: str, text: str, *, last: bool) -> SourceDocument:
        return document(id_, text, record=1, group=group, last=last)

    write(dataset, "1", passage("shared", "A", "of A", last=False), passage("A#1", "A", "a", last=True))
    write(dataset, "2", passage("A#1", "A", "a", last=True))
    write(dataset, "3", passage("shared", "B", "of B", last=False), passage("B#1", "B", "b", last=True))
    write(dataset, "4", passage("A#1", "A", "a new", last=True))
    assert alive(dataset) == {"A#1": "a new", "B#1": "b", "shared": "of B"}


def test_an_index_that_is_ahead_of_its_log_is_built_anew(dataset: Dataset) -> None:
    for number in range(3):
        write(dataset, f"{number}", document(f"x{number}", "text", record=1))
    for shard in (1, 2):
        dataset.store.delete(f"documents/{shard:08d}.parquet")
    write(dataset, "after", document("y", "text", record=1))
    assert dataset.admitted() == [0, 1]
    assert alive(dataset) == {"x0": "text", "y": "text"}


def test_an_open_shard_that_many_records_depend_on_is_closed(dataset: Dataset) -> None:
    admitter = admitter_on(dataset)
    batches: Sequence[Batch] = [Batch(f"k{n}", [document("x", "same", record=1)]) for n in range(100)]
    closed = admitter.admit_batches(batches)
    assert [part.tasks[0].rows for part in closed if part.tasks] == [1]
    assert close_all(admitter).unchanged == 99
    assert alive(dataset) == {"x": "same"}
