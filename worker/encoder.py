"""Texts to vectors from Python, without a queue or a dataset: the worker's client with a face for people.

`AsyncJinaEmbedding` is for programs with an event loop, `JinaEmbedding` for those without; their methods are those of
pymilvus' `JinaEmbeddingFunction`. Requests are packed, paced, retried and checked like a worker's. What cannot be embedded
raises, and then nothing is returned: there are no dead letters here.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack, cast, overload

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.connection import FAKE_URL, Connection
from embedmill.embedder import EmbedderSpec, Embedding, Role
from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputRejected,
    InputTooLong,
    OutcomeUnknown,
    TooManyInputs,
)
from embedmill.messages import Lane
from embedmill.models import SPARSE_MODELS, find_tier
from embedmill.sparse import SparseRows
from scheduler.breaker import Breaker
from scheduler.budget import Budget, RequestBudget, Unlimited, key_id
from scheduler.keyring import Key, KeyRing

from .attempts import embed_batch
from .embedders.jina import API_BASE, JinaEmbedder
from .embedders.jina_sparse import JinaSparseEmbedder
from .gate import inspect, may_share_vector
from .keys import FoundKeys, keys_from_environment, split_keys
from .packing import pack

Vectors = NDArray[np.float32] | NDArray[np.int8] | NDArray[np.uint8]
SparseModel = Literal["jina/elser-v2", "elser-v2"]
_T = TypeVar("_T")
_V = TypeVar("_V")
_UNPACED_CONCURRENCY = 4
_CLOSE_WITHIN_S = 5.0


class JinaOptions(TypedDict, total=False):
    """How `AsyncJinaEmbedding` and `JinaEmbedding` are made, beside the model's name.

    api_key: else JINA_API_KEY, or the file that JINA_API_KEY_FILE names; of several, all are used with a tier, each with
    its limits, and the first one without; task: see `ProviderModel.tasks_by_role`;
    dimensions, late_chunking, embedding_type, normalized, truncate: see `JinaEmbedder`; tier: the key's plan, which paces
    requests (without one, refusals are waited out); concurrency: requests in flight (the tier's, else 4); redis, namespace:
    the budget is the one that workers with this key share there, else this object's own; api_base: the API up to its
    version.
    """

    api_key: str | None
    task: str | None
    dimensions: int | None
    late_chunking: bool
    embedding_type: str
    normalized: bool | None
    truncate: bool | None
    tier: str | None
    concurrency: int | None
    redis: str | None
    namespace: str
    api_base: str


class AsyncJinaEmbedding(Generic[_V]):
    """One model of Jina's, used from one event loop. Close it with `aclose`, or use it as an async context.

    What it makes are `Vectors`, of a sparse model `SparseRows`.
    billed_tokens: what the provider has counted so far, in answers that were used.
    Raises ConfigurationError for options that cannot work together; nothing is sent before `encode_*`.
    """

    @overload
    def __init__(
        self: AsyncJinaEmbedding[SparseRows], model_name: SparseModel, **options: Unpack[JinaOptions]
    ) -> None: ...

    @overload
    def __init__(self: AsyncJinaEmbedding[Vectors], model_name: str = ..., **options: Unpack[JinaOptions]) -> None: ...

    def __init__(self, model_name: str = "jina-embeddings-v3", **options: Unpack[JinaOptions]) -> None:
        if unknown := options.keys() - JinaOptions.__annotations__.keys():
            known = ", ".join(JinaOptions.__annotations__)
            raise ConfigurationError(f"no option {', '.join(sorted(unknown))}: choose from {known}")
        given = options.get("api_key")
        found = FoundKeys(split_keys(given, place="api_key")) if given else keys_from_environment()
        plan = options.get("tier")
        tier = find_tier(plan) if plan else None
        concurrency = options.get("concurrency") or (tier.concurrency if tier else _UNPACED_CONCURRENCY)
        model = f"jina/{model_name.removeprefix('jina/')}"
        self._sparse = model in SPARSE_MODELS
        self._embedder = (JinaSparseEmbedder if self._sparse else _CheckedJinaEmbedder)(
            model,
            key=found.keys[0],
            api_base=options.get("api_base", API_BASE),
            dimensions=options.get("dimensions"),
            task=options.get("task"),
            late_chunking=options.get("late_chunking", False),
            embedding_type=options.get("embedding_type", "base64"),
            normalized=options.get("normalized"),
            truncate=options.get("truncate"),
            concurrency=concurrency,
            requests_per_minute=tier.requests if tier else None,
            tokens_per_minute=tier.tokens if tier else None,
        )
        self._connection: Connection | None = None
        self._budget: RequestBudget = Unlimited()
        if tier is not None:
            self._connection = Connection(options.get("redis") or FAKE_URL)
            connection, namespace = self._connection, options.get("namespace", "default")
            limits = {"rpm": tier.requests, "tpm": tier.tokens, "concurrency": concurrency}

            def open_key(secret: str) -> Key:
                id_ = key_id("jina", secret)
                api_base = options.get("api_base", API_BASE).rstrip("/")
                breaker = Breaker(connection, namespace=namespace, key_id=id_, api_base=api_base)
                return Key(secret, Budget(connection, namespace=namespace, key_id=id_, **limits), breaker)

            self._budget = KeyRing(found.keys, open_key=open_key, source=found.file)
        elif options.get("redis"):
            raise ConfigurationError("redis shares the budget of a tier: say tier='free', 'paid' or 'premium', too")
        self.billed_tokens = 0

    @property
    def dim(self) -> int:
        """The length of a vector, in dimensions; also where eight of them are packed into a byte.

        Of a sparse model: how many indices there can be, 2^32 - 1.
        """
        return self._embedder.spec.dimensions

    async def encode_documents(self, texts: Sequence[str]) -> _V:
        """(n, dim) float32, row i belongs to texts[i]; for `binary` (n, dim / 8) int8, for `ubinary` (n, dim / 8) uint8;
        for a sparse model `SparseRows`.

        With late chunking, `texts` are the passages of one document; one that is too long for one request goes in several,
        split between passages.

        Raises InputRejected, InvalidKey, NoBalance and ConfigurationError at once, TransientError after the retries. What
        other requests of the same call had been answered is lost then. Cancelling abandons requests in flight.
        """
        return await self._encode(texts, "document")

    async def encode_queries(self, texts: Sequence[str]) -> _V:
        """As `encode_documents`, in the role of queries. Late chunking does not concern them."""
        return await self._encode(texts, "query")

    async def __call__(self, texts: Sequence[str]) -> _V:
        return await self._encode(texts, "document")

    async def aclose(self) -> None:
        await self._embedder.aclose()
        if self._connection is not None:
            await self._connection.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        await self.aclose()

    async def _encode(self, texts: Sequence[str], role: Role) -> _V:
        texts = _checked_texts(texts)
        # Queries are not late-chunked, but the smaller requests do no harm.
        tokens = await to_thread.run_sync(self._embedder.estimate_tokens, texts) if texts else []
        vectors: Vectors | None = None
        trouble: EmbedmillError | None = None

        async def work(waiting: Iterator[list[int]]) -> None:
            nonlocal trouble, vectors
            for rows in waiting:
                try:
                    found = await self._send([texts[row] for row in rows], sum(tokens[row] for row in rows), role, rows)
                except EmbedmillError as error:
                    trouble = trouble or error
                    requests.cancel_scope.cancel()
                    return
                if vectors is None:
                    vectors = np.empty((len(texts), *found.shape[1:]), found.dtype)
                vectors[rows[0] : rows[-1] + 1] = found

        waiting = iter(pack(tokens, limits=self._embedder.limits))
        async with anyio.create_task_group() as keeping:
            keeping.start_soon(self._budget.keep_alive)
            async with anyio.create_task_group() as requests:
                for _ in range(self._embedder.limits.concurrency * max(1, len(self._budget.key_ids))):
                    requests.start_soon(work, waiting)
            keeping.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        return cast("_V", self._finished(vectors))

    def _finished(self, vectors: Vectors | None) -> Vectors | SparseRows:
        if self._sparse:
            return SparseRows.joined([] if vectors is None else list(vectors))
        return _no_vectors(self._embedder.spec) if vectors is None else vectors

    async def _send(self, texts: list[str], est_tokens: int, role: Role, rows: list[int]) -> Vectors:
        # Somebody waits for the answer to a question.
        lane: Lane = "live" if role == "query" else "bulk"
        try:
            embedding = await embed_batch(
                self._embedder, texts, budget=self._budget, role=role, est_tokens=max(1, est_tokens), lane=lane
            )
        except InputRejected as error:
            if not _fits_in_halves(error, rows, late_chunking=self._embedder.spec.late_chunking and role == "document"):
                place = f"text {rows[0]}" if len(rows) == 1 else f"one of the texts {rows[0]} to {rows[-1]}"
                raise type(error)(f"{place}: {error}") from error
            # The vectors of late chunking are those of smaller windows then.
            middle = len(rows) // 2
            first = await self._send(texts[:middle], est_tokens * middle // len(rows), role, rows[:middle])
            second = await self._send(
                texts[middle:], est_tokens - est_tokens * middle // len(rows), role, rows[middle:]
            )
            return cast("Vectors", np.concatenate([first, second]))
        self.billed_tokens += embedding.billed_tokens
        return embedding.vectors


def _fits_in_halves(error: InputRejected, rows: Sequence[int], *, late_chunking: bool) -> bool:
    """Whether the request was too large, and not one of its texts. The embedder has learned what inputs it may have."""
    too_large = isinstance(error, TooManyInputs) or (late_chunking and isinstance(error, InputTooLong))
    return too_large and len(rows) > 1


class JinaEmbedding(Generic[_V]):
    """`AsyncJinaEmbedding` for programs without an event loop, and for notebooks: the same methods, blocking.

    Its requests run in a thread of its own, which `close`, the end of a `with`, or the end of the program ends. It may be
    used from several threads.
    """

    @overload
    def __init__(self: JinaEmbedding[SparseRows], model_name: SparseModel, **options: Unpack[JinaOptions]) -> None: ...

    @overload
    def __init__(self: JinaEmbedding[Vectors], model_name: str = ..., **options: Unpack[JinaOptions]) -> None: ...

    def __init__(self, model_name: str = "jina-embeddings-v3", **options: Unpack[JinaOptions]) -> None:
        self._encoder = cast("AsyncJinaEmbedding[_V]", AsyncJinaEmbedding(model_name, **options))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="embedmill-jina", daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _end_loop, self._loop, self._thread, self._encoder)
        self._closing = threading.Lock()

    @property
    def dim(self) -> int:
        """See `AsyncJinaEmbedding.dim`. Known without asking the API."""
        return self._encoder.dim

    @property
    def billed_tokens(self) -> int:
        return self._encoder.billed_tokens

    def encode_documents(self, texts: Sequence[str]) -> _V:
        """See `AsyncJinaEmbedding.encode_documents`."""
        return self._wait_for(self._encoder.encode_documents, texts)

    def encode_queries(self, texts: Sequence[str]) -> _V:
        """See `AsyncJinaEmbedding.encode_queries`."""
        return self._wait_for(self._encoder.encode_queries, texts)

    def __call__(self, texts: Sequence[str]) -> _V:
        return self.encode_documents(texts)

    def close(self) -> None:
        """Whatever other threads wait for ends with a ConfigurationError."""
        with self._closing:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _wait_for(self, encode: Callable[[Sequence[str]], Coroutine[Any, Any, _T]], texts: Sequence[str]) -> _T:
        closed = ConfigurationError("this JinaEmbedding is closed: make a new one")
        # What the loop is given before it is told to end is cancelled there; what comes later, nobody would answer.
        with self._closing:
            if not self._close.alive:
                raise closed
            answer = asyncio.run_coroutine_threadsafe(encode(texts), self._loop)
        try:
            return answer.result()
        except CancelledError:
            raise closed from None
        except BaseException:
            # Ctrl-C ends the waiting here, and the requests there.
            answer.cancel()
            raise


class _CheckedJinaEmbedder(JinaEmbedder):
    """Answers that the worker's gate would not let pass are failures, so that the one place of retries sees them."""

    async def embed_with(self, key: str, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        embedding = await super().embed_with(key, texts, role=role)
        if self.spec.packs_bits:
            return embedding
        report = inspect(embedding.vectors, texts, dimensions=self.spec.dimensions)
        if report.bad:
            row, cause = next(iter(report.bad.items()))
            raise OutcomeUnknown(f"the answer cannot be used: {cause} (text {row} of {len(texts)} in its request)")
        sent = replace(self.spec, options={**self.spec.options, "truncate": self.cuts(role)})
        if report.alike and not may_share_vector(texts, sent):
            raise OutcomeUnknown(f"the answer cannot be used: {len(set(texts))} different texts got one vector")
        return embedding


def _no_vectors(spec: EmbedderSpec) -> Vectors:
    """What no texts make."""
    match spec.options.get("embedding_type"):
        case "binary":
            return np.empty((0, spec.dimensions // 8), np.int8)
        case "ubinary":
            return np.empty((0, spec.dimensions // 8), np.uint8)
        case _:
            return np.empty((0, spec.dimensions), np.float32)


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ConfigurationError("texts is one string, and a list of strings is needed: put it into brackets")
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise ConfigurationError(f"text {position} is of type {type(text).__name__}, and not a string")
    return checked


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, encoder: AsyncJinaEmbedding[Any]) -> None:
    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        with suppress(Exception):
            await encoder.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(end(), loop)
    # The garbage collector may come by in that thread itself.
    if thread is not threading.current_thread():
        thread.join(_CLOSE_WITHIN_S)
