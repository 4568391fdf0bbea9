"""Jina's embeddings API: requests as its OpenAPI description fixes them, answers checked before anyone uses them.

Rows are placed by their `index`, never by their order. An answer that was paid for and cannot be used is
`OutcomeUnknown`: it may be asked for again, and its estimate is charged.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputRejected,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
)
from embedmill.models import EmbeddingType, find_model
from embedmill.token_estimates import TokenEstimator

from .http import ATTEMPT_TIMEOUT_S, Answer, HttpClient, retry_after_s

API_BASE = "https://api.jina.ai/v1"
MAX_INPUTS = 512
_MAX_REQUEST_TOKENS = 16_384
# A paced minute should hold a dozen requests, or the last one of a window weighs too much of the limit.
_REQUESTS_PER_MINUTE_OF_TOKENS = 12
# Estimates err; a late-chunking request over the limit fails as a whole.
_LATE_CHUNKING_SHARE = 0.9
_EVERY_BILL_UPTO, _LATER_EVERY = 64, 8
_OVERLOADED = frozenset({408, 409, 425, 500, 502, 503, 521, 522, 523})
_LIMIT_CODES = {
    "RATE_REQUEST_LIMIT_EXCEEDED": "requests",
    "RATE_TOKEN_LIMIT_EXCEEDED": "tokens",
    "RATE_CONCURRENCY_LIMIT_EXCEEDED": "concurrency",
    "RATE_IP_LIMIT_EXCEEDED": "address",
}
_LIMIT_WORDS = {"request rate": "requests", "token rate": "tokens", "concurrency": "concurrency", "ip rate": "address"}
_CURRENT_OF_ALLOWED = re.compile(r"exceeded: *\d[\d,]*/(\d[\d,]*) +(?:requests|tokens|concurrent)")
_FLOATS: np.dtype[Any] = np.dtype("<f4")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "base64": _FLOATS,
    "float": _FLOATS,
    "binary": np.dtype(np.int8),
    "ubinary": np.dtype(np.uint8),
}
_SETTINGS = frozenset({"model", "task", "dimensions", "embedding_type", "late_chunking", "truncate", "normalized"})


class JinaEmbedder:
    """One model of Jina's, with one key.

    task: overrides what is sent for documents, see `ProviderModel.tasks_by_role`; late_chunking: a document request is one
    document, whose passages know of each other; embedding_type: how vectors travel, and what they are, see `EmbeddingType`;
    normalized: None for unit length where the model leaves a choice; truncate: whether longer texts are cut or refused
    (None: cut, but with late chunking); tokens_per_minute: the key's limit, so that one request stays a small part of it;
    concurrency: requests in flight; revision: of the spec, where what answers is not Jina's own model.
    Raises ConfigurationError for a model, address or combination that cannot work; nothing is sent before.
    """

    def __init__(
        self,
        model: str,
        *,
        key: str,
        api_base: str = API_BASE,
        dimensions: int | None = None,
        task: str | None = None,
        late_chunking: bool = False,
        embedding_type: str = "base64",
        normalized: bool | None = None,
        truncate: bool | None = None,
        concurrency: int = 2,
        tokens_per_minute: int | None = None,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        revision: str = "",
    ) -> None:
        self._model = find_model(model)
        self._model.check_late_chunking(late_chunking)
        if late_chunking and truncate:
            raise ConfigurationError(
                "truncate would drop whole passages off the end of a late-chunking request: leave truncate out"
            )
        self._late_chunking = late_chunking
        self._truncate = truncate
        self._dimensions = self._model.check_dimensions(dimensions)
        self._embedding_type = self._model.check_embedding_type(embedding_type, dimensions=self._dimensions)
        self._normalized = self._model.check_normalized(normalized)
        document_task, query_task = self._model.tasks_by_role(task)
        self._tasks: dict[Role, str | None] = {"document": document_task, "query": query_task}
        self.estimator = TokenEstimator()
        self._answers = 0
        self._http = HttpClient(api_base, secret=_checked_key(key), attempt_timeout_s=attempt_timeout_s)
        self.spec = EmbedderSpec(
            model=model,
            dimensions=self._dimensions,
            revision=revision,
            max_input_tokens=self._model.max_input_tokens,
            options=self._options(document_task),
        )
        self.limits = BatchLimits(
            max_inputs=MAX_INPUTS,
            max_tokens=self._request_tokens(tokens_per_minute),
            padded=False,
            concurrency=concurrency,
        )

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        limit = self._model.max_input_tokens
        return [min(limit, math.ceil(tokens)) for tokens in self.estimator.estimate(texts)]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """See `Embedder.embed`. Raises ConfigurationError, too, when the provider does not know the model or the address."""
        answer = await self._http.post_json("embeddings", self.request_body(texts, role=role))
        if answer.status != 200:
            raise error_for(answer)
        embedding = parse_embedding(
            answer.body, rows=len(texts), dimensions=self._dimensions, embedding_type=self._embedding_type
        )
        self._learn(texts, embedding.billed_tokens)
        return embedding

    async def aclose(self) -> None:
        await self._http.aclose()

    def request_body(self, texts: Sequence[str], *, role: Role = "document") -> dict[str, object]:
        """Only the fields that this model's schema declares."""
        late_chunking = self._late_chunking and role == "document"
        wanted: dict[str, object] = {
            "task": self._tasks[role],
            "dimensions": self._dimensions,
            "late_chunking": late_chunking,
            "truncate": not late_chunking if self._truncate is None else self._truncate,
            "normalized": self._normalized,
            "embedding_type": self._embedding_type,
        }
        fields = {name: value for name, value in wanted.items() if name in self._model.fields and value is not None}
        return {"model": self._model.wire_name, "input": list(texts), **fields}

    def _options(self, task: str | None) -> dict[str, str | int | bool | None]:
        """Of what changes vectors, what is not at its default stands in no older fingerprint."""
        options: dict[str, str | int | bool | None] = {
            "task": task,
            "late_chunking": self._late_chunking,
            "truncate": not self._late_chunking if self._truncate is None else self._truncate,
        }
        if self._normalized is False:
            options["normalized"] = False
        if self._embedding_type in ("binary", "ubinary"):
            options["embedding_type"] = self._embedding_type
        return options

    def _learn(self, texts: Sequence[str], billed_tokens: int) -> None:
        """From every bill at first; later every eighth teaches enough, and counting characters costs time."""
        estimator = self.estimator
        self._answers += 1
        if estimator.bills >= _EVERY_BILL_UPTO and self._answers % _LATER_EVERY:
            return
        # What was cut was not billed whole.
        if max(map(len, texts)) < self._model.max_input_tokens:
            estimator.learn(texts, billed_tokens)

    def _request_tokens(self, tokens_per_minute: int | None) -> int:
        if self._late_chunking:
            return int(self._model.late_chunking_tokens * _LATE_CHUNKING_SHARE)
        paced = (tokens_per_minute or _MAX_REQUEST_TOKENS * _REQUESTS_PER_MINUTE_OF_TOKENS) // (
            _REQUESTS_PER_MINUTE_OF_TOKENS
        )
        return max(min(_MAX_REQUEST_TOKENS, paced), self._model.max_input_tokens)


