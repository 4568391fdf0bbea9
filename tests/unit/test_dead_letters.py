"""Failures: which of them count, and what trying them again, dropping them or cancelling a job does to the accounts."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.dead_letters import FailedRow, drop_letters, failed_rows
from embedmill.dataset.layout import CANCELLED, EMBEDDED, Failure, Job
from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.passages import ShardOrigin
from embedmill.dataset.summary import DatasetSummary, summarize
from embedmill.dataset.verification import verify_dataset
from embedmill.errors import StorageError
from loader.rows import plan_shard
from scheduler.retries import Retried, retry_letters
from tests.datasets import admit_texts, passage, small_dataset
from tests.invariants import check_dataset, final_set
from worker.cancelling import cancel_shard
from worker.checkpoints import Checkpoint
from worker.commit import commit_shard
from worker.embedders.null import hash_vectors
from worker.results import Increment, ShardResults


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two committed shards of eight rows; rows 1 and 5 of the first failed."""
    made = small_dataset(tmp_path / "d")
    for shard, failed in ((0, {1, 5}), (1, set())):
        admit_texts(made, shard, [f"text {row} of shard {shard}" for row in range(8)])
        commit(made, shard, failed=failed)
    made.publish_shape()
    return made


def results_of(
    dataset: Dataset, shard: int, *, failed: Collection[int] = (), rows: Collection[int] | None = None
) -> Increment:
    """What an attempt got for these rows (all of them): causes for the failed, vectors for the others."""
    columns = dataset.documents(shard)[0].to_pydict()
    taken = range(len(columns["id"])) if rows is None else sorted(rows)
    good = [row for row in taken if row not in failed]
    causes = [
        Failure(row, columns["id"][row], columns["version"][row], "input_rejected", f"no. {row} is refused")
        for row in failed
    ]
    return Increment(np.array(good, np.int32), hash_vectors([columns["text"][row] for row in good], 3), tuple(causes))


def commit(dataset: Dataset, shard: int, *, failed: Collection[int] = ()) -> None:
    table, origin = dataset.documents(shard)
    results = ShardResults(table.num_rows, dataset.info.dimensions)
    results.add(results_of(dataset, shard, failed=failed))
    passages = list(zip(table["id"].to_pylist(), table["version"].to_pylist(), strict=True))
    commit_shard(dataset, shard, results, origin=origin, passages=passages, attempt="a", worker="tested")


def retry(dataset: Dataset, letters: list[FailedRow]) -> Retried:
    with closing(dataset.open_index()) as index:
        return retry_letters(dataset, index, letters, job="main")


def states(dataset: Dataset) -> dict[str, str]:
    return {letter.failure.id: letter.state for letter in failed_rows(dataset)}


def test_a_failed_passage_is_an_open_dead_letter(dataset: Dataset) -> None:
    assert states(dataset) == {"0-1": "open", "0-5": "open"}
    summary = summarize(dataset)
    assert (summary.admitted, summary.embedded, summary.failed, summary.open_failures) == (16, 14, 2, 2)
    check_dataset(dataset.url)


def test_a_retry_is_a_row_of_a_new_shard_with_the_same_id_and_version_that_names_what_failed(dataset: Dataset) -> None:
    result = retry(dataset, failed_rows(dataset))
    assert (result.shards, result.passages, result.passed_over) == ([2], 2, 0)
    table, origin = dataset.documents(2)
    assert origin.retries == {0: (0, 1), 1: (0, 5)}
    assert table.select(["id", "version", "text"]).to_pylist() == [
        {"id": "0-1", "version": 1, "text": "text 1 of shard 0"},
        {"id": "0-5", "version": 1, "text": "text 5 of shard 0"},
    ]
    assert origin.job == "main"


def test_a_passage_that_is_tried_again_is_owed_and_then_what_came_of_it_and_never_counted_twice(
    dataset: Dataset,
) -> None:
    retry(dataset, failed_rows(dataset))
    waiting = summarize(dataset)
    assert (waiting.admitted, waiting.embedded, waiting.failed, waiting.owed) == (16, 14, 0, 2)
    check_dataset(dataset.url, at_rest=False)

    commit(dataset, 2, failed={1})
    dataset.publish_shape()
    after = summarize(dataset)
    assert (after.admitted, after.embedded, after.failed, after.owed) == (16, 15, 1, 0)
    assert [(letter.place, letter.failure.id) for letter in failed_rows(dataset)] == [((2, 1), "0-5")]
    assert final_set(dataset.url)["0-1", 1].status == "embedded"
    assert verify_dataset(dataset).passed
    check_dataset(dataset.url)


