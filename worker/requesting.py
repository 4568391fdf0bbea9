"""Answers that can be trusted: malformed ones asked for again, and a provider that is unwell told from a bad passage.

What is unwell for every text is nobody's dead letter. Before a refusal or a suspicious answer is believed, a text that any
provider takes, the canary, is tried: if that fails too, the job stops, and nothing is buried.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

import anyio
import numpy as np
from numpy.typing import NDArray

from embedmill.embedder import Embedder, Embedding
from embedmill.errors import InputRejected, JobFatalError, OutcomeUnknown, RateLimited
from embedmill.messages import Lane
from scheduler.budget import RequestBudget
from scheduler.caps import UNCAPPED, Cap

from .attempts import Attempt, RetryBudget, Sending, embed_batch, naming_the_unforeseen
from .gate import inspect, may_share_vector

CANARY = "The canary in this mine sings of seven blue whales."
_MALFORMED_IN_A_ROW = 5
_FIRST_PAUSE_S = 0.5
_MOST_JOBS = 64


@dataclass(slots=True)
class WorkerCounts:
    """What this worker has done, for progress and metrics. Passages carried over or adopted were not paid for again.

    tokens: billed for passages; control_tokens: for the canary; quoted_tokens: what a quote counts for the passages that
    were embedded, where that is asked for. lost_tokens: estimate of what was sent and never answered, which the provider
    may have billed. stalls: times that the event loop stood still for so long that leases were in danger. jobs:
    (passages, tokens) of the jobs that it worked for of late, by `messages.job_key`.
    """

    embedded: int = 0
    failed: int = 0
    adopted: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    requests: int = 0
    truncated: int = 0
    shards: int = 0
    rate_limited: int = 0
    control_tokens: int = 0
    quoted_tokens: float | None = None
    failed_requests: int = 0
    stalls: int = 0
    last_trouble: str = ""
    jobs: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, job: str, *, passages: int, tokens: int) -> None:
        """Count what was embedded for a job."""
        self.embedded += passages
        self.tokens += tokens
        before = self.jobs.pop(job, (0, 0))
        self.jobs[job] = before[0] + passages, before[1] + tokens
        if len(self.jobs) > _MOST_JOBS:
            del self.jobs[next(iter(self.jobs))]


@dataclass(slots=True)
class Requester:
    """Sends the requests of one worker. `on_waste` is told of answers that were billed and cannot be used.

    canary_s: how long the canary took, without waiting for its turn, when it was answered last; retries: those of all
    requests, but for the canary's and those of trials, which must not be decided by chance; quoted_tokens: what a quote
    counts for each text, to compare the bill with.
    """

    embedder: Embedder
    budget: RequestBudget
    counts: WorkerCounts
    well_at_s: float = field(default=float("-inf"))
    canary_s: float = 0.0
    quoted_tokens: Callable[[Sequence[str]], NDArray[np.float64]] | None = None
    retries: RetryBudget = field(default_factory=RetryBudget)
    _malformed: int = 0
    _calls: dict[object, float] = field(default_factory=dict)

    @property
    def oldest_call_s(self) -> float:
        """For how long the embedder has not answered the oldest of its open calls; waiting for the budget is none."""
        return time.monotonic() - min(self._calls.values()) if self._calls else 0.0

    async def ask(
        self,
        texts: Sequence[str],
        *,
        est_tokens: int,
        on_waste: Callable[[Embedding], None],
        lane: Lane = "bulk",
        cap: Cap = UNCAPPED,
        sending: Sending = nullcontext,
        on_trial: bool = False,
        embedder: Embedder | None = None,
    ) -> Embedding:
        """One answer whose shape holds, (n, dimensions); single rows may still be bad. `sending` is around each request.

        cap: of the job that pays, here and below; on_trial: whatever must be tried again is, at most as often as always;
        embedder: another face of the same one.

        Raises InputRejected for content that is refused, JobFatalError when answers cannot be used several times in a row,
        TransientError when those to these texts cannot and others can, or when there are no retries left, EmbedderFailed.
        """
        tries = 0
        seen: NDArray[np.float32] | None = None
        while True:
            embedding = await self._send(
                texts, est_tokens, sending, lane=lane, cap=cap, bounded=not on_trial, embedder=embedder
            )
            report = inspect(embedding.vectors, texts, dimensions=self.embedder.spec.dimensions)
            whole = report.whole
            doubted = False
            if report.alike:
                whole = f"{len(set(texts))} different texts got one and the same vector"
                possible = may_share_vector(texts, (embedder or self.embedder).spec)
                if possible and not await self._answers_canary_like(embedding, cap, lane):
                    # What is theirs they get again; one slip of the provider does not come twice.
                    doubted = seen is None
                    if seen is not None and np.array_equal(seen, embedding.vectors[:1]):
                        whole = None
                    seen = embedding.vectors[:1]
            if whole is None:
                self._malformed = 0
                if not report.bad:
                    self.well_at_s = time.monotonic()
                return embedding
            self.counts.last_trouble = f"malformed answer: {whole}"
            on_waste(embedding)
            self._malformed += not doubted
            if self._malformed >= _MALFORMED_IN_A_ROW:
                raise JobFatalError(
                    f"the provider's answers cannot be used: {whole}; nothing is lost, run again when it is well"
                )
            tries += 1
            if tries > _MALFORMED_IN_A_ROW:
                # Other requests go well, or the job would have stopped.
                raise OutcomeUnknown(f"malformed answer {tries} times: {whole}")
            if not on_trial:
                self.take_retry(f"malformed answer: {whole}")
            await anyio.sleep(_FIRST_PAUSE_S * 2 ** (tries - 1))

    def take_retry(self, complaint: str) -> None:
        """Raises OutcomeUnknown when this worker has made as many retries as it may."""
        if not self.retries.take():
            raise OutcomeUnknown(complaint)

    async def require_well(self, *, since_s: float, complaint: str, lane: Lane = "bulk", cap: Cap = UNCAPPED) -> None:
        """Make sure that the provider gives anything a good vector, before a passage is buried for `complaint`.

        Raises JobFatalError when it does not even take the canary, TransientError and EmbedderFailed like any request.
        """
        if self.well_at_s >= since_s:
            return
        try:
            answer = await self._ask_canary(cap, lane)
        except InputRejected as error:
            raise JobFatalError(
                f"the provider refuses every text, so no document is to blame: {complaint}; nothing is lost"
            ) from error
        if not inspect(answer.vectors, [CANARY], dimensions=self.embedder.spec.dimensions).passed:
            raise JobFatalError(
                f"the provider has no usable vector for any text, so no document is to blame: {complaint}; nothing is lost"
            )
        self.well_at_s = time.monotonic()

    async def _answers_canary_like(self, embedding: Embedding, cap: Cap, lane: Lane) -> bool:
        """Whether a text unlike all others gets the vector of the others, too."""
        answer = await self._ask_canary(cap, lane)
        return bool(np.array_equal(answer.vectors[:1], embedding.vectors[:1]))

    async def _ask_canary(self, cap: Cap, lane: Lane) -> Embedding:
        with naming_the_unforeseen():
            est_tokens = sum(self.embedder.estimate_tokens([CANARY]))

        def end(attempt: Attempt) -> None:
            self.canary_s = attempt.seconds

        answer = await self._send([CANARY], est_tokens, lane=lane, cap=cap, bounded=False, on_event=end)
        self.counts.control_tokens += answer.billed_tokens
        return answer

    async def _send(
        self,
        texts: Sequence[str],
        est_tokens: int,
        sending: Sending = nullcontext,
        *,
        lane: Lane = "bulk",
        cap: Cap = UNCAPPED,
        bounded: bool = True,
        embedder: Embedder | None = None,
        on_event: Callable[[Attempt], None] = lambda _: None,
    ) -> Embedding:
        @asynccontextmanager
        async def call() -> AsyncIterator[None]:
            key = object()
            async with sending():
                self._calls[key] = time.monotonic()
                try:
                    yield
                finally:
                    del self._calls[key]

        def end(attempt: Attempt) -> None:
            self._note(attempt)
            on_event(attempt)

        return await embed_batch(
            embedder or self.embedder,
            texts,
            budget=self.budget,
            est_tokens=est_tokens,
            lane=lane,
            cap=cap,
            sending=call,
            on_event=end,
            retries=self.retries if bounded else None,
        )

    def _note(self, attempt: Attempt) -> None:
        if attempt.outcome == RateLimited.code:
            self.counts.rate_limited += 1
        elif attempt.outcome != "ok":
            self.counts.failed_requests += 1
        if attempt.billed_tokens is None:
            self.counts.lost_tokens += attempt.est_tokens
