"""Jina's embeddings API: requests as its OpenAPI description fixes them, answers checked before anyone uses them.

Rows are placed by their `index`, never by their order. An answer that was paid for and cannot be used is
`OutcomeUnknown`: it may be asked for again, and its estimate is charged.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputTooLong,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
    TooManyInputs,
)
from embedmill.exact_tokens import ExactTokens
from embedmill.models import EmbeddingType, find_model
from embedmill.token_estimates import TokenEstimator

from ..keys import check_key
from ..packing import api_limits
from .http import ATTEMPT_TIMEOUT_S, Answer, HttpClient, retry_after_s
from .jina_inputs import LearnedInputs, input_refusal

if TYPE_CHECKING:
    from .jina_batches import JinaBatches

_log = logging.getLogger("embedmill.worker")
API_BASE = "https://api.jina.ai/v1"
# Estimates err; a late-chunking request over the limit fails as a whole.
_LATE_CHUNKING_SHARE = 0.9
_EVERY_BILL_UPTO, _LATER_EVERY = 64, 8
_BYTES_PER_CHARACTER = 4
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
    """One model of Jina's, with one key; a request may bring another one of the same owner.

    task: overrides what is sent for documents, see `ProviderModel.tasks_by_role`; late_chunking: a document request is one
    document, whose passages know of each other; embedding_type: how vectors travel, and what they are, see `EmbeddingType`;
    normalized: None for unit length where the model leaves a choice; truncate: whether longer texts are cut or refused
    (None: cut, but with late chunking); requests_per_minute, tokens_per_minute: the key's limits, which decide what a
    request should hold; concurrency: requests in flight; revision: of the spec, where what answers is not Jina's own model;
    tokenizer: the model's, for exact counts.
    Raises ConfigurationError for a model, address or combination that cannot work; nothing is sent before.
    """

    _find_model = staticmethod(find_model)

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
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
        revision: str = "",
        tokenizer: ExactTokens | None = None,
    ) -> None:
        self._model = self._find_model(model)
        self._model.check_late_chunking(late_chunking)
        if late_chunking and truncate:
            raise ConfigurationError(
                "truncate would drop whole passages off the end of a late-chunking request: leave truncate out"
            )
        self._model.check_truncate(truncate)
        self._late_chunking = late_chunking
        self._truncate = truncate
        self._dimensions = self._model.check_dimensions(dimensions)
        self._embedding_type = self._model.check_embedding_type(embedding_type, dimensions=self._dimensions)
        self._normalized = self._model.check_normalized(normalized)
        document_task, query_task = self._model.tasks_by_role(task)
        self._tasks: dict[Role, str | None] = {"document": document_task, "query": query_task}
        self.estimator = TokenEstimator()
        self._answers = 0
        self._key = check_key(key.strip())
        self._http = HttpClient(api_base, secret=self._key, attempt_timeout_s=attempt_timeout_s)
        self.spec = EmbedderSpec(
            model=model,
            dimensions=self._dimensions,
            revision=revision,
            max_input_tokens=self._model.max_input_tokens,
            options=self._options(document_task),
        )
        self._requests_per_minute = requests_per_minute
        self._tokens_per_minute = tokens_per_minute
        self._concurrency = concurrency
        self._inputs = LearnedInputs()
        self._tokenizer = tokenizer

    @property
    def limits(self) -> BatchLimits:
        """By the key's limits, and by what refusals have told."""
        if self._late_chunking:
            return BatchLimits(self._inputs.max_inputs, self.window_tokens, padded=False, concurrency=self._concurrency)
        return api_limits(
            requests_per_minute=self._requests_per_minute,
            tokens_per_minute=self._tokens_per_minute,
            concurrency=self._concurrency,
            max_input_tokens=self._model.max_input_tokens,
            max_inputs=self._inputs.max_inputs,
            most_inputs=self._inputs.most_inputs,
            exact=self._tokenizer is not None,
        )

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        limit = self._model.max_input_tokens
        if self._tokenizer is not None:
            return [min(limit, tokens) for tokens in self._tokenizer.count(texts)]
        return [min(limit, math.ceil(tokens)) for tokens in self.estimator.estimate(texts)]

    @property
    def window_tokens(self) -> int:
        """See `EmbedsTogether`. Estimates err; counts do not."""
        share = _LATE_CHUNKING_SHARE if self._tokenizer is None else 1.0
        return int(self._model.late_chunking_tokens * share)

    def planned_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `EmbedsTogether`: exact, or what is estimated before anything is learned."""
        if self._tokenizer is not None:
            return self._tokenizer.count(texts)
        return [math.ceil(tokens) for tokens in TokenEstimator().estimate(texts)]

    def refusing_long(self) -> JinaEmbedder:
        """See `RefusesLong`: for requests of jobs in which nothing is cut."""
        other = copy.copy(self)
        other._truncate = False
        other.spec = replace(self.spec, options={**self.spec.options, "truncate": False})
        return other

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """See `Embedder.embed`. Raises ConfigurationError, too, when the provider does not know the model or the address."""
        return await self.embed_with("", texts, role=role)

    async def embed_with(self, key: str, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """See `TakesKeys.embed_with`; with "", the key that it was made with."""
        request = self.request_body(texts, role=role)
        answer = await self._http.post_json("embeddings", request, secret=key)
        if answer.status != 200:
            raise self._learned_from(error_for(answer), sent=len(texts))
        embedding = self._parsed(answer.body, texts)
        self._learn(texts, embedding.billed_tokens)
        if self._tokenizer is not None and self._tokenizer.checks_bills():
            await self._check_tokenizer(self._tokenizer, texts, embedding.billed_tokens)
        truncated = await self._find_cut(texts, embedding.billed_tokens) if request.get("truncate") else ()
        return replace(embedding, truncated=truncated) if truncated else embedding

    def _parsed(self, body: bytes, texts: Sequence[str]) -> Embedding:
        return parse_embedding(body, rows=len(texts), dimensions=self._dimensions, embedding_type=self._embedding_type)

    async def _find_cut(self, texts: Sequence[str], billed_tokens: int) -> tuple[int, ...]:
        """Which texts were cut: the API does not say. A tokenizer does, and the bill of a text alone."""
        limit = self._model.max_input_tokens
        if self._tokenizer is None:
            return (0,) if len(texts) == 1 and billed_tokens >= limit else ()
        # No tokenizer makes more tokens than bytes.
        long = [position for position, text in enumerate(texts) if len(text) * _BYTES_PER_CHARACTER > limit]
        if not long:
            return ()
        counts = await to_thread.run_sync(self._tokenizer.count, [texts[position] for position in long])
        return tuple(position for position, tokens in zip(long, counts, strict=True) if tokens > limit)

    async def _check_tokenizer(self, tokenizer: ExactTokens, texts: Sequence[str], billed_tokens: int) -> None:
        """What was cut was not billed whole, so it proves nothing."""
        if max(map(len, texts)) < self._model.max_input_tokens:
            warning = await to_thread.run_sync(tokenizer.check, texts, billed_tokens)
            if warning:
                _log.warning("%s", warning)

    def _learned_from(self, error: EmbedmillError, *, sent: int) -> EmbedmillError:
        if not isinstance(error, TooManyInputs):
            return error
        # Of a text alone it is the size.
        if sent == 1:
            return InputTooLong(str(error))
        self._inputs.refused(sent, error)
        return error

    def batch_endpoint(self, key: str = "") -> JinaBatches:
        """See `EmbedsInBatches.batch_endpoint`. The caller closes it."""
        from .jina_batches import JinaBatches

        return JinaBatches(self.spec, key=key or self._key, api_base=self._http.api_base, normalized=self._normalized)

    async def aclose(self) -> None:
        await self._http.aclose()

    def cuts(self, role: Role) -> bool:
        """Whether longer texts are cut in a request of this role."""
        together = self._late_chunking and role == "document"
        return not together if self._truncate is None else self._truncate

    def request_body(self, texts: Sequence[str], *, role: Role = "document") -> dict[str, object]:
        """Only the fields that this model's schema declares."""
        late_chunking = self._late_chunking and role == "document"
        wanted: dict[str, object] = {
            "task": self._tasks[role],
            "dimensions": self._dimensions,
            "late_chunking": late_chunking,
            "truncate": self.cuts(role),
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
            "truncate": self.cuts("document"),
        }
        if self._normalized is False:
            options["normalized"] = False
        if self._embedding_type in ("binary", "ubinary"):
            options["embedding_type"] = self._embedding_type
        return options

    def _learn(self, texts: Sequence[str], billed_tokens: int) -> None:
        """From every bill at first; later every eighth teaches enough, and counting characters costs time."""
        if self._tokenizer is not None:
            return
        estimator = self.estimator
        self._answers += 1
        if estimator.bills >= _EVERY_BILL_UPTO and self._answers % _LATER_EVERY:
            return
        # What was cut was not billed whole.
        if max(map(len, texts)) < self._model.max_input_tokens:
            estimator.learn(texts, billed_tokens)


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
            error = input_refusal(said, status=answer.status, code=code)
        case status if status in _OVERLOADED:
            error = Overloaded(said, retry_after_s=retry_after_s(answer.headers))
        # 504, 524 and their like: a gateway lost patience with a request that may still be running.
        case status if status >= 500:
            error = OutcomeUnknown(said, retry_after_s=retry_after_s(answer.headers))
        case _:
            error = ConfigurationError(f"{said} (is --api-base right?)")
    return error


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