def test_trying_again_what_is_being_tried_again_does_nothing(dataset: Dataset) -> None:
    letters = failed_rows(dataset)
    retry(dataset, letters)
    again = retry(dataset, letters)
    assert (again.shards, again.passed_over) == ([], 2)
    assert dataset.admitted() == [0, 1, 2]


def test_retrying_a_superseded_version_does_nothing_and_its_failure_is_no_open_letter(dataset: Dataset) -> None:
    letters = failed_rows(dataset)
    dataset.append_passages(2, [passage("0-1", "a better text", version=2)], origin=ShardOrigin(2, "main"))
    assert states(dataset) == {"0-1": "superseded", "0-5": "open"}
    result = retry(dataset, letters)
    assert (result.passages, result.passed_over) == (1, 1)
    assert dataset.documents(3)[1].retries == {0: (0, 5)}
    commit(dataset, 2)
    commit(dataset, 3)
    dataset.publish_shape()
    assert summarize(dataset).open_failures == 0
    assert summarize(dataset).failed_words == "1 failed (1 superseded)"
    check_dataset(dataset.url)


def test_a_retry_that_loses_its_number_tries_the_next_and_leaves_out_what_the_winner_took(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters, append, others = failed_rows(dataset), dataset.append_passages, [True]

    def append_later(*arguments, **options):  # type: ignore[no-untyped-def]
        if others.pop() if others else False:
            retry(Dataset.open(dataset.url), letters[:1])
        return append(*arguments, **options)

    monkeypatch.setattr(dataset, "append_passages", append_later)
    result = retry(dataset, letters)
    assert (result.shards, result.passages, result.passed_over) == ([3], 1, 1)
    assert dataset.documents(2)[1].retries == {0: (0, 1)}
    assert dataset.documents(3)[1].retries == {0: (0, 5)}


def test_more_letters_than_a_shard_holds_make_several_shards(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "many", shard_rows=4)
    for shard in range(3):
        admit_texts(dataset, shard, [f"text {row} of shard {shard}" for row in range(4)])
        commit(dataset, shard, failed=range(3))
    dataset.publish_shape()
    assert retry(dataset, failed_rows(dataset)).shards == [3, 4, 5]
    for shard in (3, 4, 5):
        commit(dataset, shard)
    dataset.publish_shape()
    assert summarize(dataset).failed == 0
    check_dataset(dataset.url)


def test_a_dropped_letter_stays_failed_and_is_not_open_and_counts_again_when_it_fails_again(dataset: Dataset) -> None:
    letters = failed_rows(dataset)
    assert drop_letters(dataset, letters[:1]) == 1
    assert drop_letters(dataset, letters[:1]) == 0
    assert states(dataset) == {"0-1": "dropped", "0-5": "open"}
    summary = summarize(dataset)
    assert (summary.failed, summary.open_failures, summary.failed_words) == (2, 1, "2 failed (1 dropped)")
    retry(dataset, letters)
    commit(dataset, 2, failed={0})
    assert states(dataset) == {"0-1": "open"}


def test_letters_from_an_iterator_are_dropped_though_somebody_else_was_faster(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = failed_rows(dataset)
    swap = LocalStore.swap

    def lose_once(store: LocalStore, key: str, data: bytes, *, expected: bytes | None) -> None:
        monkeypatch.undo()
        assert drop_letters(Dataset.open(dataset.url), [second]) == 1
        swap(store, key, data, expected=expected)

    monkeypatch.setattr(LocalStore, "swap", lose_once)
    assert drop_letters(dataset, iter([first])) == 1
    assert states(dataset) == {"0-1": "dropped", "0-5": "dropped"}


def test_a_summary_of_one_job_counts_its_shards_alone(dataset: Dataset) -> None:
    admit_texts(dataset, 2, ["one", "two", "three"], origin=ShardOrigin(2, "news"))
    main, news = (summarize(dataset, job=job) for job in ("main", "news"))
    assert (main.shards, main.admitted, main.embedded, main.failed, main.owed) == (2, 16, 14, 2, 0)
    assert (news.shards, news.admitted, news.embedded, news.failed, news.owed) == (1, 3, 0, 0, 3)
    retry(dataset, failed_rows(dataset))
    main, whole = summarize(dataset, job="main"), summarize(dataset)
    assert (main.admitted, main.embedded, main.failed, main.owed) == (16, 14, 0, 2)
    assert (whole.admitted, whole.embedded, whole.failed, whole.owed) == (19, 14, 0, 5)
    assert summarize(dataset, job="none") == DatasetSummary(*[0] * 10)


def test_a_summary_sees_that_a_shard_was_put_aside_and_committed_anew_by_others(dataset: Dataset) -> None:
    assert summarize(dataset).failed == 2
    other = Dataset.open(dataset.url)
    other.put_aside(0)
    assert summarize(dataset).owed == 8
    commit(other, 0)
    assert (summarize(dataset).failed, summarize(dataset).owed) == (0, 0)


def test_the_failures_of_a_dataset_that_cannot_be_written_are_read_from_the_log(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset.append_passages(2, [passage("0-1", "a better text", version=2)], origin=ShardOrigin(2, "main"))

    def refuse() -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(dataset, "open_index", refuse)
    assert states(dataset) == {"0-1": "superseded", "0-5": "open"}


def test_verification_finds_a_retry_of_what_did_not_fail(dataset: Dataset) -> None:
    wrong = ShardOrigin(2, "main", retries={0: (0, 2)})
    dataset.append_passages(2, [passage("0-2", "text 2 of shard 0")], origin=wrong)
    commit(dataset, 2)
    dataset.publish_shape()
    texts = [problem.text for problem in verify_dataset(dataset).problems]
    assert texts == ["row 0 tries again what did not fail"]


def test_the_loader_takes_a_retried_row_and_passes_over_the_failed_one(dataset: Dataset) -> None:
    retry(dataset, failed_rows(dataset))
    commit(dataset, 2)
    with closing(dataset.open_index()) as index:
        ids = [["0-1"], ["0-1", "0-5"]]
        known = index.versions(["0-1", "0-5"])

    def status_of(shard: int, row: int) -> int | None:
        marker = dataset.marker(shard)
        return None if marker is None else int(marker.statuses[row])

    assert known == {"0-1": [(1, 2, 0)], "0-5": [(1, 2, 1)]}
    old = dataset.marker(0)
    new = dataset.marker(2)
    assert old is not None
    assert new is not None
    first = plan_shard(0, ids=ids[0], versions=[1], statuses=old.statuses[1:2], known=known, status_of=status_of)
    second = plan_shard(2, ids=ids[1], versions=[1, 1], statuses=new.statuses, known=known, status_of=status_of)
    assert (first.upsert, first.skipped) == ((), 1)
    assert (second.upsert, second.skipped) == ((0, 1), 0)


def owe(dataset: Dataset, shard: int) -> None:
    admit_texts(dataset, shard, [f"text {row} of shard {shard}" for row in range(8)])
    dataset.write_job(Job("main", state="cancelled", stopped_by="user"))


def test_a_cancelled_shard_keeps_what_its_checkpoints_hold_and_gives_up_the_rest(dataset: Dataset) -> None:
    owe(dataset, 2)
    Checkpoint(dataset, 2, attempt="dead").keep(results_of(dataset, 2, rows=[0, 3], failed={4}))
    marker = cancel_shard(dataset, 2, who="tested")
    assert [marker.count(status) for status in (EMBEDDED, CANCELLED)] == [2, 5]
    assert [failure.id for failure in marker.failures] == ["2-4"]
    dataset.publish_shape()
    assert summarize(dataset).cancelled == 5
    assert verify_dataset(dataset).passed
    check_dataset(dataset.url)


def test_a_shard_without_results_is_cancelled_with_an_object_that_holds_no_vector(dataset: Dataset) -> None:
    owe(dataset, 2)
    marker = cancel_shard(dataset, 2, who="tested")
    assert marker.count(CANCELLED) == 8
    assert marker.objects["vectors.zarr/vectors/c/2/0"].bytes < 100
    dataset.publish_shape()
    check_dataset(dataset.url)


def test_a_worker_that_commits_after_a_cancellation_finds_its_marker(dataset: Dataset) -> None:
    owe(dataset, 2)
    cancel_shard(dataset, 2, who="tested")
    commit(Dataset.open(dataset.url), 2)
    stored = Dataset.open(dataset.url).marker(2)
    assert stored is not None
    assert stored.count(CANCELLED) == 8
    dataset.publish_shape()
    check_dataset(dataset.url)


def test_a_cancellation_adopts_the_vectors_that_a_worker_was_about_to_commit(dataset: Dataset) -> None:
    owe(dataset, 2)
    dataset.create_vectors(2, results_of(dataset, 2).vectors)
    assert cancel_shard(dataset, 2, who="tested").count(EMBEDDED) == 8
    dataset.publish_shape()
    check_dataset(dataset.url)


def test_a_worker_that_finds_the_vectors_of_a_cancellation_without_its_marker_cancels_the_rows_they_lack(
    dataset: Dataset,
) -> None:
    owe(dataset, 2)
    half = hash_vectors([f"text {row} of shard 2" for row in range(8)], 3)
    half[4:] = np.nan
    dataset.create_vectors(2, half)
    commit(dataset, 2)
    marker = dataset.marker(2)
    assert marker is not None
    assert (marker.count(EMBEDDED), marker.count(CANCELLED), marker.failures) == (4, 4, ())
    dataset.publish_shape()
    check_dataset(dataset.url)
