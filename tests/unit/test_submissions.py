"""What a dataset remembers of batches: each word is said once, and the first one counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Intent, Submissions
from embedmill.errors import CorruptStore, ObjectExists
from tests.datasets import admit_texts, small_dataset
from worker.cancelling import cancel_shard


@pytest.fixture
def submissions(tmp_path: Path) -> Submissions:
    dataset = small_dataset(tmp_path / "dataset")
    for shard in range(4):
        admit_texts(dataset, shard, ["a"])
    return Submissions(dataset)


def intend(submissions: Submissions, shard: int = 0, rows: tuple[int, ...] = (0, 1, 2)) -> Intent:
    return submissions.intend(
        shard,
        rows,
        number=submissions.last_number(shard) + 1,
        model="m",
        tokens=9,
        key="k",
        api_base="http://x/v1",
        worker="w",
        before=["batch_0"],
    )


def test_an_intent_names_its_rows_and_tells_its_lines_from_those_of_others(submissions: Submissions) -> None:
    intent = intend(submissions, rows=(0, 1, 2, 7, 9, 10))
    assert intent.rows == ((0, 3), (7, 1), (9, 2))
    assert intent.row_numbers() == [0, 1, 2, 7, 9, 10]
    assert intent.row_of(intent.custom_id(7)) == 7
    other = intend(submissions)
    assert (intent.name, other.name) == ("00000000-0001", "00000000-0002")
    for foreign in (other.custom_id(7), "", "7", f"{intent.attempt}-x", f"{intent.attempt}--7", "line-7"):
        assert intent.row_of(foreign) is None


def test_what_is_written_is_what_is_read(submissions: Submissions) -> None:
    first, second = intend(submissions), intend(submissions, shard=3)
    submissions.accept(first, "batch_1", by="answer")
    submissions.hold(second, "unclear", candidates=["batch_2", "batch_3"])
    assert submissions.end(first, "done", tokens=12, reason="")
    [read] = submissions.of_shard(0)
    assert read.intent == first
    assert read.accepted is not None
    assert read.ended is not None
    assert (read.accepted.batch_id, read.ended.tokens, read.state, read.is_open) == ("batch_1", 12, "done", False)
    [held] = submissions.of_shards([3, 4])
    assert held.held is not None
    assert (held.held.candidates, held.state) == (("batch_2", "batch_3"), "held")
    assert submissions.batch_ids() == {"batch_1"}
    assert len(submissions.open_places()) == 1
    assert (submissions.has(0), submissions.has(1)) == (True, False)


def test_the_first_word_counts(submissions: Submissions) -> None:
    intent = intend(submissions)
    submissions.accept(intent, "batch_1", by="answer")
    submissions.accept(intent, "batch_1", by="match")
    with pytest.raises(ObjectExists):
        submissions.accept(intent, "batch_2", by="person")
    submissions.hold(intent, "first")
    submissions.hold(intent, "second")
    assert submissions.end(intent, "done", tokens=5)
    assert not submissions.end(intent, "failed", tokens=7)
    [read] = submissions.of_shard(0)
    assert read.accepted is not None
    assert read.held is not None
    assert (read.accepted.by, read.held.reason, read.state) == ("answer", "first", "done")


def test_two_who_decide_at_once_are_told_apart(submissions: Submissions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "last_number", lambda _shard: 0)
    intend(submissions)
    with pytest.raises(ObjectExists):
        intend(submissions)


def test_what_is_withdrawn_was_never_meant(submissions: Submissions) -> None:
    submissions.withdraw(intend(submissions))
    assert submissions.of_shard(0) == []
    assert submissions.open_places() == []
    assert intend(submissions).number == 1


def test_whoever_says_it_a_batch_is_in_the_spend_log_once(submissions: Submissions, tmp_path: Path) -> None:
    intent = intend(submissions)
    for _ in range(2):
        submissions.spend(intent, "batch_1", job="main", tokens=12)
    [log] = (tmp_path / "dataset" / "spend").iterdir()
    [line] = map(json.loads, log.read_text().splitlines())
    assert (line["tokens"], line["job"], line["shard"], line["key"]) == (12, "main", 0, "k/batch")


def test_what_may_have_been_billed_is_told_from_what_was(submissions: Submissions, tmp_path: Path) -> None:
    submissions.spend(intend(submissions), "", job="main", tokens=0, unknown_tokens=9)
    [log] = (tmp_path / "dataset" / "spend").iterdir()
    line = json.loads(log.read_text())
    assert (line["tokens"], line["unknown_tokens"]) == (0, 9)


def test_a_damaged_record_is_named(submissions: Submissions, tmp_path: Path) -> None:
    intend(submissions)
    path = tmp_path / "dataset" / "submissions" / "00000000-0001.intent.json"
    for rubbish in ("", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "shard": 0}'):
        path.write_text(rubbish)
        with pytest.raises(CorruptStore, match="00000000-0001"):
            submissions.of_shard(0)


def test_other_names_are_passed_over(submissions: Submissions, tmp_path: Path) -> None:
    intend(submissions)
    folder = tmp_path / "dataset" / "submissions"
    for name in ("notes.txt", "00000000-0001.intent.json.bak", "0-1.end.json"):
        (folder / name).write_text("x")
    assert len(submissions.open_places()) == 1


def test_open_ones_are_told_apart_without_reading_them(submissions: Submissions, tmp_path: Path) -> None:
    ended, accepted, held, committed = (intend(submissions, shard) for shard in range(4))
    submissions.accept(accepted, "batch_1", by="answer")
    submissions.hold(held, "unclear")
    submissions.end(ended, "never")
    for path in (tmp_path / "dataset" / "submissions").iterdir():
        path.write_text("")
    assert [(one.shard, one.job, one.accepted, one.held) for one in sorted(submissions.open_places(), key=str)] == [
        (1, "main", True, False),
        (2, "main", False, True),
        (3, "main", False, False),
    ]
    cancel_shard(Dataset.open(str(tmp_path / "dataset")), committed.shard, who="w")
    assert sorted(one.shard for one in submissions.open_of("main")) == [1, 2]
    assert submissions.open_of("other") == []
    submissions.unhold(held)
    assert not any(one.held for one in submissions.open_places())
