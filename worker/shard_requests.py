"""The requests for one shard: refused ones halved until the bad passage is alone, bad vectors asked for again. What comes
in batches passes the same gate.

What a job's cap has no room for is halved, too: near its cap a job goes on in small requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.dataset.layout import EMBEDDED, Failure, TooLong
from embedmill.embedder import Embedding, RefusesLong
from embedmill.errors import CapReached, InputRejected, InputTooLong, PassageTooLarge, RequestTooLarge
from embedmill.failpoints import afailpoint
from embedmill.messages import Lane
from scheduler.caps import UNCAPPED, Cap

from .attempts import naming_the_unforeseen
from .gate import inspect, may_share_vector
from .requesting import Requester
from .results import Increment, ShardResults, billed_only

GATE_TRIES = 4


class ShardRequests:
    """Brings the answers for one shard into its results. ids, texts: (id, version) and text of every row.

    job: its key, for what is counted; lane: in which its requests wait for the budget; sending: entered around each request
    of some rows, once the budget lets it go; cap: of the job that pays; on_trial: see `Requester.ask`;
    too_long: what becomes of a passage over the model's limit.
    """

    def __init__(
        self,
        requester: Requester,
        results: ShardResults,
        *,
        ids: Sequence[tuple[str, int]],
        texts: Sequence[str],
        dtype: str,
        job: str,
        lane: Lane = "bulk",
        cap: Cap = UNCAPPED,
        too_long: TooLong = "truncate",
    ) -> None:
        self._requester = requester
        self.results = results
        self.ids = ids
        self.texts = texts
        self._dtype: np.dtype[np.floating] = np.dtype(dtype)
        self.sending: Callable[[Sequence[int]], AbstractAsyncContextManager[object]] = nullcontext
        self.job = job
        self.lane = lane
        self.cap = cap
        self.on_trial = False
        self._tokens: dict[int, int] = {}
        self._quoted: dict[int, float] = {}
        self._cuts = too_long == "truncate"
        embedder = requester.embedder
        # What is left too long after splitting must not be cut either.
        self._embedder = embedder if self._cuts or not isinstance(embedder, RefusesLong) else embedder.refusing_long()

    async def estimate(self, rows: Sequence[int]) -> list[int]:
        """Tokens that each of these rows counts in a request. Raises EmbedderFailed."""
        texts = [self.texts[row] for row in rows]
        with naming_the_unforeseen():
            tokens = await to_thread.run_sync(self._requester.embedder.estimate_tokens, texts)
        await self._quote(rows, texts)
        self._tokens.update(zip(rows, tokens, strict=True))
        return tokens

    async def take(self, vectors: Mapping[int, NDArray[np.float32]]) -> dict[int, str]:
        """Bring vectors by row, for which no request was sent, into the results; those that are of no use, with the
        cause."""
        rows = list(vectors)
        if not rows:
            return {}
        texts = [self.texts[row] for row in rows]
        embedding = Embedding(np.stack(list(vectors.values())), billed_tokens=0)
        report = inspect(embedding.vectors, texts, dimensions=self.results.dimensions, dtype=self._dtype)
        if report.alike and not may_share_vector(texts, self._embedder.spec):
            return dict.fromkeys(rows, "different texts have one and the same vector")
        good = [position for position in range(len(rows)) if position not in report.bad]
        # Some may come for the second time.
        owed = [position for position in good if self.results.statuses[rows[position]] != EMBEDDED]
        await self._quote([rows[position] for position in owed], [texts[position] for position in owed])
        self._add([rows[position] for position in good], embedding, good, requests=0)
        return {rows[position]: cause for position, cause in report.bad.items()}

    async def ask_again(self, row: int) -> NDArray[np.float32]:
        """The vector that an ordinary request gets for a row, to compare: it is paid for and not stored."""
        await self.estimate([row])
        answer = await self._ask([row])
        self.results.add(billed_only(answer.billed_tokens, requests=1, dimensions=self.results.dimensions))
        self._requester.counts.control_tokens += answer.billed_tokens
        vector: NDArray[np.float32] = answer.vectors[0]
        return vector

    async def embed(self, rows: Sequence[int], *, tries: int = GATE_TRIES, since_s: float | None = None) -> None:
        """Embed rows that were estimated, in one request; bisect when their content is refused, until the bad one is alone.

        A row whose vector does not pass the gate is asked for again by itself, so many `tries` in all. since_s: when the
        first complaint came that led here; nothing is buried before the provider has done something else well since.
        """
        limits = self._requester.embedder.limits
        most = max(limits.max_inputs, limits.most_inputs)
        if len(rows) > most:
            # They were put together before a refusal taught better.
            for start in range(0, len(rows), most):
                await self.embed(rows[start : start + most], tries=tries, since_s=since_s)
            return
        texts = [self.texts[row] for row in rows]
        began_s = time.monotonic()
        await afailpoint("worker.before_request")
        try:
            embedding = await self._ask(rows)
        except (InputRejected, CapReached) as error:
            await self._bisect(rows, error, tries=tries, since_s=since_s or began_s)
            return
        await afailpoint("worker.after_request")
        report = inspect(embedding.vectors, texts, dimensions=self.results.dimensions, dtype=self._dtype)
        cut = () if self._cuts else embedding.truncated
        good = [position for position in range(len(rows)) if position not in report.bad and position not in cut]
        self._add([rows[position] for position in good], embedding, good)
        for position in cut:
            self.fail(rows[position], code=InputTooLong.code, cause=f"it is {self._limit_words}")
        for position, cause in report.bad.items():
            if position in cut:
                continue
            if tries <= 1:
                await self._requester.require_well(
                    since_s=since_s or began_s, complaint=cause, lane=self.lane, cap=self.cap
                )
                self.fail(rows[position], code="gate", cause=cause)
            else:
                if not self.on_trial:
                    self._requester.take_retry(cause)
                await self.embed([rows[position]], tries=tries - 1, since_s=since_s or began_s)

    def fail(self, row: int, *, code: str, cause: str) -> None:
        """Make a row a dead letter."""
        id_, version = self.ids[row]
        none = np.empty((0, self.results.dimensions), np.float32)
        failure = Failure(row, id_, version, code, cause)
        self.results.add(Increment(np.empty(0, np.int32), none, failures=(failure,)))
        self._requester.counts.failed += 1

    async def _bisect(
        self, rows: Sequence[int], refusal: InputRejected | CapReached, *, tries: int, since_s: float
    ) -> None:
        if len(rows) > 1:
            middle = len(rows) // 2
            await self.embed(rows[:middle], tries=tries, since_s=since_s)
            await self.embed(rows[middle:], tries=tries, since_s=since_s)
            return
        if isinstance(refusal, CapReached):
            raise refusal
        await self._bury_refused(rows[0], refusal, since_s=since_s)

    async def _bury_refused(self, row: int, refusal: InputRejected, *, since_s: float) -> None:
        """A row was refused alone."""
        if isinstance(refusal, RequestTooLarge):
            raise PassageTooLarge(
                f"passage {self.ids[row][0]} is too large: {refusal}; nothing is lost, go on with other limits"
            ) from refusal
        await self._requester.require_well(since_s=since_s, complaint=str(refusal), lane=self.lane, cap=self.cap)
        cause = str(refusal)
        if isinstance(refusal, InputTooLong):
            cause = f"it is {self._limit_words}: {cause}"
        self.fail(row, code=refusal.code, cause=cause)

    @property
    def _limit_words(self) -> str:
        limit = self._requester.embedder.spec.max_input_tokens
        return f"longer than the {limit:,} tokens that the model takes" if limit else "longer than the model takes"

    async def _ask(self, rows: Sequence[int]) -> Embedding:
        return await self._requester.ask(
            [self.texts[row] for row in rows],
            est_tokens=sum(self._tokens[row] for row in rows),
            on_waste=lambda answer: self._add([], answer, []),
            lane=self.lane,
            cap=self.cap,
            sending=lambda: self.sending(rows),
            on_trial=self.on_trial,
            embedder=self._embedder,
        )

    async def _quote(self, rows: Sequence[int], texts: Sequence[str]) -> None:
        if self._requester.quoted_tokens is not None:
            quoted = await to_thread.run_sync(self._requester.quoted_tokens, texts)
            self._quoted.update(zip(rows, quoted.tolist(), strict=True))

    def _add(
        self,
        rows: list[int],
        embedding: Embedding,
        positions: list[int],
        *,
        together: bool = False,
        requests: int = 1,
    ) -> None:
        row_of = dict(zip(positions, rows, strict=True))
        truncated = tuple(row_of[position] for position in embedding.truncated if position in row_of)
        increment = Increment(
            rows=np.array(rows, dtype=np.int32),
            vectors=embedding.vectors[positions] if positions else np.empty((0, self.results.dimensions), np.float32),
            truncated=truncated,
            billed_tokens=embedding.billed_tokens,
            requests=requests,
            windows=(tuple(rows),) if together else (),
        )
        counts = self._requester.counts
        counts.add(self.job, passages=self.results.add(increment), tokens=embedding.billed_tokens)
        counts.requests += requests
        if counts.quoted_tokens is not None:
            counts.quoted_tokens += sum(self._quoted.pop(row, 0.0) for row in rows)
        counts.truncated += len(truncated)
