"""The one place that speaks to Redis (7.0 and newer), Valkey (7.2 and newer), or fakeredis.

Nothing is sent twice behind our back: redis-py's own retries are off, on one server, behind Sentinels and in a cluster,
since they double commands whose reply was lost. Every script here is idempotent, and the retry around it is ours.
Blocking waits have a client of their own: they pin their connection. RESP2 on purpose: fakeredis answers RESP3 wrongly
inside Lua.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import anyio
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from . import redis_clients as clients
from .errors import ConfigurationError, Overloaded
from .failpoints import afailpoint
from .redis_address import RedisAddress, parse_redis_url

KEY_VERSION = "2"
FAKE_URL = "fake://"
_log = logging.getLogger("embedmill.redis")
_INCLUDE = "-- include:"
_SILENCE_S = 5.0
_FLOORS = {"Redis": (7, 0), "Valkey": (7, 2)}
_CERTIFICATE_ADVICE = "it wants a certificate from us; add ssl_certfile=FILE&ssl_keyfile=FILE to the URL"
_ACL_ADVICE = "docs/operations.md has the ACL rule that its user needs"
# OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_WRONG_NAME = (62, 64)


def key_prefix(namespace: str) -> str:
    """Every key of one namespace starts with this. The braces put all of them into one cluster slot."""
    return f"{{embedmill:{KEY_VERSION}:{namespace}}}"


class Unreachable(ConfigurationError):
    """No server answered, for `reason`. It may be there later: a service waits for it, a command ends."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"cannot reach Redis at {place}: {reason}; is it running, and is the URL right?")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script. Its first key decides where it runs in a cluster."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest())


