"""Requests with late chunking: the rows of one are embedded together, so nothing of an answer is kept without the rest.

A window that the provider cannot take together is halved at a passage border, which the marker tells. A refusal for content
is looked into part by part, and what the parts bring is thrown away: without the bad passage, the others are embedded
together once more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from embedmill.errors import InputRejected, InputTooLong, RequestTooLarge, TooManyInputs
from embedmill.failpoints import afailpoint

from .gate import inspect
from .shard_requests import GATE_TRIES, ShardRequests


class TogetherRequests(ShardRequests):
    """`ShardRequests` whose `embed` takes a window of one document."""

    async def embed(self, rows: Sequence[int], *, tries: int = GATE_TRIES, since_s: float | None = None) -> None:
        """Embed rows that were estimated, together. See `ShardRequests.embed`; rows that do not pass the gate are asked for
        again with the whole window."""
        began_s = since_s or time.monotonic()
        await afailpoint("worker.before_request")
        try:
            embedding = await self._ask(rows)
        except InputRejected as error:
            await self._refused(rows, error, tries=tries, since_s=began_s)
            return
        await afailpoint("worker.after_request")
        texts = [self.texts[row] for row in rows]
        report = inspect(embedding.vectors, texts, dimensions=self.results.dimensions, dtype=self._dtype)
        if report.bad and tries > 1:
            self._add([], embedding, [])
            if not self.on_trial:
                self._requester.take_retry(next(iter(report.bad.values())))
            await self.embed(rows, tries=tries - 1, since_s=began_s)
            return
        good = [position for position in range(len(rows)) if position not in report.bad]
        self._add([rows[position] for position in good], embedding, good, together=True)
        for position, cause in report.bad.items():
            await self._requester.require_well(since_s=began_s, complaint=cause, lane=self.lane, cap=self.cap)
            self.fail(rows[position], code="gate", cause=cause)

    async def _refused(self, rows: Sequence[int], refusal: InputRejected, *, tries: int, since_s: float) -> None:
        if len(rows) == 1:
            await self._bury_refused(rows[0], refusal, since_s=since_s)
            return
        bad: dict[int, InputRejected] = {}
        if not isinstance(refusal, (InputTooLong, RequestTooLarge, TooManyInputs)):
            bad = await self._find_refused(rows)
        for row, error in bad.items():
            await self._bury_refused(row, error, since_s=since_s)
        left = [row for row in rows if row not in bad]
        # Each part passes, and all of them together do not.
        for window in [left] if bad else self._halved(left):
            if window:
                await self.embed(window, tries=tries, since_s=since_s)

    async def _find_refused(self, rows: Sequence[int]) -> dict[int, InputRejected]:
        """The rows that are refused also when they are alone."""
        bad: dict[int, InputRejected] = {}
        for part in self._halved(rows):
            try:
                embedding = await self._ask(part)
            except InputRejected as error:
                bad |= {part[0]: error} if len(part) == 1 else await self._find_refused(part)
            else:
                self._add([], embedding, [])
        return bad

    def _halved(self, rows: Sequence[int]) -> list[list[int]]:
        """Two parts of about as many tokens, neither of them empty."""
        total, held, middle = sum(self._tokens[row] for row in rows), 0, 0
        while middle < len(rows) - 1 and (not middle or held + self._tokens[rows[middle]] <= total / 2):
            held += self._tokens[rows[middle]]
            middle += 1
        return [list(rows[:middle]), list(rows[middle:])]
