"""The requests for one shard: refused ones halved until the bad passage is alone, bad vectors asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

import numpy as np
from anyio import to_thread

from embedmill.dataset.layout import Failure
from embedmill.embedder import Embedding
from embedmill.errors import InputRejected, PassageTooLarge, RequestTooLarge
from embedmill.failpoints import afailpoint

from .attempts import naming_the_unforeseen
from .gate import inspect
from .requesting import Requester
from .results import Increment, ShardResults

_GATE_TRIES = 4


class ShardRequests:
    """Brings the answers for one shard into its results. ids, texts: (id, version) and text of every row.

    job: its key, for what is counted; sending: entered around each request of some rows, once the budget lets it go.
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
    ) -> None:
        self._requester = requester
        self._results = results
        self._ids = ids
        self._texts = texts
        self._dtype: np.dtype[np.floating] = np.dtype(dtype)
        self.sending: Callable[[Sequence[int]], AbstractAsyncContextManager[object]] = nullcontext
        self._job = job
        self._tokens: dict[int, int] = {}

    async def estimate(self, rows: Sequence[int]) -> list[int]:
        """Tokens that each of these rows counts in a request. Raises EmbedderFailed."""
        texts = [self._texts[row] for row in rows]
        with naming_the_unforeseen():
            tokens = await to_thread.run_sync(self._requester.embedder.estimate_tokens, texts)
        self._tokens.update(zip(rows, tokens, strict=True))
        return tokens

    async def embed(self, rows: Sequence[int], *, tries: int = _GATE_TRIES, since_s: float | None = None) -> None:
        """Embed rows that were estimated, in one request; bisect when their content is refused, until the bad one is alone.

        A row whose vector does not pass the gate is asked for again by itself, so many `tries` in all. since_s: when the
        first complaint came that led here; nothing is buried before the provider has done something else well since.
        """
        texts = [self._texts[row] for row in rows]
        began_s = time.monotonic()
        await afailpoint("worker.before_request")
        try:
            embedding = await self._requester.ask(
                texts,
                est_tokens=sum(self._tokens[row] for row in rows),
                on_waste=lambda answer: self._add([], answer, []),
                sending=lambda: self.sending(rows),
            )
        except InputRejected as error:
            await self._bisect(rows, error, tries=tries, since_s=since_s or began_s)
            return
        await afailpoint("worker.after_request")
        report = inspect(embedding.vectors, texts, dimensions=self._results.dimensions, dtype=self._dtype)
        good = [position for position in range(len(rows)) if position not in report.bad]
        self._add([rows[position] for position in good], embedding, good)
        for position, cause in report.bad.items():
            if tries <= 1:
                await self._requester.require_well(since_s=since_s or began_s, complaint=cause)
                self.fail(rows[position], code="gate", cause=cause)
            else:
                await self.embed([rows[position]], tries=tries - 1, since_s=since_s or began_s)

    def fail(self, row: int, *, code: str, cause: str) -> None:
        """Make a row a dead letter."""
        id_, version = self._ids[row]
        none = np.empty((0, self._results.dimensions), np.float32)
        failure = Failure(row, id_, version, code, cause)
        self._results.add(Increment(np.empty(0, np.int32), none, failures=(failure,)))
        self._requester.counts.failed += 1

    async def _bisect(self, rows: Sequence[int], refusal: InputRejected, *, tries: int, since_s: float) -> None:
        if len(rows) > 1:
            middle = len(rows) // 2
            await self.embed(rows[:middle], tries=tries, since_s=since_s)
            await self.embed(rows[middle:], tries=tries, since_s=since_s)
            return
        if isinstance(refusal, RequestTooLarge):
            raise PassageTooLarge(
                f"passage {self._ids[rows[0]][0]} is too large: {refusal}; nothing is lost, go on with other limits"
            ) from refusal
        await self._requester.require_well(since_s=since_s, complaint=str(refusal))
        self.fail(rows[0], code=refusal.code, cause=str(refusal))

    def _add(self, rows: list[int], embedding: Embedding, positions: list[int]) -> None:
        row_of = dict(zip(positions, rows, strict=True))
        truncated = tuple(row_of[position] for position in embedding.truncated if position in row_of)
        increment = Increment(
            rows=np.array(rows, dtype=np.int32),
            vectors=embedding.vectors[positions] if positions else np.empty((0, self._results.dimensions), np.float32),
            truncated=truncated,
            billed_tokens=embedding.billed_tokens,
            requests=1,
        )
        counts = self._requester.counts
        counts.add(self._job, passages=self._results.add(increment), tokens=embedding.billed_tokens)
        counts.requests += 1
        counts.truncated += len(truncated)
