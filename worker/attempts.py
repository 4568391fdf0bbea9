"""The only place that tries a request again inside a process.

Being rate-limited never spends an attempt and is waited out, bounded by nothing but cancellation: the budget says when.
Anything else that may pass is tried a bounded number of times, and all retries of a process together are a small share of
its requests, so that a provider in trouble is not sent more than one that is well. What cannot pass goes up at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from embedmill.embedder import Embedder, Embedding, Role, TakesKeys
from embedmill.errors import BatchPending, EmbedderFailed, EmbedmillError, OutcomeUnknown, RateLimited, TransientError
from embedmill.messages import Lane
from scheduler.budget import Grant, RequestBudget
from scheduler.caps import UNCAPPED, Cap


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """max_attempts: failures after which the last one is raised; base_s, cap_s: full jitter up to base * 2^n, at most cap;
    limited_cap_s: the same cap while rate-limited without a word on how long."""

    max_attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 20.0
    limited_cap_s: float = 5.0


@dataclass(slots=True)
class RetryBudget:
    """How many retries a process may make: `share` of a retry for each request that goes well, and one in `every_s`, so that
    a process with little to do is not stuck. left: so many at first; most: that are ever saved up."""

    left: float = 10.0
    most: float = 20.0
    share: float = 0.1
    every_s: float = 10.0
    _counted_at_s: float = field(default_factory=time.monotonic)

    def earn(self) -> None:
        """A request went well."""
        self.left = min(self.most, self.left + self.share)

    def take(self) -> bool:
        """Whether one more retry may be made."""
        now_s = time.monotonic()
        self.left = min(self.most, self.left + (now_s - self._counted_at_s) / self.every_s)
        self._counted_at_s = now_s
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request as it ended. outcome: `ok`, or the code of the error; billed_tokens: None where nobody knows."""

    outcome: str
    est_tokens: int
    billed_tokens: int | None
    seconds: float


Sending = Callable[[], AbstractAsyncContextManager[object]]
"""Entered when the budget lets a request go, left when it has ended: waiting for a turn is outside."""

DEFAULT_POLICY = RetryPolicy()
_LONGEST_RETRY_AFTER_S = 60.0
_LONGEST_COMPLAINT = 300


async def embed_batch(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    budget: RequestBudget,
    role: Role = "document",
    est_tokens: int | None = None,
    lane: Lane = "bulk",
    cap: Cap = UNCAPPED,
    sending: Sending = nullcontext,
    on_event: Callable[[Attempt], None] | None = None,
    policy: RetryPolicy = DEFAULT_POLICY,
    retries: RetryBudget | None = None,
) -> Embedding:
    """Embed `texts` in one request, tried until it passes or cannot.

    est_tokens: of the whole request, when the caller knows it; cap: of the job that pays. `sending` is around each
    request, `on_event` is called after it; retries: of the whole process. Raises Overloaded or OutcomeUnknown after
    `policy.max_attempts` failures, or when no retries are left; InputRejected, EmbedderFailed, JobFatalError and
    ConfigurationError at once, a refusal of the key once no other key is left. Cancelled, a request in flight is charged
    with its estimate.
    """
    if est_tokens is None:
        est_tokens = sum(await anyio.to_thread.run_sync(embedder.estimate_tokens, texts))

    async def attempt() -> Embedding:
        grant: Grant | None = None
        try:
            async with (
                cap.reserve(texts, est_tokens=est_tokens) as hold,
                budget.reserve(est_tokens, lane=lane) as grant,
                sending(),
            ):
                hold.grant = grant
                return await _send(embedder, texts, grant=grant, role=role, on_event=on_event)
        except EmbedmillError as error:
            if grant is not None and grant.other_key:
                raise _KeyRefused from error
            raise

    embedding: Embedding = await _retrying(policy, retries)(attempt)
    if retries is not None:
        retries.earn()
    return embedding


@contextmanager
def naming_the_unforeseen() -> Iterator[None]:
    """Around every call of an embedder: raises EmbedderFailed for what is none of our errors."""
    try:
        yield
    except EmbedmillError:
        raise
    except BaseException as error:
        # A panic in Rust, as a tokenizer's, is no Exception, and its class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise EmbedderFailed(f"the embedder failed with {repr(error)[:_LONGEST_COMPLAINT]}") from error
        raise


async def _send(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    grant: Grant,
    role: Role,
    on_event: Callable[[Attempt], None] | None,
) -> Embedding:
    began = time.perf_counter()
    outcome, billed = "cancelled", None
    try:
        with naming_the_unforeseen():
            if grant.secret and isinstance(embedder, TakesKeys):
                embedding = await embedder.embed_with(grant.secret, texts, role=role)
            else:
                embedding = await embedder.embed(texts, role=role)
    except EmbedmillError as error:
        outcome, billed = error.code, _settle_failure(grant, error)
        raise
    else:
        outcome, billed = "ok", embedding.billed_tokens
        grant.settle(embedding.billed_tokens)
        return embedding
    finally:
        if on_event is not None:
            on_event(Attempt(outcome, grant.est_tokens, billed, time.perf_counter() - began))


def _settle_failure(grant: Grant, error: EmbedmillError) -> int | None:
    """Tokens billed by a request that failed so."""
    grant.error = error
    if isinstance(error, (OutcomeUnknown, EmbedderFailed)):
        return None
    if isinstance(error, RateLimited):
        grant.limited(error)
    else:
        grant.settle(0)
    return 0


class _KeyRefused(Exception):
    """Not the request failed, but its key, and there are others."""


def _retrying(policy: RetryPolicy, retries: RetryBudget | None) -> AsyncRetrying:
    """Counts failures and refusals apart: tenacity's own count has both."""
    failures = refusals = 0

    def count(state: RetryCallState) -> None:
        nonlocal failures, refusals
        if isinstance(_error(state), RateLimited):
            refusals += 1
        elif isinstance(_error(state), TransientError):
            failures, refusals = failures + 1, 0

    def spent(state: RetryCallState) -> bool:
        if isinstance(_error(state), RateLimited | _KeyRefused):
            return False
        return failures >= policy.max_attempts or (retries is not None and not retries.take())

    def wait_s(state: RetryCallState) -> float:
        error = _error(state)
        if isinstance(error, _KeyRefused):
            return 0.0
        if isinstance(error, TransientError) and error.retry_after_s is not None:
            return min(error.retry_after_s, _LONGEST_RETRY_AFTER_S)
        if isinstance(error, RateLimited):
            return random.uniform(0, min(policy.limited_cap_s, policy.base_s * 2 ** min(refusals - 1, 20)))
        return random.uniform(0, min(policy.cap_s, policy.base_s * 2 ** (failures - 1)))

    return AsyncRetrying(
        sleep=anyio.sleep,
        retry=retry_if_exception(_may_pass_soon),
        after=count,
        stop=spent,
        wait=wait_s,
        reraise=True,
    )


def _may_pass_soon(error: BaseException) -> bool:
    """Open batches take minutes or hours: a shard that needs their room is put off."""
    return isinstance(error, (TransientError, _KeyRefused)) and not isinstance(error, BatchPending)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None
