"""The output of a finished batch, line by line into the results of its shard, through the same gate as any answer.

A line that refuses its text is a dead letter; whatever else a line lacks is left owed, for an ordinary request. Where many
lines lack it, nothing is asked for again at the ordinary price without a person.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.dataset.layout import Failure
from embedmill.dataset.submissions import Intent, Submission
from embedmill.errors import BatchHeld, BatchPending, OutcomeUnknown
from scheduler.caps import Cap

from .batch_endpoint import BatchEndpoint, BatchLine, BatchStatus, OutputMissing
from .batch_matching import held_error
from .gate import inspect
from .requesting import Requester
from .results import Increment, ShardResults, billed_only

_BLOCK_LINES = 256
_FEW, _FEW_SHARE = 16, 0.1
_TRIES = 3
_ALIKE = 0.98


class BatchResults:
    """Fetches batches for one shard.

    ids, texts: of every row; job: its key, for what is counted; cap: of the job, for ordinary requests; attempts: of its
    task that failed before; stopping: whether to let it be, for later.
    """

    def __init__(
        self,
        requester: Requester,
        results: ShardResults,
        *,
        ids: Sequence[tuple[str, int]],
        texts: Sequence[str],
        job: str,
        cap: Cap,
        dtype: str,
        attempts: int,
        stopping: Callable[[], bool],
    ) -> None:
        self._requester = requester
        self._results = results
        self._ids = ids
        self._texts = texts
        self._job = job
        self._cap = cap
        self._dtype: np.dtype[np.floating] = np.dtype(dtype)
        self._attempts = attempts
        self._stopping = stopping
        self._without_output: set[str] = set()

    async def compare(self, endpoint: BatchEndpoint, submission: Submission, batch: BatchStatus) -> bool:
        """Make sure that the endpoint's vectors are those that ordinary requests get, by asking for one text again; whether
        there was a vector to compare. Raises BatchHeld where they are not, and like any request."""
        async with aclosing(self._output(endpoint, batch)) as lines:
            async for line in lines:
                row = submission.intent.row_of(line.custom_id)
                if line.vector is None or row is None or row >= len(self._texts):
                    continue
                if not (line.vector.any() and np.isfinite(line.vector).all()):
                    continue
                texts = [self._texts[row]]
                estimates = await to_thread.run_sync(self._requester.embedder.estimate_tokens, texts)
                break
            else:
                return False
        answer = await self._requester.ask(texts, est_tokens=sum(estimates), on_waste=lambda _: None, cap=self._cap)
        self._results.add(billed_only(answer.billed_tokens, requests=1, dimensions=self._results.dimensions))
        self._requester.counts.control_tokens += answer.billed_tokens
        alike = _cosine(line.vector, answer.vectors[0])
        if not alike >= _ALIKE:
            raise BatchHeld(
                f"the batch endpoint's vector of passage {self._ids[row][0]} is not the one that an ordinary request gets"
                f" (cosine {alike:.3f}): nothing of {batch.batch_id} is stored. `embedmill run --no-batch` after"
                " `embedmill batches discard` embeds the job by ordinary requests"
            )
        return True

    async def fetch(self, endpoint: BatchEndpoint, submission: Submission, batch: BatchStatus) -> None:
        """Bring a completed batch into the results.

        Raises BatchHeld where too many lines are of no use, or its output is not there however often it is asked for,
        TransientError where the output breaks off, BatchPending when told to stop.
        """
        intent = submission.intent
        wanted = set(intent.row_numbers())
        rejected, useless = dict[int, str](), dict[int, str]()
        good, block = 0, dict[int, NDArray[np.float32]]()
        async with aclosing(self._output(endpoint, batch)) as lines:
            async for line in lines:
                row = _wanted_row(line, intent, wanted)
                if row is None:
                    continue
                wanted.discard(row)
                if line.vector is None:
                    (rejected if line.rejected else useless)[row] = line.error
                else:
                    block[row] = line.vector
                if len(block) >= _BLOCK_LINES:
                    good += self._take(block, useless)
                    block.clear()
                if self._stopping():
                    raise BatchPending(f"{batch.batch_id} is fetched later", retry_after_s=1.0)
        good += self._take(block, useless)
        if wanted and (batch.failed or batch.has_errors):
            with suppress(OutputMissing):
                async with aclosing(endpoint.errors(batch.batch_id)) as lines:
                    async for line in lines:
                        row = _wanted_row(line, intent, wanted)
                        if row is not None:
                            wanted.discard(row)
                            (rejected if line.rejected else useless)[row] = line.error
        if wanted:
            self._accept_missing(len(wanted), submission, batch)
        useless.update(dict.fromkeys(wanted, "the output does not have its line"))
        owed = set(self._results.owed())
        lost = [row for row in useless if row in owed]
        if len(lost) > max(_FEW, _FEW_SHARE * len(intent.row_numbers())):
            raise held_error(
                submission,
                f"{batch.batch_id} has no usable vector for {len(lost)} of {len(intent.row_numbers())} passages"
                f" ({useless[lost[0]]})",
            )
        if rejected and not good:
            complaint = next(iter(rejected.values()))
            await self._requester.require_well(since_s=time.monotonic(), complaint=complaint, cap=self._cap)
        self._bury(rejected)

    def _accept_missing(self, lines: int, submission: Submission, batch: BatchStatus) -> None:
        """Raises OutcomeUnknown while they may come, BatchHeld where the whole output is not there."""
        if self._attempts < _TRIES:
            raise OutcomeUnknown(f"the output of {batch.batch_id} lacks {lines} lines")
        if batch.batch_id in self._without_output:
            raise held_error(submission, f"{batch.batch_id} is completed, and the provider does not have its output")

    async def _output(self, endpoint: BatchEndpoint, batch: BatchStatus) -> AsyncGenerator[BatchLine, None]:
        """Without lines where there is none, and then for as long as this delivery looks at it: what `compare` did not see,
        `fetch` does not store."""
        if batch.batch_id in self._without_output:
            return
        try:
            async with aclosing(endpoint.output(batch.batch_id)) as lines:
                async for line in lines:
                    yield line
        except OutputMissing:
            self._without_output.add(batch.batch_id)

    def _take(self, block: dict[int, NDArray[np.float32]], useless: dict[int, str]) -> int:
        """How many vectors passed the gate; the others are of no use."""
        if not block:
            return 0
        rows, vectors = list(block), np.stack(list(block.values()))
        report = inspect(
            vectors, [self._texts[row] for row in rows], dimensions=self._results.dimensions, dtype=self._dtype
        )
        if report.alike:
            useless.update(dict.fromkeys(rows, "different texts have one and the same vector"))
            return 0
        useless.update({rows[position]: cause for position, cause in report.bad.items()})
        passed = [position for position in range(len(rows)) if position not in report.bad]
        increment = Increment(np.array([rows[position] for position in passed], np.int32), vectors[passed])
        counts = self._requester.counts
        counts.add(self._job, passages=self._results.add(increment), tokens=0)
        if counts.quoted_tokens is not None and self._requester.quoted_tokens is not None:
            quoted = self._requester.quoted_tokens([self._texts[row] for row in increment.rows])
            counts.quoted_tokens += float(quoted.sum())
        return len(passed)

    def _bury(self, rejected: dict[int, str]) -> None:
        failures = tuple(
            Failure(row, *self._ids[row], "input_rejected", f"the batch endpoint refused it: {cause}")
            for row, cause in sorted(rejected.items())
        )
        if failures:
            none = billed_only(0, dimensions=self._results.dimensions)
            self._results.add(replace(none, failures=failures))
            self._requester.counts.failed += len(failures)


def _wanted_row(line: BatchLine, intent: Intent, wanted: set[int]) -> int | None:
    row = intent.row_of(line.custom_id)
    return row if row in wanted else None


def _cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    one, other = left.astype(np.float64), right.astype(np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
