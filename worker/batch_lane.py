"""The lane for jobs that can wait: passages are handed to the provider's batch endpoint, and fetched when they are done.

All that is known stands in the dataset, none of it in a process: a task is handed back between two looks, and whoever takes
it next goes on. What is sent is noted before; what may have been sent is looked for, and is not sent again unless it
certainly reached nobody. A batch that failed as a whole is sent once more, under a new intent; then a person decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import How, Intent, Submission, Submissions
from embedmill.errors import (
    BatchHeld,
    BatchPending,
    CapReached,
    InvalidKey,
    NoBalance,
)
from embedmill.failpoints import afailpoint

from .batch_endpoint import BatchEndpoint, BatchStatus
from .batch_matching import Matching, Sightings, held_error, unknown_error
from .batch_pace import LOOK_AGAIN_S, Pace, uncounted
from .batch_results import BatchResults
from .batch_sending import BatchSender
from .requesting import Requester
from .results import billed_only
from .shard_requests import ShardRequests

_FIRST_LOOK_S, _LONGEST_LOOK_S = 1.0, 300.0
_MOST_SENT = 2


@dataclass(slots=True)
class Compared:
    """Datasets (by id) for which the endpoint's vectors have been found to be those of ordinary requests."""

    datasets: set[str] = field(default_factory=set)
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class BatchLane:
    """One shard on its way through the endpoint.

    endpoints: one for each key, also of those that are refused; senders: of the keys that may be used, at least one;
    submits: whether what is owed is sent, or only what was sent is fetched. compared, sightings, pace: shared by all lanes
    of a process.
    """

    def __init__(
        self,
        endpoints: Sequence[BatchEndpoint],
        senders: Sequence[BatchEndpoint],
        requester: Requester,
        dataset: Dataset,
        shard: int,
        *,
        worker: str,
        submits: bool,
        compared: Compared,
        sightings: Sightings,
        pace: Pace,
    ) -> None:
        self._endpoints = list(endpoints)
        self._requester = requester
        self._dataset = dataset
        self._shard = shard
        self._submits = submits
        self._compared = compared
        self._sightings = sightings
        self._job = dataset.admission(shard).job
        self._submissions = Submissions(dataset)
        self._seen: dict[str, tuple[BatchEndpoint, BatchStatus]] = {}
        self._sender = BatchSender(senders, requester, dataset, shard, worker=worker, pace=pace, seen=self._seen)

    async def look(self) -> None:
        """Raises BatchPending when all that was sent is still on its way, or there is no place for what was not: the shard
        need not even be read then."""
        if self._submits and not await self._read():
            await self._sender.require_place()
        submissions = await self._open()
        if not submissions or any(one.accepted is None for one in submissions):
            return
        for submission in submissions:
            try:
                _, batch = await self._status(submission)
            except BatchHeld:
                # `work_off` says so, once it has fetched the others of the shard.
                return
            if not batch.is_open:
                return
        raise self._pending(submissions[0])

    async def work_off(
        self,
        requests: ShardRequests,
        *,
        keep: Callable[[], Awaitable[None]],
        stopping: Callable[[], bool],
    ) -> None:
        """Fetch what is done and send what is owed. What is owed after it is for ordinary requests.

        requests: of the shard; keep: puts results into a checkpoint; stopping: nothing more is sent. Raises BatchPending
        while anything is with the provider, BatchHeld, CapReached, TransientError, JobFatalError.
        """
        results = requests.results
        fetching = BatchResults(requests, self._sightings, stopping=stopping)
        trouble: BatchPending | BatchHeld | CapReached | None = None
        for submission in await self._open():
            try:
                await self._go_on(submission, fetching, keep, job=requests.job)
            except (BatchPending, BatchHeld, CapReached) as error:
                # The output of another one may be gone before this one's trouble is over.
                if trouble is None or isinstance(trouble, BatchPending):
                    trouble = error
        if trouble is not None:
            raise trouble
        last_number = await to_thread.run_sync(self._submissions.last_number, self._shard)
        submissions = await self._read()
        # The marker says what all of them were billed; their lines in the spend log are written already.
        ended = [one.ended for one in submissions if one.ended is not None]
        billed = sum(one.tokens for one in ended)
        results.add(billed_only(billed, requests=len(ended), dimensions=results.dimensions), kept=True)
        waiting = await self._open()
        covered = {
            row
            for one in submissions
            if one.ended is None or one.ended.how == "done"
            for row in one.intent.row_numbers()
        }
        fresh = [row for row in results.owed() if row not in covered]
        if self._submits and fresh and not stopping():
            self._refuse_what_keeps_failing(submissions, fresh)
            try:
                await self._sender.send(fresh, requests.texts, stopping, cap=requests.cap, number=last_number + 1)
            except BatchPending:
                # What makes room may be ours, and done sooner.
                if not await self._open():
                    raise
            waiting = await self._open()
        if waiting:
            raise self._pending(waiting[0])

    async def _go_on(
        self, submission: Submission, fetching: BatchResults, keep: Callable[[], Awaitable[None]], *, job: str
    ) -> None:
        if submission.accepted is None:
            if await self._find(submission) is None:
                return
            submission = next(one for one in await self._read() if one.intent == submission.intent)
        try:
            await self._finish(submission, fetching, keep, job=job)
        except (BatchHeld, CapReached) as error:
            # So that no other shard of the job takes it for one that is worth waiting for.
            await to_thread.run_sync(self._submissions.hold, submission.intent, str(error))
            raise

    async def _finish(
        self, submission: Submission, fetching: BatchResults, keep: Callable[[], Awaitable[None]], *, job: str
    ) -> None:
        """Fetch and end one with a batch, once that is done."""
        endpoint, batch = await self._status(submission)
        if batch.is_open:
            return
        if batch.state == "cancelled":
            raise held_error(submission, f"{batch.batch_id} was cancelled, though not by this job")
        # What it cost is known from here on, and the cap has the rest of its bound back.
        await to_thread.run_sync(self._note_bill, submission.intent, batch)
        if batch.state == "completed":
            async with self._compared.lock:
                known = self._dataset.info.id in self._compared.datasets
                if not known and await fetching.compare(endpoint, submission, batch):
                    self._compared.datasets.add(self._dataset.info.id)
            await fetching.fetch(endpoint, submission, batch)
            await keep()
            await afailpoint("batch.after_results")
        billed = await to_thread.run_sync(partial(self._end, submission.intent, batch))
        await afailpoint("batch.after_end")
        self._requester.counts.add(job, passages=0, tokens=billed)
        self._requester.counts.requests += 1

    def _note_bill(self, intent: Intent, batch: BatchStatus) -> None:
        self._submissions.spend(intent, batch.batch_id, job=self._job, tokens=_billed(intent, batch))

    def _end(self, intent: Intent, batch: BatchStatus) -> int:
        """What it was billed; 0 where somebody else has said so already."""
        tokens = _billed(intent, batch)
        how: How = "done" if batch.state == "completed" else "failed" if batch.state == "failed" else "expired"
        return tokens if self._submissions.end(intent, how, tokens=tokens, reason=batch.error) else 0

    async def _find(self, submission: Submission) -> str | None:
        """See `Matching.find`."""
        *others, last = self._who_may_know(submission.intent)
        for endpoint in others:
            with suppress(InvalidKey, NoBalance):
                return await self._find_with(endpoint, submission)
        return await self._find_with(last, submission)

    async def _find_with(self, endpoint: BatchEndpoint, submission: Submission) -> str | None:
        with uncounted():
            return await Matching(endpoint, self._submissions, self._sightings).find(submission)

    async def _status(self, submission: Submission) -> tuple[BatchEndpoint, BatchStatus]:
        """Of a submission with a batch, and who knows it. Raises BatchPending or BatchHeld where nobody does."""
        assert submission.accepted is not None
        batch_id = submission.accepted.batch_id
        if batch_id not in self._seen:
            self._seen[batch_id] = await self._ask(submission, batch_id)
            if submission.held is not None and self._seen[batch_id][1].is_open:
                await to_thread.run_sync(self._submissions.unhold, submission.intent)
        return self._seen[batch_id]

    async def _ask(self, submission: Submission, batch_id: str) -> tuple[BatchEndpoint, BatchStatus]:
        refusal: InvalidKey | NoBalance | None = None
        own_key: bool | None = None
        for endpoint in self._who_may_know(submission.intent):
            try:
                with uncounted():
                    status = await endpoint.status(batch_id)
            except (InvalidKey, NoBalance) as error:
                refusal = error
                continue
            if status is not None:
                return endpoint, status
            own_key = endpoint.key_id == submission.intent.key
            if own_key:
                break
        if refusal is not None and own_key is None:
            raise refusal
        raise unknown_error(submission, own_key=bool(own_key))

    def _refuse_what_keeps_failing(self, submissions: Sequence[Submission], rows: Sequence[int]) -> None:
        failed = [one for one in submissions if one.ended is not None and one.ended.how in ("failed", "expired")]
        times = Counter(row for one in failed for row in one.intent.row_numbers())
        if failed and max(times[row] for row in rows) >= _MOST_SENT:
            last = failed[-1]
            reason = last.ended.reason or last.ended.how if last.ended is not None else ""
            raise BatchHeld(
                f"batches for shard {self._shard} failed {_MOST_SENT} times, the last one with: {reason}; nothing is sent"
                " again by itself. `embedmill run --no-batch` embeds the rest of the job by ordinary requests"
            )

    def _who_may_know(self, intent: Intent) -> list[BatchEndpoint]:
        """With the key that it was sent with, also where that sends nothing more; then others, of the same owner's maybe."""
        own = [one for one in self._endpoints if one.key_id == intent.key]
        return own + [one for one in self._sender.endpoints if one.key_id != intent.key]

    async def _open(self) -> list[Submission]:
        return [one for one in await self._read() if one.is_open]

    async def _read(self) -> list[Submission]:
        return await to_thread.run_sync(self._submissions.of_shard, self._shard)

    def _pending(self, submission: Submission) -> BatchPending:
        """To be looked at again after a quarter of the time that it has waited."""
        accepted, intent = submission.accepted, submission.intent
        if accepted is None:
            return BatchPending(f"submission {intent.name} is unanswered", retry_after_s=LOOK_AGAIN_S)
        waited_s = (datetime.now(tz=UTC) - datetime.fromisoformat(accepted.at)).total_seconds()
        _, seen = self._seen.get(accepted.batch_id, (None, None))
        words = f", {seen.completed + seen.failed:,} of {len(intent.row_numbers()):,} passages" if seen else ""
        return BatchPending(
            f"waiting for {accepted.batch_id} of shard {self._shard}{words}",
            retry_after_s=min(_LONGEST_LOOK_S, max(_FIRST_LOOK_S, waited_s / 4)),
        )


def _billed(intent: Intent, batch: BatchStatus) -> int:
    """Its estimate, where the provider does not say."""
    return batch.tokens or (intent.tokens if batch.state == "completed" else 0)
