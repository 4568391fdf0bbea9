"""Named places between two steps, where a test makes the process die, hang or fail. Without a plan they do nothing.

    EMBEDMILL_FAILPOINTS="worker.after_vectors=crash@2,redis.scheduler/finish.reply=lost@1"

The plan is a list of NAME=ACTION, each with `@N` to act only the N-th time that NAME is reached, else every time:

    crash          end as SIGKILL would: no handler, no flush, status 137
    stall:SECONDS  stand still, longer than a lease for example; `failpoint` blocks its thread, `afailpoint` only its task
    raise          raise RuntimeError: a bug that nobody foresaw
    lost           raise ConnectionResetError: at `redis.NAME.reply`, NAME was executed and its reply is lost
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, cast

import anyio

from .errors import ConfigurationError

VARIABLE = "EMBEDMILL_FAILPOINTS"
_CRASH_STATUS = 137
_ENTRY = re.compile(
    r"(?P<name>[\w./-]+)=(?P<action>crash|stall:(?P<stall_s>\d+(\.\d+)?)|raise|lost)(@(?P<at>[1-9]\d*))?"
)

_Action = Literal["crash", "stall", "raise", "lost"]


@dataclass(slots=True)
class _Point:
    """What happens at one name. `reached` counts in one step, so that threads may share it."""

    name: str
    action: _Action
    stall_s: float
    at: int | None
    reached: Iterator[int] = field(default_factory=lambda: count(1))

    def due(self) -> bool:
        return next(self.reached) == self.at or self.at is None

    def act(self) -> None:
        if self.action == "crash":
            os._exit(_CRASH_STATUS)
        if self.action == "lost":
            raise ConnectionResetError(f"the reply was lost at failpoint {self.name}")
        if self.action == "raise":
            raise RuntimeError(f"failpoint {self.name}")


@dataclass(slots=True)
class _Plan:
    """points: None until the environment was read."""

    points: dict[str, _Point] | None = None


_plan = _Plan()


def failpoint(name: str) -> None:
    """Do what the plan says for `name`, nearly always nothing. A stall blocks the thread."""
    point = _due(name)
    if point is None:
        return
    if point.action == "stall":
        time.sleep(point.stall_s)
    point.act()


async def afailpoint(name: str) -> None:
    """The same on the event loop, which goes on during a stall."""
    point = _due(name)
    if point is None:
        return
    if point.action == "stall":
        await anyio.sleep(point.stall_s)
    point.act()


def arm(plan: str) -> None:
    """Follow `plan` from now on, in this process; "" disarms. Raises ConfigurationError for what is no plan."""
    _plan.points = parse_plan(plan)


def parse_plan(plan: str) -> dict[str, _Point]:
    points = {}
    for entry in filter(None, (part.strip() for part in plan.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ConfigurationError(
                f"{VARIABLE}: {entry!r} is not NAME=crash|stall:SECONDS|raise|lost, with or without @N"
            )
        action = cast(_Action, match["action"].partition(":")[0])
        at = int(match["at"]) if match["at"] else None
        points[match["name"]] = _Point(match["name"], action, float(match["stall_s"] or 0), at)
    return points


def _due(name: str) -> _Point | None:
    if _plan.points is None:
        arm(os.environ.get(VARIABLE, ""))
    point = _plan.points.get(name) if _plan.points else None
    return point if point is not None and point.due() else None