def key_from_environment(environment: Mapping[str, str] | None = None) -> str:
    """The key in `JINA_API_KEY`, or in the file that `JINA_API_KEY_FILE` names. Raises ConfigurationError without one."""
    variables = os.environ if environment is None else environment
    key = variables.get("JINA_API_KEY", "").strip()
    file = variables.get("JINA_API_KEY_FILE", "").strip()
    if not key and file:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read the key file that JINA_API_KEY_FILE names: {error}") from error
    if not key:
        raise ConfigurationError(
            "no Jina API key: get one at https://jina.ai/api-dashboard/key-manager and set JINA_API_KEY to it"
        )
    return _checked_key(key)


class _Usage(msgspec.Struct):
    total_tokens: int


class _Item(msgspec.Struct):
    """embedding: what base64 stood for, or numbers."""

    index: int
    embedding: bytes | list[float]


class _Vectors(msgspec.Struct):
    data: list[_Item]
    usage: _Usage


_VECTORS = msgspec.json.Decoder(_Vectors)


def parse_embedding(body: bytes, *, rows: int, dimensions: int, embedding_type: EmbeddingType = "base64") -> Embedding:
    """The answer to `rows` texts; numbers are read where base64 was asked for, and the reverse.

    Raises OutcomeUnknown for anything that is not exactly that.
    """
    try:
        answer = _VECTORS.decode(body)
    except msgspec.MsgspecError as error:
        raise OutcomeUnknown(f"the answer is not what Jina's API promises: {error}") from error
    data, billed = answer.data, answer.usage.total_tokens
    if billed < 0:
        raise OutcomeUnknown(f"the answer says that {billed} tokens were billed")
    if len(data) != rows:
        raise OutcomeUnknown(f"the answer has {len(data)} vectors for {rows} texts")
    dtype = _DTYPES[embedding_type]
    per_column = 1 if dtype is _FLOATS else 8
    row_bytes = dimensions // per_column * dtype.itemsize
    placed: list[bytes | None] = [None] * rows
    for item in data:
        index, vector = item.index, item.embedding
        if isinstance(vector, list):
            vector = _packed(vector, dtype, index=index)
        if len(vector) != row_bytes:
            columns, odd = divmod(len(vector), dtype.itemsize)
            found = f"{len(vector)} bytes, not {dtype.name}" if odd else f"{columns * per_column} dimensions"
            raise OutcomeUnknown(f"vector {index} has {found} instead of {dimensions}")
        if not 0 <= index < rows or placed[index] is not None:
            raise OutcomeUnknown(f"the answer has a second or impossible `index` {index} for {rows} texts")
        placed[index] = vector
    # Joined into memory that may be written to.
    whole = bytearray().join(cast("list[bytes]", placed))
    vectors = np.frombuffer(whole, dtype).reshape(rows, row_bytes // dtype.itemsize)
    return Embedding(vectors=cast("NDArray[np.float32]", vectors), billed_tokens=billed)


def _packed(numbers: list[float], dtype: np.dtype[Any], *, index: int) -> bytes:
    vector = np.asarray(numbers)
    with np.errstate(over="ignore", invalid="ignore"):
        cast_to = vector.astype(dtype)
    if dtype is not _FLOATS and not np.array_equal(cast_to, vector):
        raise OutcomeUnknown(f"vector {index} has numbers that are not {dtype.name}")
    return cast_to.tobytes()


def error_for(answer: Answer) -> EmbedmillError:
    """What a status other than 200 means."""
    detail, code = _detail(answer)
    said = f"Jina answered {answer.status}: {detail}"
    error: EmbedmillError
    match answer.status:
        case 429:
            error = _rate_limited(said, code=code, headers=answer.headers)
        case 401:
            error = InvalidKey(f"{said} (set JINA_API_KEY to a valid key)")
        case 402 | 403:
            error = NoBalance(said)
        case 400 if code == "INPUT_MODEL_NOT_FOUND" or detail.startswith("Model '"):
            error = ConfigurationError(f"{said} (choose another --model)")
        case 422 if _concerns_settings(answer.content):
            error = ConfigurationError(f"{said} (check --task, --dimensions and --model)")
        case 400 | 413 | 422:
            error = InputRejected(said)
        case status if status in _OVERLOADED:
            error = Overloaded(said, retry_after_s=retry_after_s(answer.headers))
        # 504, 524 and their like: a gateway lost patience with a request that may still be running.
        case status if status >= 500:
            error = OutcomeUnknown(said, retry_after_s=retry_after_s(answer.headers))
        case _:
            error = ConfigurationError(f"{said} (is --api-base right?)")
    return error


def _checked_key(key: str) -> str:
    stripped = key.strip()
    if not stripped or not stripped.isascii() or not stripped.isprintable() or " " in stripped:
        raise ConfigurationError("the Jina API key is empty or has characters that no key has: set JINA_API_KEY again")
    return stripped


def _rate_limited(said: str, *, code: str, headers: Mapping[str, str]) -> RateLimited:
    lowered = said.lower()
    by_words = next((limit for words, limit in _LIMIT_WORDS.items() if words in lowered), "unknown")
    found = _CURRENT_OF_ALLOWED.search(said)
    return RateLimited(
        said,
        limit=_LIMIT_CODES.get(code, by_words),
        allowed=int(found.group(1).replace(",", "")) if found else None,
        retry_after_s=retry_after_s(headers),
    )


def _detail(answer: Answer) -> tuple[str, str]:
    """The sentence and the code. Older gateways answer `detail` as a list of field errors, proxies with HTML."""
    match answer.content:
        case {"detail": str(detail), **rest}:
            # The number of the request differs in every answer, and would make every dead letter's cause its own.
            return re.sub(r"^\[RID: \w+\] *", "", detail)[:500], str(rest.get("code") or "")
        case {"detail": list(problems)}:
            messages = [f"{_place(one)}: {one.get('msg', '')}" for one in problems if isinstance(one, dict)]
            return "; ".join(messages)[:500], ""
        case _:
            return answer.excerpt or "an empty body", ""


def _concerns_settings(content: object) -> bool:
    """Whether a 422 complains of fields that are the same in every request, so that bisecting would bury everything."""
    match content:
        case {"errors": list(problems)} | {"detail": list(problems)}:
            places = [set(re.split(r"[^\w]+", _place(one))) for one in problems if isinstance(one, dict)]
            return bool(places) and all("input" not in place and place & _SETTINGS for place in places)
        case _:
            return False


def _place(problem: Mapping[str, Any]) -> str:
    location = problem.get("field", problem.get("loc", ""))
    return " -> ".join(str(part) for part in location) if isinstance(location, list | tuple) else str(location)