class Connection:
    """Two clients on one server, and the scripts.

    retry_for_s: how long an unreachable server is waited for; embedded: it is a child of ours, and does not come back.
    """

    def __init__(self, url: str, *, retry_for_s: float = 30.0, embedded: bool = False) -> None:
        self.url = url
        self.embedded = embedded
        self._address = None if url == FAKE_URL else parse_redis_url(url)
        self._retry_for_s = retry_for_s
        self._hurried = False
        self._under_way: set[anyio.CancelScope] = set()
        self._scripts: dict[str, Script] = {}
        self._commands, self._blocking = clients.open_clients(self._address)

    @property
    def shown(self) -> str:
        """The URL without its passwords."""
        return FAKE_URL if self._address is None else self._address.shown

    async def script(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Run `FOLDER/scripts/NAME.lua`, `name` being `FOLDER/NAME`.

        Raises Overloaded when the server stays away longer than `retry_for_s`.
        """
        if name not in self._scripts:
            self._scripts[name] = Script(script_text(name))
        script = self._scripts[name]

        async def call() -> Any:
            await afailpoint(f"redis.{name}")
            reply = await clients.run_script(self._commands, script.text, script.sha, keys, args)
            await afailpoint(f"redis.{name}.reply")
            return reply

        return await self._patiently(call)

    async def command(self, *parts: str | int | float) -> Any:
        """One idempotent command. What has no key runs on every master of a cluster; the reply is the first one's."""
        key = _key_of(parts)
        return await self._patiently(clients.execute, self._commands, key, *parts)

    async def wait_for_entry(self, stream: str, last_id: str, *, timeout_s: float, most: int = 1000) -> str:
        """Block until `stream` has an entry after `last_id`, at most `timeout_s`; the newest id seen, of `most` entries.

        Changes no state, so cancelling it loses nothing. Raises ConfigurationError when this user may not read it.
        """
        reply: Any = None
        block_ms = max(1, int(timeout_s * 1000))
        parts = ("XREAD", "COUNT", most, "BLOCK", block_ms, "STREAMS", stream, last_id)
        try:
            # A connection that has gone silent would be waited for without end.
            with anyio.move_on_after(timeout_s + _SILENCE_S):
                reply = await clients.execute(self._blocking, stream, *parts)
        except clients.ERRORS as error:
            if clients.forbids(error):
                raise self._refusal(error) from error
            await anyio.sleep(min(1.0, timeout_s))
        return str(reply[0][1][-1][0]) if reply else last_id

    def give_up_after(self, seconds: float) -> None:
        """We are about to end: from now on, calls wait at most so long for an unreachable server, also those under way."""
        self._hurried = True
        self._retry_for_s = min(self._retry_for_s, seconds)
        deadline = anyio.current_time() + self._retry_for_s
        for scope in self._under_way:
            scope.deadline = min(scope.deadline, deadline)

    async def check(self) -> dict[str, str]:
        """The server's `INFO`, in short; without `maxmemory_policy` and `aof_enabled` where this user may not see it.

        Raises Unreachable when nothing answers, ConfigurationError when the server cannot be used at all.
        """
        if self._address is None:
            return {}
        try:
            found = await clients.masters_info(self._commands)
        except clients.ERRORS as error:
            raise await self._unusable(error, self._address) from error
        for info in found:
            self._require(info, self._address)
        if "maxmemory_policy" not in found[0]:
            _log.warning("this user may not ask Redis at %s for INFO: whether it keeps its keys is unknown", self.shown)
        return _worst(found)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await self._commands.aclose()
            await self._blocking.aclose()

    async def _patiently(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        attempts = AsyncRetrying(
            sleep=anyio.sleep,
            retry=retry_if_exception(clients.passes),
            wait=wait_random_exponential(multiplier=0.02, max=1.0),
            stop=stop_after_delay(self._retry_for_s),
            reraise=True,
        )
        with anyio.CancelScope() as scope:
            if self._hurried:
                scope.deadline = anyio.current_time() + self._retry_for_s
            self._under_way.add(scope)
            try:
                return await attempts(call, *args)
            except clients.ERRORS as error:
                raise self._refusal(error) from error
            finally:
                self._under_way.discard(scope)
        raise Overloaded(f"Redis at {self.shown} did not answer in the time that was left")

    def _refusal(self, error: Exception) -> ConfigurationError | Overloaded:
        """What a call that got no answer ends with."""
        if clients.passes(error):
            if self.embedded:
                return Overloaded("the embedded queue server is gone: run the same command again")
            return Overloaded(f"Redis at {self.shown} does not answer: {clients.reason(error)}")
        if clients.is_busy(error):
            return Overloaded(f"Redis at {self.shown} cannot take this now: {clients.reason(error)}")
        rule = f"; {_ACL_ADVICE}" if clients.forbids(error) else ""
        return ConfigurationError(f"Redis at {self.shown} refuses: {clients.reason(error)}{rule}")

    async def _unusable(self, error: Exception, address: RedisAddress) -> ConfigurationError:
        """Why a service cannot start, or cannot yet."""
        tls = await _tls_trouble(error, address)
        if tls:
            return ConfigurationError(f"no TLS with Redis at {self.shown}: {tls}")
        if clients.refuses_login(error):
            return ConfigurationError(
                f"Redis at {self.shown} refuses the login: {clients.reason(error)}; the URL has it, as in"
                " redis://USER:PASSWORD@HOST:6379/0, with % and any of /?#@: in it percent-encoded"
            )
        if clients.is_no_cluster(error):
            return ConfigurationError(f"Redis at {self.shown} is no cluster: write redis:// or rediss://")
        if clients.names_no_master(error):
            return await self._sentinel_trouble(error, address)
        if clients.passes(error) or clients.is_busy(error):
            return Unreachable(self.shown, clients.reason(error) + _tls_hint(error, secure=address.secure))
        return ConfigurationError(str(self._refusal(error)))

    async def _sentinel_trouble(self, error: Exception, address: RedisAddress) -> ConfigurationError:
        try:
            services = await clients.known_services(address)
        except clients.ERRORS as refusal:
            return ConfigurationError(
                f"a Sentinel of {self.shown} refuses: {clients.reason(refusal)};"
                " its login is ?sentinel_username=...&sentinel_password=..."
            )
        if services is not None and address.service not in services:
            names = ", ".join(sorted(services)) or "no master at all"
            return ConfigurationError(f"the Sentinels of {self.shown} know no {address.service!r}, but {names}")
        return Unreachable(self.shown, clients.reason(error))

    def _require(self, info: Mapping[str, str], address: RedisAddress) -> None:
        product = "Valkey" if info.get("valkey_version") else "Redis"
        version = info.get("valkey_version") or info.get("redis_version", "")
        floor = _FLOORS[product]
        if _parts(version) < floor:
            raise ConfigurationError(
                f"Redis at {self.shown} is {product} {version}, which is too old: Redis 7.0 or Valkey 7.2 is needed"
            )
        mode = info.get("redis_mode") or info.get("server_mode")
        if mode == "sentinel":
            raise ConfigurationError(
                f"{self.shown} is a Sentinel: write redis+sentinel://HOST:26379/SERVICE, with the name of its master"
            )
        if mode == "cluster" and address.kind != "cluster":
            raise ConfigurationError(f"Redis at {self.shown} is a cluster: write redis+cluster:// or rediss+cluster://")


def script_text(name: str) -> str:
    """The script with those put before it that its `-- include:` line names."""
    folder, _, stem = name.partition("/")
    scripts = resources.files(folder).joinpath("scripts")
    text = scripts.joinpath(f"{stem}.lua").read_text(encoding="utf-8")
    included = next((line for line in text.splitlines() if line.startswith(_INCLUDE)), _INCLUDE)
    parts = [scripts.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in included[len(_INCLUDE) :].split()]
    return "\n".join([*parts, text])


def _key_of(parts: Sequence[str | int | float]) -> str | None:
    """The key by which a command finds its node: the second word, but for those that name their keys after STREAMS."""
    if len(parts) < 2:
        return None
    return str(parts[parts.index("STREAMS") + 1] if "STREAMS" in parts else parts[1])


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _worst(found: Sequence[dict[str, str]]) -> dict[str, str]:
    """One INFO for all masters: that of the first, with the settings of the one that may lose most."""
    evicting = (
        info["maxmemory_policy"] for info in found if info.get("maxmemory_policy", "noeviction") != "noeviction"
    )
    forgetful = (info["aof_enabled"] for info in found if info.get("aof_enabled") == "0")
    worst = {"maxmemory_policy": next(evicting, None), "aof_enabled": next(forgetful, None)}
    return found[0] | {name: value for name, value in worst.items() if value is not None}


def _tls_hint(error: Exception, *, secure: bool) -> str:
    """A server that does not expect TLS waits for more, and one that does expect it hangs up."""
    text = clients.reason(error)
    if secure and text.startswith("Timeout connecting"):
        return "; if it does not speak TLS, write redis instead of rediss"
    if not secure and ("Connection closed by server" in text or "Connection reset by peer" in text):
        return "; if it speaks TLS, write rediss instead of redis"
    return ""


async def _tls_trouble(error: Exception, address: RedisAddress) -> str:
    """What to do about TLS; empty where TLS is not the trouble."""
    tls = clients.tls_trouble(error)
    if tls is not None:
        return _tls_advice(tls)
    hung_up = address.secure and "ssl_certfile" not in address.tls and clients.passes(error)
    return _CERTIFICATE_ADVICE if hung_up and await clients.wants_certificate(address) else ""


def _tls_advice(error: ssl.SSLError) -> str:
    text = clients.reason(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _WRONG_NAME:
            return f"{error.verify_message}; use a name that is in its certificate, or add ?ssl_check_hostname=false"
        return f"its certificate is not trusted ({error.verify_message}); name its authority with ?ssl_ca_certs=FILE"
    if clients.names_missing_certificate(error):
        return _CERTIFICATE_ADVICE
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return "it does not speak TLS; write redis instead of rediss in front of ://"
    return text
