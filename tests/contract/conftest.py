"""The servers that the queue must work on: fakeredis, Valkey, and Redis where this machine has one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from embedmill.connection import FAKE_URL, Connection
from tests.contract.queue_bench import Bench
from tests.servers import REDIS_SERVER_VARIABLE, Server, missing_redis_server, redis_binary, running


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(Server(tmp_path_factory.mktemp("valkey"), on_socket=True)) as server:
        yield server.url


@pytest.fixture(scope="session")
def redis_server() -> str:
    """The binary of redis-server. Skips the test where there is none, unless the environment demands one."""
    binary = redis_binary()
    if binary is None:
        explain = pytest.fail if os.environ.get(REDIS_SERVER_VARIABLE) == "1" else pytest.skip
        explain(missing_redis_server())
    return binary


@pytest.fixture(scope="session")
def redis_url(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(Server(tmp_path_factory.mktemp("redis"), binary=redis_server, on_socket=True)) as server:
        yield server.url


_SERVERS = {"fakeredis": None, "valkey": "server_url", "redis": "redis_url"}


@pytest.fixture(
    params=[
        "fakeredis",
        pytest.param("valkey", marks=pytest.mark.server),
        pytest.param("redis", marks=pytest.mark.server),
    ]
)
async def connection(request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    """An empty server."""
    fixture = _SERVERS[request.param]
    connection = Connection(FAKE_URL if fixture is None else request.getfixturevalue(fixture))
    await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()


@pytest.fixture
def bench(connection: Connection) -> Bench:
    return Bench(connection)
