"""The simulated Redis: fakeredis in this process, behind a network that delays, and loses requests and replies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any
from unittest import mock

import fakeredis
from fakeredis import FakeAsyncRedis as _FakeAsyncRedis
from fakeredis.aioredis import FakeAsyncRedisConnection
from fakeredis.model import ExpiringMembersSet
from redis.exceptions import ConnectionError as RedisConnectionError

from embedmill.connection import FAKE_URL, Connection

from .history import History
from .loop import SimulatedLoop, current_process
from .promises import QueuePromises

_script: ContextVar[str] = ContextVar("script", default="")
_LATENCY_S = 0.03


@dataclass
class Faults:
    """How likely each fault is: a request or a reply is lost, per command; a process dies or stalls, per callback.

    hot: of each failpoint, that it is one at which processes die and stall often, for a while.
    """

    lost: float = 0.0
    crash: float = 0.0
    stall: float = 0.0
    hot: float = 0.0
    longest_stall_s: float = 0.0
    away_until: float = 0.0

    def stop(self) -> None:
        self.lost = self.crash = self.stall = self.hot = self.away_until = 0.0


_members = ExpiringMembersSet.__iter__


def _sorted_members(members: ExpiringMembersSet) -> Iterator[bytes]:
    """SMEMBERS in an order that does not hang on this process's hashes of strings."""
    return iter(sorted(_members(members)))


class _Callbacks(dict[Callable[[], None], None]):
    """What fakeredis keeps in a set, in the order of insertion: who waits first is woken first, in every run."""

    def add(self, callback: Callable[[], None]) -> None:
        self[callback] = None

    def remove(self, callback: Callable[[], None]) -> None:
        del self[callback]


@dataclass
class Server:
    """One Redis, which outlives whatever else dies, and `promises` that are checked as it executes each script."""

    loop: SimulatedLoop
    chance: Random
    faults: Faults
    history: History
    on_broken_promise: Callable[[AssertionError], None]
    redis: fakeredis.FakeServer = field(default_factory=fakeredis.FakeServer)
    promises: QueuePromises | None = None

    def __post_init__(self) -> None:
        self.redis.dbs[0]._change_callbacks = _Callbacks()

    @contextmanager
    def instead_of_fakeredis(self) -> Iterator[None]:
        """Let every `Connection` to fakeredis that is opened now be one to this server."""
        client = partial(_Client, self, connection_class=_Wire)
        with (
            mock.patch.object(fakeredis, "FakeServer", return_value=self.redis),
            mock.patch.object(fakeredis, "FakeAsyncRedis", client),
            mock.patch.object(ExpiringMembersSet, "__iter__", _sorted_members),
        ):
            yield

    def connect(self) -> Connection:
        return _NamingConnection(FAKE_URL)

    def flush(self) -> None:
        """Lose everything."""
        self.look().flushall()
        if self.promises is not None:
            self.promises.redis_lost_everything()
        self.note("redis", "FLUSHALL")

    def look(self) -> fakeredis.FakeRedis:
        """A client of whoever stands outside of the simulation: no delay, no fault."""
        return fakeredis.FakeRedis(server=self.redis, decode_responses=True, protocol=2)

    def tasks(self) -> list[str]:
        """Keys of all tasks, wherever they are."""
        return sorted(key for key in self.look().scan_iter() if ":task:" in key)

    def note(self, process: str, event: str) -> None:
        self.history.add(self.loop.time(), process, event)

    def executed(self, arguments: list[Any], reply: Any) -> None:
        """A script has run, this moment."""
        name, behind = _script.get(), 3 + int(arguments[2])
        self.note(current_process(), f"{name} {arguments[behind:]} -> {reply}")
        if self.promises is not None:
            try:
                self.promises.executed(name, arguments[behind:], reply)
            except AssertionError as broken:
                self.on_broken_promise(broken)


class _NamingConnection(Connection):
    """Says which script is being asked for."""

    async def script(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        token = _script.set(name)
        try:
            return await super().script(name, keys, args)
        finally:
            _script.reset(token)


class _Client(_FakeAsyncRedis):
    def __init__(self, world: Server, **options: Any) -> None:
        super().__init__(**options)
        self._world = world
        self.connection_pool.connection_kwargs["world"] = world

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        world, name = self._world, _script.get() or str(args[0])
        await asyncio.sleep(world.chance.uniform(0, _LATENCY_S))
        self._perhaps_lose(f"{name}: request lost")
        reply = await super().execute_command(*args, **options)
        await asyncio.sleep(world.chance.uniform(0, _LATENCY_S))
        self._perhaps_lose(f"{name}: reply lost")
        return reply

    def _perhaps_lose(self, what: str) -> None:
        world = self._world
        away = world.loop.time() < world.faults.away_until
        if away or world.chance.random() < world.faults.lost:
            world.note(current_process(), what)
            raise RedisConnectionError(what)


class _Wire(FakeAsyncRedisConnection):
    """Tells the server what it has executed, in the moment of execution: the client may be stalled or dead by the next."""

    def __init__(self, *, world: Server, **options: Any) -> None:
        super().__init__(**options)
        self._world = world
        self._sent: list[Any] = []

    async def _connect(self) -> None:
        await super()._connect()
        sock = self._sock
        put_response = sock.put_response

        def respond(message: Any) -> None:
            if self._sent and self._sent[0] in ("EVAL", "EVALSHA") and not isinstance(message, Exception):
                sent, self._sent = self._sent, []
                self._world.executed(sent, _plain(message))
            put_response(message)

        sock.put_response = respond

    async def send_command(self, *args: Any, **options: Any) -> None:
        self._sent = [_plain(argument) for argument in args]
        await super().send_command(*args, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.decode() if isinstance(value, bytes) else value
