"""The one place that speaks HTTP as a client: one request is one attempt, and is never sent twice.

Whether a failed request may have been executed decides what its tokens cost, so transport failures are told apart by
that: a connection that never stood is `Overloaded`, one that was lost after sending is `OutcomeUnknown`.
"""

from __future__ import annotations

import io
import ipaddress
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp
import anyio

from embedmill.errors import ConfigurationError, OutcomeUnknown, Overloaded

ATTEMPT_TIMEOUT_S = 120.0
_EXCERPT_CHARS = 300
_WRITTEN_AT_ONCE_BYTES = 2**20
# An answer of 512 vectors is some megabytes: with aiohttp's 64 KiB, reading it would stop and start dozens of times.
_READ_BUFFER_BYTES = 2**22
_LONGEST_LINE_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, read to its end. excerpt: the start of a failure's body, for people."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    excerpt: str = ""

    @property
    def content(self) -> object:
        """The parsed JSON, None where the body is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class AnswerRefused(Exception):
    """What was to be read line by line is another answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class HttpClient:
    """One session on one API. `secret`, which a request may replace by its own, never appears in an error.

    Connections are not limited here: the budget is the only queue, and a second one would count waiting as sending.
    """

    def __init__(self, api_base: str, *, secret: str = "", attempt_timeout_s: float = ATTEMPT_TIMEOUT_S) -> None:
        self.api_base = check_api_base(api_base)
        self._secret = secret
        self._hidden = {secret} - {""}
        self._attempt_timeout_s = attempt_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def post_json(self, path: str, body: Mapping[str, object], *, secret: str = "") -> Answer:
        """POST `body`, whatever the status.

        Raises Overloaded (not executed), OutcomeUnknown (perhaps executed), ConfigurationError (an untrusted certificate).
        """
        url = f"{self.api_base}/{path}"
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        with self._told_apart(), anyio.fail_after(self._attempt_timeout_s):
            return await self._exchange(url, data, secret)

    async def get(self, path: str) -> Answer:
        """GET `path`, whatever the status. Raises like `post_json`."""
        return await self._ask("GET", path)

    async def delete(self, path: str) -> Answer:
        """DELETE `path`, whatever the status. Raises like `post_json`."""
        return await self._ask("DELETE", path)

    async def _ask(self, method: str, path: str) -> Answer:
        with self._told_apart(), anyio.fail_after(self._attempt_timeout_s):
            async with self._opened().request(method, f"{self.api_base}/{path}", allow_redirects=False) as response:
                return self._answer(response.status, dict(response.headers), await response.read())

    async def lines(self, path: str) -> AsyncGenerator[bytes, None]:
        """GET what is long, line by line, without holding it. Raises AnswerRefused for another status than 200, and like
        `post_json` where it breaks off."""
        with self._told_apart():
            async with self._opened().get(f"{self.api_base}/{path}", allow_redirects=False) as response:
                if response.status != 200:
                    raise AnswerRefused(self._answer(response.status, dict(response.headers), await response.read()))
                rest = b""
                async for piece in response.content.iter_any():
                    *whole, rest = (rest + piece).split(b"\n")
                    for line in filter(None, whole):
                        yield line
                    if len(rest) > _LONGEST_LINE_BYTES:
                        raise OutcomeUnknown(f"{self.api_base} sends a line without an end")
                if rest.strip():
                    yield rest

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Transport failures as errors of ours, by whether the request may have been executed."""
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as error:
            raise ConfigurationError(f"the certificate of {self.api_base} is not trusted: {error}") from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Overloaded(f"cannot connect to {self.api_base}: {_reason(error)}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise OutcomeUnknown(
                f"{self.api_base} did not answer after the request was sent: {_reason(error)}"
            ) from error

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                await session.close()

    async def _exchange(self, url: str, data: bytes, secret: str) -> Answer:
        # aiohttp writes bytes at once, and warns of that where they are many; a file it writes piece by piece.
        content = data if len(data) <= _WRITTEN_AT_ONCE_BYTES else io.BytesIO(data)
        self._hidden |= {secret} - {""}
        headers = {"Authorization": f"Bearer {secret}"} if secret else None
        async with self._opened().post(url, data=content, headers=headers, allow_redirects=False) as response:
            body = await response.read()
            return self._answer(response.status, dict(response.headers), body)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {
                "Content-Type": "application/json",
                "Accept": "application/json",
                # Vectors hardly shrink, and inflating them would cost several times what decoding them does.
                "Accept-Encoding": "identity",
                "User-Agent": "embedmill",
            }
            if self._secret:
                headers["Authorization"] = f"Bearer {self._secret}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
                headers=headers,
                read_bufsize=_READ_BUFFER_BYTES,
                trust_env=not _is_loopback(self.api_base),
            )
        return self._session

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
        if status != 200:
            return Answer(status, headers, body, self._excerpt(body))
        # A page of a proxy. Whether the rest is the JSON that was asked for is the caller's to find out.
        if body[:16].lstrip()[:1] not in (b"{", b"["):
            raise OutcomeUnknown(f"{self.api_base} answered 200 with what is not JSON: {self._excerpt(body)!r}")
        return Answer(status, headers, body)

    def _excerpt(self, body: bytes) -> str:
        excerpt = " ".join(body[: 4 * _EXCERPT_CHARS].decode("utf-8", "replace").split())
        for secret in self._hidden:
            excerpt = excerpt.replace(secret, "***")
        return excerpt[:_EXCERPT_CHARS]


def check_api_base(url: str) -> str:
    """The URL without its last slash. Raises ConfigurationError that shows a good one."""
    good = "it looks like https://api.jina.ai/v1"
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 (reading it is what checks it)
    except ValueError as error:
        raise ConfigurationError(f"--api-base {url!r} is not a URL: {error}; {good}") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(f"--api-base {url!r} is not an http or https URL; {good}")
    if parts.username or parts.password:
        raise ConfigurationError(f"--api-base must not hold a user or password; {good}")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"--api-base {url!r} must end with its path, without ? or #; {good}")
    base = url.strip().rstrip("/")
    if base.endswith("/embeddings"):
        raise ConfigurationError(f"--api-base goes up to the version: {base.removesuffix('/embeddings')}")
    return base


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Seconds that `Retry-After` asks for (a number or an HTTP date), None without a readable one."""
    value = {name.lower(): text for name, text in headers.items()}.get("retry-after", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
