"""Services that are started before the first push: they wait for the dataset, and say so once."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from embedmill.commands import services
from embedmill.commands.services import open_when_there
from embedmill.dataset.dataset import Dataset
from worker.embedders.null import NullEmbedder


async def test_a_dataset_that_is_made_later_is_waited_for_and_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(services, "_DATASET_POLL_S", 0.01)
    caplog.set_level(logging.INFO, logger="embedmill")
    url, opened = str(tmp_path / "wiki"), []

    async def wait() -> None:
        opened.append(await open_when_there(url, anyio.Event()))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.2)
            assert not opened
            made = await to_thread.run_sync(lambda: Dataset.open_or_create(url, embedder=NullEmbedder(8).spec))

    assert [dataset and dataset.info for dataset in opened] == [made.info]
    assert len(caplog.messages) == 1
    assert "waiting for" in caplog.messages[0]
    assert url in caplog.messages[0]


async def test_a_service_that_is_stopped_while_it_waits_ends_without_a_dataset(tmp_path: Path) -> None:
    stopping = anyio.Event()
    opened: list[Dataset | None] = []

    async def wait() -> None:
        opened.append(await open_when_there(str(tmp_path / "wiki"), stopping))

    with anyio.fail_after(1):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.05)
            stopping.set()

    assert opened == [None]
    assert not (tmp_path / "wiki").exists()
