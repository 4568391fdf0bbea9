"""A provider to rehearse against: Jina's embeddings endpoint as its published contract describes it, with faults.

Written from the contract and not from our client, so that the two check each other. The same text, model and dimensions
always give the same unit vector; token counts come from a pretend tokenizer that is stable, too. Limits are sliding logs,
the strictest reading of "per minute"; refused requests do not count.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from embedmill.errors import ConfigurationError

KEY_MANAGER = "https://jina.ai/api-dashboard/key-manager"
_MAX_INPUTS = 512
_BURST = 5
_PIECE = re.compile(r"\w+|[^\w\s]")
_RETRIEVAL = {"retrieval.query", "retrieval.passage"}
_CODE = {
    f"{kind}.{side}"
    for kind in ("nl2code", "qa", "code2code", "code2nl", "code2completion")
    for side in ("query", "passage")
}


@dataclass(frozen=True, slots=True)
class _Contract:
    """One model of the published description. tasks empty: the field is not declared; dimensions 0: likewise."""

    native: int
    dimensions: int
    max_tokens: int
    tasks: frozenset[str]
    late_chunking: bool = False


_V5_TASKS = frozenset(_RETRIEVAL | {"text-matching", "clustering", "classification"})
_CONTRACTS = {
    **{
        f"jina-embeddings-v2-base-{one}": _Contract(768, 0, 8192, frozenset())
        for one in ("en", "zh", "de", "es", "code")
    },
    "jina-embeddings-v3": _Contract(
        1024, 1024, 8192, frozenset(_RETRIEVAL | {"text-matching", "classification", "separation"}), late_chunking=True
    ),
    "jina-embeddings-v4": _Contract(
        2048, 2048, 32768, frozenset(_RETRIEVAL | {"text-matching", "code.query", "code.passage"}), late_chunking=True
    ),
    "jina-embeddings-v5-text-small": _Contract(1024, 1024, 32768, _V5_TASKS),
    "jina-embeddings-v5-text-nano": _Contract(768, 1024, 8192, _V5_TASKS),
    "jina-code-embeddings-0.5b": _Contract(896, 896, 32768, frozenset(_CODE)),
    "jina-code-embeddings-1.5b": _Contract(1536, 1536, 32768, frozenset(_CODE)),
}


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """How the simulator behaves.

    rpm, tpm, concurrency: limits, 0 for none; window_s: how long a "minute" is; latency_ms, jitter_ms: mean and standard
    deviation of the time that an answer takes; no_balance_after: tokens after which the account is empty, 0 for never;
    reject_marker: a text that holds it is refused. All others are probabilities per request: answers of 500 and 503, a
    burst of 429, a connection dropped before or after executing, a body cut in its middle, a missing row, a row of NaN,
    an index given twice, rows in another order. `seed` makes a sequence of faults repeatable.
    """

    rpm: int = 0
    tpm: int = 0
    concurrency: int = 0
    window_s: float = 60.0
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    seed: int = 0
    bad_key: bool = False
    no_balance_after: int = 0
    reject_marker: str = ""
    error_500: float = 0.0
    error_503: float = 0.0
    burst_429: float = 0.0
    drop_before: float = 0.0
    drop_after: float = 0.0
    truncated_body: float = 0.0
    missing_row: float = 0.0
    nan_row: float = 0.0
    duplicate_index: float = 0.0
    shuffle: float = 0.0


Fault = Literal[
    "error_500",
    "error_503",
    "burst_429",
    "drop_before",
    "drop_after",
    "truncated_body",
    "missing_row",
    "nan_row",
    "duplicate_index",
]
_FAULTS: tuple[Fault, ...] = (
    "error_500",
    "error_503",
    "burst_429",
    "drop_before",
    "drop_after",
    "truncated_body",
    "missing_row",
    "nan_row",
    "duplicate_index",
)


class _Refused(Exception):
    """An answer other than 200, as the contract words it."""

    def __init__(self, status: int, code: str | None, detail: str, **more: object) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = code or str(status)
        self.body = {"detail": detail, **({"code": code} if code else {}), **more, "request_id": uuid.uuid4().hex}


@dataclass(frozen=True, slots=True)
class _Request:
    """A body that keeps the contract. tokens: per text, after truncation."""

    model: str
    texts: list[str]
    dimensions: int
    encoding: str
    tokens: list[int]

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)


class ProviderSimulator:
    """The endpoint's state: limits, faults and counters. One per server, used from one event loop."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._random = random.Random(rehearsal.seed)
        self._admitted: deque[tuple[float, int]] = deque()
        self._in_flight = 0
        self._burst_left = 0
        self._statuses: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._embedded: Counter[bytes] = Counter()
        self._requests = self._billed = self._max_in_flight = self._peak_requests = self._peak_tokens = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/stats", self._stats)
        return app

    def stats(self) -> dict[str, object]:
        """Counters since the start. peak_window_*: the most that any window held; max_per_text: payments for one text."""
        return {
            "requests": self._requests,
            "statuses": dict(self._statuses),
            "ok": self._statuses["200"],
            "refusals": dict(self._refusals),
            "faults": dict(self._faults),
            "tokens_billed": self._billed,
            "texts_embedded": sum(self._embedded.values()),
            "distinct_texts": len(self._embedded),
            "max_per_text": max(self._embedded.values(), default=0),
            "max_concurrency": self._max_in_flight,
            "peak_window_requests": self._peak_requests,
            "peak_window_tokens": self._peak_tokens,
        }

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.json_response(self.stats())

    async def _embeddings(self, http: web.Request) -> web.StreamResponse:
        self._requests += 1
        try:
            self._check_account(http.headers)
            request = self._parse(await http.read())
            fault = self._draw_fault()
            self._check_limits(request)
        except _Refused as refused:
            self._statuses[str(refused.status)] += 1
            self._refusals[refused.kind] += 1
            return web.json_response(refused.body, status=refused.status)
        return await self._execute(http, request, fault=fault)

    def _check_account(self, headers: Mapping[str, str]) -> None:
        given = headers.get("Authorization", "")
        if not given:
            raise _Refused(
                401,
                "AUTH_MISSING_API_KEY",
                "Authentication required. Provide your API key via the Authorization header:"
                " 'Authorization: Bearer <api-key>'.",
            )
        if not given.startswith("Bearer ") or not given.removeprefix("Bearer ").strip():
            raise _Refused(
                401, "AUTH_INVALID_FORMAT", "Invalid authorization format. Use 'Authorization: Bearer <api-key>'."
            )
        if self._rehearsal.bad_key:
            raise _Refused(
                401,
                "AUTH_INVALID_API_KEY",
                f"Invalid API key. Verify your API key at {KEY_MANAGER} or generate a new one.",
            )
        if 0 < self._rehearsal.no_balance_after <= self._billed:
            raise _Refused(
                403,
                "AUTHZ_INSUFFICIENT_BALANCE",
                f"Insufficient account balance. Top up your account at {KEY_MANAGER}.",
            )

    def _parse(self, raw: bytes) -> _Request:
        try:
            body = json.loads(raw)
        except ValueError:
            raise _invalid("body", "JSON decode error", "json_invalid") from None
        if not isinstance(body, dict):
            raise _invalid("body", "Input should be a valid dictionary", "dict_type")
        model = body.get("model")
        if not isinstance(model, str) or model not in _CONTRACTS:
            known = ", ".join(_CONTRACTS)
            raise _Refused(400, "INPUT_MODEL_NOT_FOUND", f"Model '{model}' not found. Available models: {known}.")
        contract = _CONTRACTS[model]
        _check_fields(body, model=model, contract=contract)
        texts = _texts(body.get("input"), model=model)
        marker = self._rehearsal.reject_marker
        if marker and any(marker in text for text in texts):
            raise _invalid(f"body -> {model} -> input", "Input cannot be processed", "value_error")
        return _Request(
            model=model,
            texts=texts,
            dimensions=body.get("dimensions") or contract.native,
            encoding=body.get("embedding_type") or "float",
            tokens=_counted(texts, body, contract=contract),
        )

    def _draw_fault(self) -> Fault | None:
        if self._burst_left:
            self._burst_left -= 1
            return "burst_429"
        draw = self._random.random()
        for fault in _FAULTS:
            draw -= float(getattr(self._rehearsal, fault))
            if draw < 0:
                self._faults[fault] += 1
                self._burst_left = _BURST - 1 if fault == "burst_429" else 0
                if fault == "error_500":
                    raise _Refused(
                        500,
                        "INTERNAL_ERROR",
                        "An unexpected error occurred. If this persists, contact support with the request_id from this"
                        " response.",
                    )
                if fault == "error_503":
                    raise _Refused(
                        503,
                        "SERVICE_UNAVAILABLE",
                        "Service temporarily unavailable. Please retry with exponential backoff.",
                    )
                return fault
        return None

    def _check_limits(self, request: _Request) -> None:
        now = time.monotonic()
        while self._admitted and self._admitted[0][0] <= now - self._rehearsal.window_s:
            self._admitted.popleft()
        used = sum(tokens for _, tokens in self._admitted)
        limits, wanted = self._rehearsal, request.total_tokens
        if 0 < limits.concurrency <= self._in_flight:
            raise _Refused(
                429,
                "RATE_CONCURRENCY_LIMIT_EXCEEDED",
                f"Concurrency limit exceeded: {self._in_flight}/{limits.concurrency} concurrent requests."
                " Wait for pending requests to complete before sending new ones.",
            )
        if 0 < limits.rpm <= len(self._admitted):
            raise _Refused(
                429,
                "RATE_REQUEST_LIMIT_EXCEEDED",
                f"Request rate limit exceeded: {len(self._admitted)}/{limits.rpm} requests per minute."
                f" Reduce request frequency or upgrade your plan at {KEY_MANAGER}.",
            )
        if 0 < limits.tpm < used + wanted:
            raise _token_refusal(used + wanted, limits.tpm)
        self._admitted.append((now, wanted))
        self._peak_requests = max(self._peak_requests, len(self._admitted))
        self._peak_tokens = max(self._peak_tokens, used + wanted)

    async def _execute(self, http: web.Request, request: _Request, *, fault: Fault | None) -> web.StreamResponse:
        if fault == "burst_429":
            self._admitted.pop()
            return self._burst_refusal(request)
        if fault == "drop_before":
            return self._dropped(http)
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)
        try:
            await asyncio.sleep(
                max(0.0, self._random.gauss(self._rehearsal.latency_ms, self._rehearsal.jitter_ms)) / 1000
            )
            body = await asyncio.to_thread(_answer, request, fault, self._shuffle_seed())
            self._bill(request)
            if fault == "drop_after":
                return self._dropped(http)
            if fault == "truncated_body":
                return await self._truncated(http, body)
        finally:
            self._in_flight -= 1
        self._statuses["200"] += 1
        return web.Response(body=body, content_type="application/json")

    def _burst_refusal(self, request: _Request) -> web.Response:
        limit = self._rehearsal.tpm or 1_000_000
        refused = _token_refusal(limit + request.total_tokens, limit)
        self._statuses["429"] += 1
        self._refusals[refused.kind] += 1
        return web.json_response(refused.body, status=429)

    def _shuffle_seed(self) -> int | None:
        return self._random.getrandbits(32) if self._random.random() < self._rehearsal.shuffle else None

    def _bill(self, request: _Request) -> None:
        self._billed += request.total_tokens
        self._embedded.update(
            hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in request.texts
        )

    def _dropped(self, http: web.Request) -> web.Response:
        self._statuses["dropped"] += 1
        if http.transport is not None:
            http.transport.abort()
        return web.Response()

    async def _truncated(self, http: web.Request, body: bytes) -> web.StreamResponse:
        self._statuses["truncated"] += 1
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
        await response.prepare(http)
        await response.write(body[: len(body) // 2])
        if http.transport is not None:
            http.transport.close()
        return response


@asynccontextmanager
async def serve_rehearsal(
    rehearsal: Rehearsal, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[tuple[str, ProviderSimulator]]:
    """Serve while the body runs: the API base to give to a client (port 0 takes a free one), and the simulator.

    Raises ConfigurationError when the address cannot be had.
    """
    simulator = ProviderSimulator(rehearsal)
    runner = web.AppRunner(simulator.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        shown_host = f"[{host}]" if ":" in host else host
        yield f"http://{shown_host}:{runner.addresses[0][1]}/v1", simulator
    finally:
        await runner.cleanup()


def pretend_tokens(text: str) -> int:
    """What the pretend tokenizer counts: two framing tokens, and one for every four bytes begun of each word."""
    return 2 + sum((len(piece.encode("utf-8", "replace")) + 3) // 4 for piece in _PIECE.findall(text))


def pretend_vector(text: str, *, model: str, dimensions: int) -> NDArray[np.float32]:
    """(dimensions,) float32 of length one, decided by the arguments alone."""
    seed = hashlib.blake2b(f"{model}\0{dimensions}\0{text}".encode("utf-8", "replace"), digest_size=16).digest()
    vector = np.random.default_rng(int.from_bytes(seed)).standard_normal(dimensions, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def _check_fields(body: Mapping[str, Any], *, model: str, contract: _Contract) -> None:
    place = f"body -> {model}"
    task, dimensions = body.get("task"), body.get("dimensions")
    if task is not None and contract.tasks and task not in contract.tasks:
        allowed = ", ".join(f"'{one}'" for one in sorted(contract.tasks))
        raise _invalid(f"{place} -> task", f"Input should be {allowed}", "literal_error", task)
    if dimensions is not None and contract.dimensions:
        if not isinstance(dimensions, int) or isinstance(dimensions, bool):
            raise _invalid(f"{place} -> dimensions", "Input should be a valid integer", "int_type", dimensions)
        if not 0 < dimensions <= contract.dimensions:
            said = f"Input should be greater than 0 and less than or equal to {contract.dimensions}"
            raise _invalid(f"{place} -> dimensions", said, "less_than_equal", dimensions)
    elif dimensions is not None:
        raise _invalid(f"{place} -> dimensions", "Extra inputs are not permitted", "extra_forbidden", dimensions)
    if body.get("embedding_type", "float") not in {"float", "base64", None}:
        raise _invalid(f"{place} -> embedding_type", "The rehearsal has 'float' and 'base64' only", "literal_error")
    for name in ("late_chunking", "truncate", "normalized"):
        if not isinstance(body.get(name), bool | None):
            raise _invalid(f"{place} -> {name}", "Input should be a valid boolean", "bool_type", body[name])


def _texts(value: object, *, model: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise _invalid(f"body -> {model} -> input", "List should have at least 1 item", "too_short")
    if len(items) > _MAX_INPUTS:
        raise _invalid(f"body -> {model}", f"Each input list can contain at most {_MAX_INPUTS} items.", "value_error")
    texts = [one.get("text") if isinstance(one, dict) else one for one in items]
    if not all(isinstance(text, str) for text in texts):
        raise _invalid(f"body -> {model} -> input", "Input should be a valid string", "string_type")
    return [str(text) for text in texts]


def _counted(texts: list[str], body: Mapping[str, Any], *, contract: _Contract) -> list[int]:
    counts = [pretend_tokens(text) for text in texts]
    late = bool(body.get("late_chunking")) and contract.late_chunking
    longest = sum(counts) if late else max(counts)
    if longest <= contract.max_tokens:
        return counts
    if not body.get("truncate"):
        raise _Refused(
            400,
            "INPUT_TOKEN_LIMIT_EXCEEDED",
            f"Input text exceeds the model's maximum of {contract.max_tokens} tokens. Use 'truncate: true' to"
            " automatically truncate, or split into smaller chunks.",
        )
    return [min(count, contract.max_tokens) for count in counts]


def _invalid(field: str, message: str, kind: str, value: object = None) -> _Refused:
    place = field.replace("body -> ", "", 1)
    detail = (
        f"[RID: {uuid.uuid4().hex}] Validation error: 'body -> {place}' {message}. Field errors: {field}: {message}"
    )
    return _Refused(422, None, detail, errors=[{"field": field, "message": message, "type": kind, "input": value}])


def _token_refusal(current: int, limit: int) -> _Refused:
    return _Refused(
        429,
        "RATE_TOKEN_LIMIT_EXCEEDED",
        f"Token rate limit exceeded: {current:,}/{limit:,} tokens per minute."
        f" Reduce batch sizes or upgrade your plan at {KEY_MANAGER}.",
    )


def _answer(request: _Request, fault: Fault | None, shuffle_seed: int | None) -> bytes:
    vectors = [pretend_vector(text, model=request.model, dimensions=request.dimensions) for text in request.texts]
    if fault == "nan_row":
        vectors[-1] = np.full_like(vectors[-1], np.nan)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding=request.encoding)}
        for index, vector in enumerate(vectors)
    ]
    if fault == "missing_row":
        data.pop()
    if fault == "duplicate_index":
        data[-1]["index"] = 0 if len(data) > 1 else 1
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(data)
    usage = {"total_tokens": request.total_tokens, "prompt_tokens": request.total_tokens}
    return json.dumps({"model": request.model, "object": "list", "usage": usage, "data": data}).encode()


def _encoded(vector: NDArray[np.float32], *, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
