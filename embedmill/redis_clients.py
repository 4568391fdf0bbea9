"""redis-py's clients for one server, for Sentinels and for a cluster, and what their errors mean.

None of them sends a command a second time by itself. In a cluster a redirection is learnt from and raised: the caller's
retry follows it. ASK is never followed, since a script would run on the half of the queue that has already moved.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ClusterError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .redis_address import RedisAddress

_CONNECT_TIMEOUT_S = 5.0
_SENTINEL_TIMEOUT_S = 2.0
_SCRIPT_TIMEOUT_S = 10.0
# Gone, or about to be somebody else's work: waiting helps, on this connection or on another.
_UNREACHABLE = (RedisConnectionError, RedisTimeoutError, OSError, RedisClusterException, ClusterError)
_CHANGING = (ReadOnlyError, ClusterDownError, AskError, TryAgainError)
# What a server says while it cannot take writes; the words are Redis' and Valkey's own.
_BUSY_WORDS = ("OOM", "BUSY", "NOREPLICAS", "MISCONF", "UNBLOCKED")
_FORBIDDEN_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")
# Producers in any language may send bytes that are no UTF-8: they come as lone surrogates, and go back as they were.
_TEXT: dict[str, Any] = {"decode_responses": True, "encoding_errors": "surrogateescape"}

ERRORS = (RedisError, *_UNREACHABLE)
"""Everything that a call of a client may raise."""


class Cluster:
    """Commands for the node that has their key. What a failure teaches of the nodes is learnt before it is raised."""

    def __init__(self, address: RedisAddress, **options: Any) -> None:
        self._address = address
        self._options = options
        self._client = self._connect()

    async def execute(self, key: str, *parts: str | int | float) -> Any:
        client = self._client
        await _initialize(client)
        node = client.nodes_manager.get_node_from_slot(client.keyslot(key))
        try:
            return await node.execute_command(*parts)
        except MovedError as error:
            await client.nodes_manager.move_slot(error)
            raise
        except (RedisConnectionError, RedisTimeoutError, OSError, ClusterDownError):
            await self._ask_again(client, node.name)
            raise

    async def everywhere(self, *parts: str | int | float) -> list[Any]:
        """The same on every master."""
        await _initialize(self._client)
        return [await node.execute_command(*parts) for node in self._client.get_primaries()]

    async def aclose(self) -> None:
        await _close(self._client)

    def _connect(self) -> aioredis.RedisCluster:
        nodes = [ClusterNode(host, port) for host, port in self._address.hosts]
        # One namespace is one slot: slots that nobody serves are not our business.
        return aioredis.RedisCluster(startup_nodes=nodes, require_full_coverage=False, **self._options)

    async def _ask_again(self, client: aioredis.RedisCluster, failed: str) -> None:
        try:
            await client.nodes_manager.initialize(last_failed_node_name=failed)
        except (*ERRORS, IndexError):
            # No node that we know answers. Those of the URL may be names of new ones.
            if self._client is client:
                self._client = self._connect()
                await _close(client)


Client: TypeAlias = aioredis.Redis | Cluster


def open_clients(address: RedisAddress | None) -> tuple[Client, Client]:
    """One client for commands and one for blocking waits; None is a fakeredis of their own."""
    if address is None:
        import fakeredis

        server = fakeredis.FakeServer()
        options: dict[str, Any] = {"server": server, "protocol": 2, **_TEXT}
        return fakeredis.FakeAsyncRedis(**options), fakeredis.FakeAsyncRedis(**options)
    return _open(address, timeout_s=_SCRIPT_TIMEOUT_S), _open(address, timeout_s=None)


async def execute(client: Client, key: str | None, *parts: str | int | float) -> Any:
    """Send a command once, to the node that has `key`."""
    if isinstance(client, Cluster):
        return await client.execute(key, *parts) if key is not None else (await client.everywhere(*parts))[0]
    try:
        return await client.execute_command(*parts)  # type: ignore[no-untyped-call]
    except ReadOnlyError:
        # This server was the master once. A new connection finds the one that is.
        await client.connection_pool.disconnect(inuse_connections=False)
        raise
    except AskError as error:
        raise RedisError("it is one node of a cluster; write redis+cluster:// or rediss+cluster://") from error


async def run_script(
    client: Client, text: str, sha: str, keys: Sequence[str], args: Sequence[str | int | float]
) -> Any:
    """Run a Lua script on the node that has its first key."""
    try:
        return await execute(client, keys[0], "EVALSHA", sha, len(keys), *keys, *args)
    except NoScriptError:
        # A new server, or one that forgot. EVAL runs the script and makes it known.
        return await execute(client, keys[0], "EVAL", text, len(keys), *keys, *args)


async def masters_info(client: Client) -> list[dict[str, str]]:
    """What each master says of itself: INFO, or where this user may not ask for it, its version alone."""
    replies: list[dict[str, object]]
    try:
        replies = await _everywhere(client, "INFO")
    except NoPermissionError:
        # HELLO is open to every user.
        replies = [_version_of(hello) for hello in await _everywhere(client, "HELLO")]
    return [{name: str(value) for name, value in reply.items()} for reply in replies]


async def known_services(address: RedisAddress) -> set[str] | None:
    """The names of the masters that the Sentinels watch; None when none of the Sentinels answers.

    Raises AuthenticationError when the first one that answers refuses the login.
    """
    for host, port in address.hosts:
        sentinel = aioredis.Redis(host=host, port=port, **_sentinel_options(address))
        try:
            return {str(name) for name in await sentinel.sentinel_masters()}
        except (AuthenticationError, NoPermissionError):
            raise
        except ERRORS:
            continue
        finally:
            await sentinel.aclose()
    return None


async def wants_certificate(address: RedisAddress) -> bool:
    """Whether the server hangs up on a TLS client that shows no certificate.

    It says so only after the handshake, and resets the connection where a command came before its word. So none is sent
    here. The server's own certificate is not looked at: it learns nothing from us.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = address.hosts[0]
    try:
        async with asyncio.timeout(_SENTINEL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                await reader.read(1)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except ssl.SSLError as error:
        return names_missing_certificate(error)
    except (OSError, TimeoutError):
        return False
    return False


def names_missing_certificate(error: ssl.SSLError) -> bool:
    return "CERTIFICATE_REQUIRED" in str(error) or "HANDSHAKE_FAILURE" in str(error)


def passes(error: BaseException) -> bool:
    """Whether the server is gone or changing places: the same call may work soon."""
    return isinstance(error, (*_UNREACHABLE, *_CHANGING)) and not refuses_login(error)


def is_busy(error: BaseException) -> bool:
    """Whether the server is there and cannot take this now."""
    return isinstance(error, OutOfMemoryError) or reason(error).removeprefix("-").startswith(_BUSY_WORDS)


def refuses_login(error: BaseException) -> bool:
    return any(isinstance(cause, AuthenticationError) for cause in _causes(error))


def forbids(error: BaseException) -> bool:
    """Whether this user lacks a permission, also in the words that a script fails with."""
    return any(
        isinstance(cause, NoPermissionError) or str(cause).startswith(_FORBIDDEN_IN_SCRIPT) for cause in _causes(error)
    )


def names_no_master(error: BaseException) -> bool:
    return isinstance(error, MasterNotFoundError)


def is_no_cluster(error: BaseException) -> bool:
    return "Cluster mode is not enabled" in str(error)


def tls_trouble(error: BaseException) -> ssl.SSLError | None:
    return next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)


