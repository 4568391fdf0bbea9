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

from embedmill.embedder import Embedder, Embedding
from embedmill.errors import InputRejected, JobFatalError, RateLimited
from scheduler.budget import RequestBudget

from .attempts import Attempt, Sending, embed_batch, naming_the_unforeseen
from .gate import inspect

CANARY = "The canary in this mine sings of seven blue whales."
_MALFORMED_TRIES = 5
_MOST_JOBS = 64


@dataclass(slots=True)
class WorkerCounts:
    """What this worker has done, for progress and metrics. Passages carried over or adopted were not paid for again.

    lost_tokens: estimate of what was sent and never answered, which the provider may have billed. stalls: times that the
    event loop stood still for so long that leases were in danger. jobs: (passages, tokens) of the jobs that it worked for
    of late, by `messages.job_key`.
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

    canary_s: how long the canary took, without waiting for its turn, when it was answered last.
    """

    embedder: Embedder
    budget: RequestBudget
    counts: WorkerCounts
    well_at_s: float = field(default=float("-inf"))
    canary_s: float = 0.0
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
        sending: Sending = nullcontext,
    ) -> Embedding:
        """One answer whose shape holds, (n, dimensions); single rows may still be bad. `sending` is around each request.

        Raises InputRejected for content that is refused, JobFatalError when no answer can be used, TransientError,
        EmbedderFailed.
        """
        whole: str | None = None
        for attempt in range(_MALFORMED_TRIES):
            embedding = await self._send(texts, est_tokens, sending)
            report = inspect(embedding.vectors, texts, dimensions=self.embedder.spec.dimensions)
            whole = report.whole
            if report.alike and await self._answers_canary_like(embedding):
                whole = f"{len(set(texts))} different texts got one and the same vector"
            if whole is None:
                if not report.bad:
                    self.well_at_s = time.monotonic()
                return embedding
            self.counts.last_trouble = f"malformed answer: {whole}"
            on_waste(embedding)
            if attempt + 1 < _MALFORMED_TRIES:
                await anyio.sleep(0.5 * 2**attempt)
        raise JobFatalError(
            f"the provider's answers cannot be used: {whole}; nothing is lost, run again when it is well"
        )

    async def require_well(self, *, since_s: float, complaint: str) -> None:
        """Make sure that the provider gives anything a good vector, before a passage is buried for `complaint`.

        Raises JobFatalError when it does not even take the canary, TransientError and EmbedderFailed like any request.
        """
        if self.well_at_s >= since_s:
            return
        try:
            answer = await self._ask_canary()
        except InputRejected as error:
            raise JobFatalError(
                f"the provider refuses every text, so no document is to blame: {complaint}; nothing is lost"
            ) from error
        if not inspect(answer.vectors, [CANARY], dimensions=self.embedder.spec.dimensions).passed:
            raise JobFatalError(
                f"the provider has no usable vector for any text, so no document is to blame: {complaint}; nothing is lost"
            )
        self.well_at_s = time.monotonic()

    async def _answers_canary_like(self, embedding: Embedding) -> bool:
        """Whether a text unlike all others gets the vector of the others, too."""
        answer = await self._ask_canary()
        return bool(np.array_equal(answer.vectors[:1], embedding.vectors[:1]))

    async def _ask_canary(self) -> Embedding:
        with naming_the_unforeseen():
            est_tokens = sum(self.embedder.estimate_tokens([CANARY]))

        def end(attempt: Attempt) -> None:
            self.canary_s = attempt.seconds

        return await self._send([CANARY], est_tokens, on_event=end)

    async def _send(
        self,
        texts: Sequence[str],
        est_tokens: int,
        sending: Sending = nullcontext,
        *,
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
            self.embedder, texts, budget=self.budget, est_tokens=est_tokens, sending=call, on_event=end
        )

    def _note(self, attempt: Attempt) -> None:
        if attempt.outcome == RateLimited.code:
            self.counts.rate_limited += 1
        elif attempt.outcome != "ok":
            self.counts.failed_requests += 1
        if attempt.billed_tokens is None:
            self.counts.lost_tokens += attempt.est_tokens
