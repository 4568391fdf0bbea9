"""Standard input that can be stopped: a read that waits for another program would hold up the end of this one."""

from __future__ import annotations

import io
import os
import select
import sys

_LOOK_EVERY_S = 0.2


class StoppableInput(io.RawIOBase):
    """What `sys.stdin` reads; it ends when the other side ends it, or within a moment of `stop`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped = False

    def stop(self) -> None:
        """Any thread may call this."""
        self._stopped = True

    def readable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._stopped:
            if select.select([self._descriptor], [], [], _LOOK_EVERY_S)[0]:
                data = os.read(self._descriptor, len(buffer))
                buffer[: len(data)] = data
                return len(data)
        return 0


def make_standard_input_stoppable() -> StoppableInput | None:
    """Put a `StoppableInput` behind `sys.stdin`; None where there is no standard input."""
    if sys.stdin is None:
        return None
    raw = StoppableInput(sys.stdin.fileno())
    sys.stdin = io.TextIOWrapper(io.BufferedReader(raw))
    return raw