def reason(error: BaseException) -> str:
    """The server's or the system's own words, in one line."""
    if isinstance(error, MasterNotFoundError):
        return "the Sentinels name no master, or do not answer"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open(address: RedisAddress, *, timeout_s: float | None) -> Client:
    options: dict[str, Any] = {
        **_common(address),
        "username": address.username,
        "password": address.password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
    }
    if address.kind == "cluster":
        return Cluster(address, **options)
    options["db"] = address.db
    if address.kind == "sentinel":
        manager = Sentinel(address.hosts, sentinel_kwargs=_sentinel_options(address))  # type: ignore[no-untyped-call]
        client: _MasterClient = manager.master_for(address.service, redis_class=_MasterClient, **options)
        client.manager = manager
        return client
    if address.path:
        del options["ssl"]
        return aioredis.Redis(unix_socket_path=address.path, **options)
    ((host, port),) = address.hosts
    return aioredis.Redis(host=host, port=port, **options)


def _common(address: RedisAddress) -> dict[str, Any]:
    retry = Retry(NoBackoff(), 0)
    return {"protocol": 2, "retry": retry, **_TEXT, "ssl": address.secure, **address.tls}


def _sentinel_options(address: RedisAddress) -> dict[str, Any]:
    return {
        **_common(address),
        "username": address.sentinel_username,
        "password": address.sentinel_password,
        "socket_timeout": _SENTINEL_TIMEOUT_S,
        "socket_connect_timeout": _SENTINEL_TIMEOUT_S,
    }


class _MasterClient(aioredis.Redis):
    """A client of the present master, which also closes what asked the Sentinels for it."""

    manager: Sentinel

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.manager.aclose()


async def _everywhere(client: Client, *parts: str) -> list[Any]:
    return await client.everywhere(*parts) if isinstance(client, Cluster) else [await execute(client, None, *parts)]


async def _initialize(client: aioredis.RedisCluster) -> None:
    try:
        await client.initialize()
    except IndexError:
        raise ClusterDownError("no node serves any slot") from None


async def _close(client: aioredis.RedisCluster) -> None:
    await client.aclose()
    # What was opened for an initialization that failed.
    await client.nodes_manager.aclose()
    await client.nodes_manager.aclose("startup_nodes")


def _version_of(hello: Any) -> dict[str, object]:
    pairs = hello if isinstance(hello, dict) else dict(zip(hello[::2], hello[1::2], strict=False))
    server = "valkey" if pairs.get("server") == "valkey" else "redis"
    return {f"{server}_version": pairs.get("version", ""), "redis_mode": pairs.get("mode", "")}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
