"""What commands make of a job's cap: its record, and how a run ends that reached it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from embedmill.commands.capping import spent_of, with_cap
from embedmill.commands.long_passages import settle_too_long
from embedmill.commands.pipeline import cap_and_rest
from embedmill.commands.run import remember_job
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import Job
from embedmill.dataset.local_store import LocalStore
from embedmill.errors import CapReached, StorageError
from tests.datasets import small_dataset
from tests.late_documents import late_dataset

REACHED = CapReached("the cap", limit=5)
FULL = StorageError("the disk is full")


@pytest.mark.parametrize(("asked", "expected"), [(None, {"max_tokens": 5}), (0, {}), (7, {"max_tokens": 7})])
def test_a_cap_that_changes_leaves_that_somebody_paid_for_the_job_before(
    asked: int | None, expected: dict[str, int]
) -> None:
    job = Job("main", caps={"max_tokens": 5, "begun": 1})
    assert with_cap(job, asked).caps == {**expected, "begun": 1}


def test_a_cap_that_is_lifted_is_not_remembered_as_reached() -> None:
    assert with_cap(Job("main", caps={"max_tokens": 5, "reached": 5}), 0).caps == {}


def test_what_fails_together_with_a_reached_cap_is_what_is_said() -> None:
    assert cap_and_rest(None) == (None, None)
    assert cap_and_rest(REACHED) == (REACHED, None)
    assert cap_and_rest(FULL) == (None, FULL)
    assert cap_and_rest(ExceptionGroup("", [ExceptionGroup("", [REACHED]), REACHED])) == (REACHED, None)
    reached, rest = cap_and_rest(ExceptionGroup("", [REACHED, ExceptionGroup("", [FULL, REACHED])]))
    assert reached is REACHED
    assert isinstance(rest, ExceptionGroup)
    [inner] = rest.exceptions
    assert isinstance(inner, ExceptionGroup)
    assert inner.exceptions == (FULL,)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three workers' logs: 8 tokens each, of two jobs."""
    dataset = small_dataset(tmp_path / "set")
    for worker in range(3):
        for job, tokens in (("main", 3), ("other", 5)):
            line = {"at": now_iso(), "key": "k", "job": job, "shard": None, "tokens": tokens}
            dataset.store.append(f"spend/{worker}.log", (json.dumps(line) + "\n").encode())
    return dataset


@pytest.fixture
def logs_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that something of a spend log is read."""
    names: list[str] = []
    read_from = LocalStore.read_from

    def noted(store: LocalStore, key: str, offset: int) -> bytes:
        data = read_from(store, key, offset)
        if key.startswith("spend/") and data:
            names.append(key)
        return data

    monkeypatch.setattr(LocalStore, "read_from", noted)
    return names


@pytest.mark.parametrize(
    ("cap", "ends"),
    [(9, pytest.raises(CapReached, match="9 of 9 tokens")), (10, nullcontext())],
    ids=["at it", "below"],
)
def test_whether_a_job_has_reached_its_cap_is_read_once(
    dataset: Dataset, logs_read: list[str], cap: int, ends: AbstractContextManager[object]
) -> None:
    with ends:
        remember_job(dataset, "main", ["a.jsonl"], max_tokens=cap, too_long="fail")
    assert len(logs_read) == 3
    # What was said with the cap is kept with it, also where the job cannot go on.
    record = dataset.job("main")
    assert record is not None
    assert (record.max_tokens, record.too_long) == (cap, "fail")


def test_the_logs_are_read_once_for_all_jobs(dataset: Dataset, logs_read: list[str]) -> None:
    jobs = [Job("main", caps={"max_tokens": 1}), Job("other", caps={"max_tokens": 1}), Job("uncapped")]
    assert spent_of(dataset, jobs) == {"main": 9, "other": 15}
    assert len(logs_read) == 3


def test_what_is_chunked_late_is_never_cut_whatever_the_record_of_a_job_says(tmp_path: Path) -> None:
    dataset = late_dataset(tmp_path / "late")
    # As the scheduler does for the first message of an inbox.
    dataset.change_job("main", lambda new: new)
    assert settle_too_long(None, to=dataset.url, job="main", late_chunking=True) == "fail"
