"""Jina's batch endpoint, as its OpenAPI description of 2026-04 fixes it: `/v1/batch/embeddings`, for v5-text models.

The lines of the output are not in the description, which says only that the input is "OpenAI-compatible JSONL": they are
read as OpenAI writes them, {custom_id, response: {status_code, body}, error}. A line that is otherwise counts as
unanswered, and never as a vector. Output is fetched from the API itself, never from `output_url`, so that the key goes
nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmill.embedder import EmbedderSpec
from embedmill.errors import ConfigurationError, OutcomeUnknown, RequestTooLarge
from embedmill.models import find_model
from scheduler.budget import key_id

from ..batch_endpoint import BatchLine, BatchStatus, OutputMissing, State
from .http import Answer, AnswerRefused, HttpClient
from .jina import error_for

BATCH_MODELS = ("jina/jina-embeddings-v5-text-small", "jina/jina-embeddings-v5-text-nano")
_TASKS = ("retrieval", "text-matching", "clustering", "classification")
# The description's limit of inline inputs. More, up to 50,000, would have to lie at a URL that Jina can read.
_MAX_LINES = 10_000
# Of a request's body nothing is published; gateways commonly refuse more than 32 MiB.
_MAX_BYTES = 16 * 2**20
# Without a limit the list is said to have 20.
_LISTED, _LISTED_AT_LEAST = 100, 20
_REQUEST_TIMEOUT, _GONE = 408, frozenset({404, 410})
# Of the 5xx, the one that a server can only give instead of beginning.
_REFUSED_BEFORE = 503
_BATCH_ID = re.compile(r"[\w.:-]{1,200}")


def check_batches(spec: EmbedderSpec) -> None:
    """Raises ConfigurationError, with what works instead, where the endpoint does not make such vectors."""
    if spec.model not in BATCH_MODELS:
        raise ConfigurationError(
            f"{spec.model} cannot be had in batches: leave --batch out, or take {' or '.join(BATCH_MODELS)}"
        )
    _batch_task(spec.options.get("task"))


class JinaBatches:
    """The endpoint for the vectors of one spec, with one key. Raises like `check_batches`."""

    def __init__(self, spec: EmbedderSpec, *, key: str, api_base: str, normalized: bool | None = True) -> None:
        check_batches(spec)
        self.model = find_model(spec.model).wire_name
        self.max_lines, self.max_bytes = _MAX_LINES, _MAX_BYTES
        self._settings: dict[str, object] = {
            "model": self.model,
            "task": _batch_task(spec.options.get("task")),
            "dimensions": spec.dimensions,
            "normalized": True if normalized is None else normalized,
        }
        self._dimensions = spec.dimensions
        self._http = HttpClient(api_base, secret=key)
        self.api_base = self._http.api_base
        self.key_id = key_id("jina", key)

    async def submit(self, texts: Mapping[str, str]) -> BatchStatus:
        lines = [{"custom_id": custom_id, "body": {"input": text}} for custom_id, text in texts.items()]
        answer = await self._http.post_json("batch/embeddings", {**self._settings, "input": lines})
        if answer.status == 413:
            raise RequestTooLarge(f"Jina answered 413: {answer.excerpt or 'the request is too large'}")
        if 200 <= answer.status < 300:
            return _parsed(answer.content)
        if _may_have_begun(answer.status):
            raise OutcomeUnknown(f"Jina answered {answer.status}: {answer.excerpt}")
        raise error_for(answer)

    async def status(self, batch_id: str) -> BatchStatus | None:
        answer = await self._http.get(f"batch/{_checked(batch_id)}")
        return None if answer.status in _GONE else self._status(answer)

    async def cancel(self, batch_id: str) -> BatchStatus | None:
        answer = await self._http.delete(f"batch/{_checked(batch_id)}")
        return None if answer.status in _GONE else self._status(answer)

    async def recent(self) -> tuple[Sequence[BatchStatus], bool]:
        answer = await self._http.get(f"batches?limit={_LISTED}")
        if answer.status != 200:
            raise error_for(answer)
        content = answer.content
        if not isinstance(content, list):
            raise OutcomeUnknown("Jina's list of batches is not a list")
        listed = list(filter(None, map(_listed, content)))
        return listed, len(listed) == len(content) < _LISTED_AT_LEAST

    async def output(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        async with aclosing(self._lines(f"batch/{_checked(batch_id)}/output")) as lines:
            async for line in lines:
                yield self._line(line)

    async def errors(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        async with aclosing(self._lines(f"batch/{_checked(batch_id)}/errors")) as lines:
            async for line in lines:
                yield self._line(line)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _lines(self, path: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._http.lines(path)) as lines:
                async for line in lines:
                    yield line
        except AnswerRefused as refused:
            if refused.answer.status in _GONE:
                raise OutputMissing(f"Jina does not have {path}: {refused.answer.excerpt}") from None
            raise error_for(refused.answer) from None

    def _status(self, answer: Answer) -> BatchStatus:
        if answer.status != 200:
            raise error_for(answer)
        return _parsed(answer.content)

    def _line(self, data: bytes) -> BatchLine:
        try:
            line = _LINES.decode(data)
        except msgspec.MsgspecError as error:
            return BatchLine("", None, f"the line is not what Jina's API promises: {error}")
        custom_id = str(line.custom_id)
        answered = line.response
        if line.error is None and answered is not None and answered.status_code == 200:
            try:
                return BatchLine(custom_id, self._vector(bytes(answered.body)))
            except (msgspec.MsgspecError, ValueError, OverflowError) as error:
                return BatchLine(custom_id, None, f"the vector is not what Jina's API promises: {error}")
        return BatchLine(
            custom_id, None, _complaint(line.error, bytes(answered.body) if answered is not None else b"null")
        )

    def _vector(self, body: bytes) -> NDArray[np.float32]:
        data = _BODIES.decode(body).data
        if len(data) != 1:
            raise ValueError(f"{len(data)} vectors for a text")
        numbers = data[0].embedding
        with np.errstate(over="ignore"):
            vector = np.frombuffer(numbers, "<f4") if isinstance(numbers, bytes) else np.array(numbers, np.float32)
        if vector.shape != (self._dimensions,):
            raise ValueError(f"{len(vector)} dimensions instead of {self._dimensions}")
        return vector


class _Response(msgspec.Struct):
    status_code: int = 200
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str | int
    response: _Response | None = None
    error: Any = None


class _Item(msgspec.Struct):
    """embedding: numbers, or what base64 stood for."""

    embedding: bytes | list[float]


class _Body(msgspec.Struct):
    data: list[_Item]


_LINES = msgspec.json.Decoder(_Line)
_BODIES = msgspec.json.Decoder(_Body)


def _batch_task(task: object) -> str | None:
    """The endpoint names families: that its `retrieval` is what documents get elsewhere is found out with a first vector."""
    family = str(task).removesuffix(".passage")
    if task is None or family in _TASKS:
        return None if task is None else family
    raise ConfigurationError(f"the task {task} cannot be had in batches: leave --batch out, or --task {_TASKS[0]}")


def _parsed(content: object) -> BatchStatus:
    """Raises OutcomeUnknown for what is no BatchStatus."""
    match content:
        case {"batch_id": str(batch_id), "status": state, "model": str(model), **rest} if state in get_args(
            State
        ) and _BATCH_ID.fullmatch(batch_id):
            found = rest.get("stats")
            stats = found if isinstance(found, dict) else {}
            return BatchStatus(
                batch_id,
                state,
                model.removeprefix("jina-ai/"),
                total=_count(stats, "total") or None,
                completed=_count(stats, "completed"),
                failed=_count(stats, "failed"),
                tokens=_count(stats, "total_tokens"),
                has_errors=bool(rest.get("error_file_url")),
                error=str(rest.get("error") or "")[:500],
            )
    raise OutcomeUnknown(f"Jina's answer about a batch is not what its API promises: {str(content)[:200]!r}")


def _listed(content: object) -> BatchStatus | None:
    """An entry of the list. One that says nothing else of use is a batch that may be anything; None for what has no id."""
    try:
        return _parsed(content)
    except OutcomeUnknown:
        match content:
            case {"batch_id": str(batch_id)} if _BATCH_ID.fullmatch(batch_id):
                return BatchStatus(
                    batch_id, "pending", "", total=None, completed=0, failed=0, tokens=0, has_errors=False, error=""
                )
    return None


def _may_have_begun(status: int) -> bool:
    """Whether a batch may have come of a submission that was answered so."""
    return status < 400 or status == _REQUEST_TIMEOUT or (status >= 500 and status != _REFUSED_BEFORE)


def _count(stats: Mapping[str, object], name: str) -> int:
    value = stats.get(name)
    return value if isinstance(value, int) and value > 0 else 0


def _checked(batch_id: str) -> str:
    """A part of an address. Raises ConfigurationError for what can be none."""
    if not _BATCH_ID.fullmatch(batch_id):
        raise ConfigurationError(f"{batch_id!r:.100} is no batch's id")
    return batch_id


def _complaint(error: object, body: bytes) -> str:
    """The sentence of a line without a vector."""
    found = error
    if found is None:
        try:
            found = json.loads(body)
        except ValueError:
            found = None
    match found:
        case {"error": dict(inner)}:
            found = inner
    match found:
        case dict():
            found = found.get("message") or found.get("detail") or found
        case None:
            return "the line has neither a vector nor an error"
    return str(found)[:500]
