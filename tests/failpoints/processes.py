"""The parts of one case as processes: started, told to end, killed; and waiting for what they do."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import anyio

from .parts import STALL_S, Place, main
from .points import Action, Point

CRASHED = 137
_WITHIN_S = 30.0
_context = multiprocessing.get_context("forkserver")
# Imported once, ahead of every fork.
_context.set_forkserver_preload(["tests.failpoints.parts", "pymilvus", "milvus_lite.server_manager"])


class Processes:
    """All of one case. The first one of `point.part` is armed with `action`."""

    def __init__(self, place: Place, point: Point, action: Action) -> None:
        self._place, self._point, self._action = place, point, action
        self._started: list[BaseProcess] = []

    def start_armed(self) -> BaseProcess:
        """The process that the fault hits."""
        action = f"stall:{STALL_S}" if self._action == "stall" else self._action
        return self.start(self._point.part, f"{self._point.name}={action}@{self._point.at}")

    def start(self, part: str, plan: str = "") -> BaseProcess:
        process = _context.Process(target=main, args=(part, self._place, plan), daemon=True)
        process.start()
        self._started.append(process)
        return process

    def since_the_fault_s(self) -> float:
        """Raises AssertionError when there was none."""
        assert self._place.fault.exists(), f"{self._point.name} was not reached"
        return time.time() - self._place.fault.stat().st_mtime

    async def end(self, armed: BaseProcess) -> None:
        """A clean end of all, and the fault is looked at. Who stalls gets up first: it may still do harm."""
        since_s = self.since_the_fault_s()
        if armed.is_alive() and self._action == "stall":
            await anyio.sleep(max(0.0, STALL_S - since_s))
        living = [process for process in self._started if process.is_alive()]
        for process in living:
            process.terminate()
        for process in living:
            await until_ended(process)
            # One that was started a moment ago does not listen yet, and ends by the signal.
            assert process.exitcode in (0, -signal.SIGTERM), f"told to end, it ended with status {process.exitcode}"
        crashed = armed.exitcode == CRASHED
        assert crashed == (self._action == "crash"), f"after {self._action} it ended with status {armed.exitcode}"

    def kill_all(self) -> None:
        for process in self._started:
            process.kill()
            process.join()


async def until_ended(process: BaseProcess) -> None:
    await until(lambda: process.exitcode is not None, what="the end of a process")


async def until(condition: Callable[[], bool], *, what: str) -> None:
    """Raises AssertionError when it takes too long."""
    deadline = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {_WITHIN_S:.0f} s for {what}"
        await anyio.sleep(0.02)
