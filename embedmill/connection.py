"""The one place that speaks to Redis (7.0 and newer), Valkey, or fakeredis.

Scripts run on clients that never re-send by themselves, since redis-py's own retries double commands; every script
here is idempotent, and the retry around it is ours. Blocking waits have a client of their own: they pin their
connection. RESP2 on purpose: fakeredis answers RESP3 wrongly inside Lua.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import anyio
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from .errors import ConfigurationError, Overloaded

KEY_VERSION = "1"
FAKE_URL = "fake://"
_SCRIPT_TIMEOUT_S = 10.0
_SILENCE_S = 5.0
# What a server says while it cannot take writes; the words are Redis' and Valkey's own.
_BUSY_WORDS = ("OOM", "READONLY", "LOADING", "MASTERDOWN", "BUSY", "NOREPLICAS", "MISCONF", "CLUSTERDOWN", "TRYAGAIN")
_UNREACHABLE = (RedisConnectionError, RedisTimeoutError, OSError)


def key_prefix(namespace: str) -> str:
    """Every key of one namespace starts with this. The braces put all of them into one cluster slot."""
    return f"{{embedmill:{KEY_VERSION}:{namespace}}}"


class Connection:
    """Two clients on one server, and the scripts.

    retry_for_s: how long an unreachable server is waited for; embedded: it is a child of ours, and does not come back.
    """

    def __init__(self, url: str, *, retry_for_s: float = 30.0, embedded: bool = False) -> None:
        self.url = url
        self.embedded = embedded
        self._retry_for_s = retry_for_s
        self._scripts: dict[str, AsyncScript] = {}
        self._commands, self._blocking = _fake_clients() if url == FAKE_URL else _clients(url)

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return without_password(self.url)

    async def script(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Run `FOLDER/scripts/NAME.lua`, `name` being `FOLDER/NAME`.

        Raises Overloaded when the server stays away longer than `retry_for_s`.
        """
        if name not in self._scripts:
            self._scripts[name] = self._commands.register_script(_script_text(name))
        return await self._patiently(self._scripts[name], list(keys), list(args))

    async def command(self, *parts: str | int | float) -> Any:
        """One idempotent command."""
        return await self._patiently(self._commands.execute_command, *parts)

    async def wait_for_entry(self, stream: str, last_id: str, *, timeout_s: float) -> str:
        """Block until `stream` has an entry after `last_id`, at most `timeout_s`; the newest id seen.

        Changes no state, so cancelling it loses nothing.
        """
        reply: Any = None
        try:
            # A connection that has gone silent would be waited for without end.
            with anyio.move_on_after(timeout_s + _SILENCE_S):
                reply = await self._blocking.xread({stream: last_id}, count=1000, block=max(1, int(timeout_s * 1000)))
        except RedisError:
            await anyio.sleep(min(1.0, timeout_s))
        return str(reply[0][1][-1][0]) if reply else last_id

    async def check(self) -> dict[str, str]:
        """The server's `INFO`, in short. Raises ConfigurationError when it cannot be used at all."""
        if self.url == FAKE_URL:
            return {}
        try:
            info = await self._commands.info()
        except _UNREACHABLE as error:
            raise ConfigurationError(
                f"cannot reach Redis at {self.shown}: {_reason(error)}; is it running, and is the URL right?"
            ) from error
        except ResponseError as error:
            raise ConfigurationError(f"Redis at {self.shown} refuses: {error}") from error
        except RedisError as error:
            raise ConfigurationError(f"no usable Redis at {self.shown}: {error}") from error
        return {key: str(value) for key, value in info.items()}

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await self._commands.aclose()
            await self._blocking.aclose()

    async def _patiently(self, call: Any, *args: Any) -> Any:
        attempts = AsyncRetrying(
            sleep=anyio.sleep,
            retry=retry_if_exception_type(_UNREACHABLE),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(self._retry_for_s),
            reraise=True,
        )
        try:
            return await attempts(call, *args)
        except _UNREACHABLE as error:
            if self.embedded:
                raise Overloaded("the embedded queue server is gone: run the same command again") from error
            raise Overloaded(f"Redis at {self.shown} does not answer: {_reason(error)}") from error
        except RedisError as error:
            if _reason(error).removeprefix("-").startswith(_BUSY_WORDS) or isinstance(error, OutOfMemoryError):
                raise Overloaded(f"Redis at {self.shown} cannot take this now: {_reason(error)}") from error
            raise ConfigurationError(f"Redis at {self.shown} refuses: {_reason(error)}") from error


def without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.hostname or ""
    netloc = f"{parts.username or ''}:***@{host}" + (f":{parts.port}" if parts.port else "")
    return parts._replace(netloc=netloc).geturl()


def _clients(url: str) -> tuple[aioredis.Redis, aioredis.Redis]:
    options: dict[str, Any] = {
        "decode_responses": True,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": 5.0,
    }
    try:
        commands = aioredis.Redis.from_url(url, socket_timeout=_SCRIPT_TIMEOUT_S, **options)
        blocking = aioredis.Redis.from_url(url, socket_timeout=None, **options)
    except ValueError as error:
        raise ConfigurationError(
            f"--redis {without_password(url)!r} is not a Redis URL: {error}; it looks like redis://localhost:6379/0"
        ) from error
    return commands, blocking


def _fake_clients() -> tuple[aioredis.Redis, aioredis.Redis]:
    import fakeredis

    server = fakeredis.FakeServer()
    options: dict[str, Any] = {"server": server, "decode_responses": True, "protocol": 2}
    return fakeredis.FakeAsyncRedis(**options), fakeredis.FakeAsyncRedis(**options)


def _script_text(name: str) -> str:
    folder, _, stem = name.partition("/")
    return resources.files(folder).joinpath(f"scripts/{stem}.lua").read_text(encoding="utf-8")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
