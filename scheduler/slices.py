"""Several requests in one call: those that wait in a line, as a slice that its first one takes along.

Nobody runs in the background. Whoever is first in its line makes the call for all behind it, and the next first one goes on.
Where a process sends so often that calls would cost more than they give, they are made some milliseconds apart, so that a
slice is there to be taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import anyio

_AT_ONCE = 64
_COUNTED_FOR_S = 0.5
_OFTEN_PER_S = 50.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Member(Generic[T]):
    """One in a line. done: it has what it waits for; error: why it never will; gone: it waits no more."""

    item: T
    done: bool = False
    error: Exception | None = None
    gone: bool = False
    called: anyio.Event = field(default_factory=anyio.Event)


class Line(Generic[T]):
    """Members in the order they came.

    The first one awaits `ready`, then `serve` with the first members, itself included, again and again until it is done.
    `serve` marks whom it has served, from the front; an error that it raises is everybody's.
    """

    def __init__(
        self, serve: Callable[[Sequence[Member[T]]], Awaitable[None]], *, ready: Callable[[], Awaitable[None]]
    ) -> None:
        self._serve = serve
        self._ready = ready
        self._members: deque[Member[T]] = deque()

    async def join(self, item: T) -> None:
        """Wait until it is served. Raises what `serve` raises for it."""
        member = Member(item)
        self._members.append(member)
        try:
            while not member.done and member.error is None:
                if self._members[0] is member:
                    await self._serve_first()
                else:
                    await member.called.wait()
                    member.called = anyio.Event()
        finally:
            member.gone = True
            if member in self._members:
                self._members.remove(member)
            if self._members:
                self._members[0].called.set()
        if member.error:
            raise member.error

    async def _serve_first(self) -> None:
        await self._ready()
        first = list(islice(self._members, _AT_ONCE))
        try:
            await self._serve(first)
        except Exception as error:
            for member in first:
                if not member.done:
                    member.error = error
        while self._members and (self._members[0].done or self._members[0].error):
            self._members.popleft().called.set()


class Often:
    """Whether something happens so often that it is done in slices."""

    def __init__(self) -> None:
        self._count = 0
        self._since_s = 0.0
        self._per_s = 0.0

    def count(self, times: int = 1) -> None:
        now = anyio.current_time()
        self._count += times
        if now - self._since_s >= _COUNTED_FOR_S:
            self._per_s = self._count / (now - self._since_s)
            self._count, self._since_s = 0, now

    def __bool__(self) -> bool:
        return self._per_s > _OFTEN_PER_S
