"""The queue rebuilt from the dataset, and what the scheduler does beside it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.errors import ConfigurationError
from scheduler import retention
from scheduler.queue import Queue
from scheduler.reconcile import make_tasks, reconcile
from scheduler.retention import drop_regularly
from tests.datasets import admit_texts, small_dataset


async def test_rebuilding_reads_no_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = small_dataset(tmp_path / "d")
    texts = [f"text {row} " * 2000 for row in range(8)]
    for shard in range(3):
        admit_texts(dataset, shard, texts)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("documents were read")

    monkeypatch.setattr(Dataset, "documents", refuse)
    connection = Connection(FAKE_URL)
    assert await reconcile(dataset, Queue(connection)) == 3
    (task,) = make_tasks(dataset, [1])
    assert (task.shard, task.job, task.rows) == (1, "main", 8)
    assert task.text_bytes == pytest.approx(sum(map(len, texts)), rel=0.1)
    await connection.aclose()


async def test_trouble_with_records_of_old_jobs_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(retention, "_EVERY_S", 0.001)
    stopping, looks = anyio.Event(), 0

    async def drop(*_: object, **__: object) -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ConfigurationError("the password is wrong")
        stopping.set()
        return ["d:main"]

    monkeypatch.setattr(retention, "drop_finished_jobs", drop)
    with anyio.fail_after(5):
        await partial(drop_regularly, Queue(Connection(FAKE_URL)), stopping)()
    assert "the password is wrong" in caplog.text
    assert "d:main is dropped" in caplog.text
