"""The output of a finished batch, line by line into the results of its shard, through the same gate as any answer.

Whatever a line lacks is left owed, for an ordinary request, which also says whether the text is to blame. Where many lines
lack it, nothing is asked for again at the ordinary price without a person.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset.submissions import Intent, Submission
from embedmill.errors import BatchHeld, BatchPending

from .batch_endpoint import BatchEndpoint, BatchLine, BatchStatus, OutputMissing
from .batch_matching import Sightings, held_error
from .batch_pace import LOOK_AGAIN_S, uncounted
from .shard_requests import ShardRequests

_BLOCK_LINES = 256
_FEW, _FEW_SHARE = 16, 0.1
_ALIKE = 0.98


class BatchResults:
    """Fetches batches for one shard. stopping: whether to let it be, for later."""

    def __init__(self, requests: ShardRequests, sightings: Sightings, *, stopping: Callable[[], bool]) -> None:
        self._requests = requests
        self._sightings = sightings
        self._stopping = stopping
        self._without_output: set[str] = set()

    async def compare(self, endpoint: BatchEndpoint, submission: Submission, batch: BatchStatus) -> bool:
        """Make sure that the endpoint's vectors are those that ordinary requests get, by asking for one text again; whether
        there was a vector to compare. Raises BatchHeld where they are not, BatchPending where the output breaks off, and
        like any request."""
        rows = set(submission.intent.row_numbers())
        async with aclosing(self._output(endpoint, batch)) as lines:
            async for line in lines:
                row = _wanted_row(line, submission.intent, rows)
                if row is not None and line.vector is not None and line.vector.any() and np.isfinite(line.vector).all():
                    break
            else:
                return False
        alike = _cosine(line.vector, await self._requests.ask_again(row))
        if not alike >= _ALIKE:
            raise BatchHeld(
                f"the batch endpoint's vector of passage {self._requests.ids[row][0]} is not the one that an ordinary"
                f" request gets (cosine {alike:.3f}): nothing of {batch.batch_id} is stored. `embedmill run --no-batch`"
                f" after `embedmill batches discard {submission.intent.name} --to DATASET` embeds the job by ordinary"
                " requests"
            )
        return True

    async def fetch(self, endpoint: BatchEndpoint, submission: Submission, batch: BatchStatus) -> None:
        """Bring a completed batch into the results.

        Raises BatchHeld where too many lines are of no use, or its output is not there even a minute later, BatchPending
        where lines may yet come, where the output breaks off, and when told to stop.
        """
        intent = submission.intent
        wanted = set(intent.row_numbers())
        useless, block = dict[int, str](), dict[int, NDArray[np.float32]]()
        async with aclosing(self._output(endpoint, batch)) as lines:
            async for line in lines:
                row = _wanted_row(line, intent, wanted)
                if row is None:
                    continue
                wanted.discard(row)
                if line.vector is None:
                    useless[row] = line.error
                else:
                    block[row] = line.vector
                if len(block) >= _BLOCK_LINES:
                    useless |= await self._requests.take(block)
                    block.clear()
                if self._stopping():
                    raise BatchPending(f"{batch.batch_id} is fetched later", retry_after_s=1.0)
        useless |= await self._requests.take(block)
        if wanted and (batch.failed or batch.has_errors):
            with uncounted(), suppress(OutputMissing):
                async with aclosing(endpoint.errors(batch.batch_id)) as lines:
                    async for line in lines:
                        row = _wanted_row(line, intent, wanted)
                        if row is not None:
                            wanted.discard(row)
                            useless[row] = line.error
        if wanted:
            self._accept_missing(len(wanted), submission, batch)
        useless |= dict.fromkeys(wanted, "the output does not have its line")
        owed = set(self._requests.results.owed())
        lost = [row for row in useless if row in owed]
        if len(lost) > max(_FEW, _FEW_SHARE * len(intent.row_numbers())):
            raise held_error(
                submission,
                f"{batch.batch_id} has no usable vector for {len(lost)} of {len(intent.row_numbers())} passages"
                f" ({useless[lost[0]]})",
            )

    def _accept_missing(self, lines: int, submission: Submission, batch: BatchStatus) -> None:
        """Raises BatchPending while they may come, BatchHeld where the whole output is not there."""
        if self._sightings.may_be_late(batch.batch_id):
            raise BatchPending(f"the output of {batch.batch_id} lacks {lines} lines", retry_after_s=LOOK_AGAIN_S)
        if batch.batch_id in self._without_output:
            raise held_error(submission, f"{batch.batch_id} is completed, and the provider does not have its output")

    async def _output(self, endpoint: BatchEndpoint, batch: BatchStatus) -> AsyncGenerator[BatchLine, None]:
        """Without lines where there is none, and then for as long as this delivery looks at it: what `compare` did not see,
        `fetch` does not store."""
        if batch.batch_id in self._without_output:
            return
        with uncounted():
            try:
                async with aclosing(endpoint.output(batch.batch_id)) as lines:
                    async for line in lines:
                        yield line
            except OutputMissing:
                self._without_output.add(batch.batch_id)


def _wanted_row(line: BatchLine, intent: Intent, wanted: set[int]) -> int | None:
    row = intent.row_of(line.custom_id)
    return row if row in wanted else None


def _cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    one, other = left.astype(np.float64), right.astype(np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
