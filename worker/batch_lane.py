"""The lane for jobs that can wait: passages are handed to the provider's batch endpoint, and fetched when they are done.

All that is known stands in the dataset, none of it in a process: a task is handed back between two looks, and whoever takes
it next goes on. What is sent is noted before; what may have been sent is looked for, and is not sent again unless it
certainly reached nobody. A batch that failed as a whole is sent once more, under a new intent; then a person decides.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    EmbedmillError,
    InputRejected,
    InvalidKey,
    NoBalance,
    ObjectExists,
    OutcomeUnknown,
    Overloaded,
    RequestTooLarge,
)
from embedmill.failpoints import afailpoint
from scheduler.caps import Cap

from .batch_caps import CapRoom
from .batch_endpoint import BatchEndpoint, BatchStatus
from .batch_matching import LOOK_AGAIN_S, Matching, Sightings, held_error
from .batch_results import BatchResults
from .requesting import Requester
from .results import ShardResults, billed_only

MOST_OPEN = 64
_PLACE_AGAIN_S, _WAITING_PER_S = 10.0, 5.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 1.0, 300.0
_MOST_SENT = 2
# Between intent and request; older ones are let be, see `batch_matching.SETTLED_S`.
_SENT_WITHIN_S = 30.0


@dataclass(slots=True)
class Compared:
    """Datasets (by id) for which the endpoint's vectors have been found to be those of ordinary requests."""

    datasets: set[str] = field(default_factory=set)
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class BatchLane:
    """One shard on its way through the endpoint.

    endpoints: one for each key that may be used, at least one; submits: whether what is owed is sent, or only what was
    sent is fetched. compared, sightings: shared by all lanes of a process.
    """

    def __init__(
        self,
        endpoints: Sequence[BatchEndpoint],
        requester: Requester,
        dataset: Dataset,
        shard: int,
        *,
        worker: str,
        submits: bool,
        attempts: int,
        compared: Compared,
        sightings: Sightings,
    ) -> None:
        self._endpoints = list(endpoints)
        self._requester = requester
        self._dataset = dataset
        self._shard = shard
        self._worker = worker
        self._submits = submits
        self._attempts = attempts
        self._compared = compared
        self._sightings = sightings
        self._submissions = Submissions(dataset)
        self._seen: dict[str, BatchStatus] = {}

    async def look(self) -> None:
        """Raises BatchPending when all that was sent is still on its way, or there is no place for what was not: the shard
        need not even be read then."""
        if self._submits and not await self._read():
            await to_thread.run_sync(self._require_place)
        submissions = await self._open()
        if not submissions or any(one.accepted is None for one in submissions):
            return
        for submission in submissions:
            if not (await self._status(submission)).is_open:
                return
        raise self._pending(submissions[0])

    async def work_off(
        self,
        *,
        ids: Sequence[tuple[str, int]],
        texts: Sequence[str],
        results: ShardResults,
        job: str,
        cap: Cap,
        keep: Callable[[], Awaitable[None]],
        stopping: Callable[[], bool],
    ) -> None:
        """Fetch what is done and send what is owed. What is owed after it is for ordinary requests.

        ids, texts: of every row; cap: of the job, for ordinary requests; keep: puts results into a checkpoint; stopping:
        nothing more is sent. Raises BatchPending while anything is with the provider, BatchHeld, CapReached,
        TransientError, JobFatalError.
        """
        fetching = BatchResults(
            self._requester, results,
            ids=ids, texts=texts, job=job, cap=cap, dtype=self._dataset.info.dtype, attempts=self._attempts,
            stopping=stopping,
        )  # fmt: skip
        submissions = await self._read()
        for submission in submissions:
            if submission.is_open:
                await self._go_on(submission, fetching, keep, job=job)
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
                await self._send(fresh, texts, stopping, cap=cap, number=last_number + 1)
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
            with _uncounted():
                endpoint = self._endpoint_of(submission.intent)
                batch_id = await Matching(endpoint, self._submissions, self._sightings).find(submission)
            if batch_id is None:
                return
            submission = next(one for one in await self._read() if one.intent == submission.intent)
        batch = await self._status(submission)
        if batch.is_open:
            return
        if batch.state == "cancelled":
            raise held_error(submission, f"{batch.batch_id} was cancelled, though not by this job")
        # What it cost is known from here on, and the cap has the rest of its bound back.
        await to_thread.run_sync(self._note_bill, submission.intent, batch)
        if batch.state == "completed":
            async with self._compared.lock:
                if self._dataset.info.id not in self._compared.datasets:
                    endpoint = self._endpoint_of(submission.intent)
                    if await fetching.compare(endpoint, submission, batch):
                        self._compared.datasets.add(self._dataset.info.id)
            await fetching.fetch(self._endpoint_of(submission.intent), submission, batch)
            await keep()
            await afailpoint("batch.after_results")
        billed = await to_thread.run_sync(partial(self._end, submission.intent, batch))
        await afailpoint("batch.after_end")
        self._requester.counts.add(job, passages=0, tokens=billed)
        self._requester.counts.requests += 1

    def _note_bill(self, intent: Intent, batch: BatchStatus) -> None:
        job = self._dataset.admission(self._shard).job
        self._submissions.spend(intent, batch.batch_id, job=job, tokens=_billed(intent, batch))

    def _end(self, intent: Intent, batch: BatchStatus) -> int:
        """What it was billed; 0 where somebody else has said so already."""
        tokens = _billed(intent, batch)
        how: How = "done" if batch.state == "completed" else "failed" if batch.state == "failed" else "expired"
        return tokens if self._submissions.end(intent, how, tokens=tokens, reason=batch.error) else 0

    async def _status(self, submission: Submission) -> BatchStatus:
        """Of a submission with a batch. Raises BatchHeld for one that the provider does not have."""
        assert submission.accepted is not None
        batch_id = submission.accepted.batch_id
        if batch_id not in self._seen:
            with _uncounted():
                status = await self._endpoint_of(submission.intent).status(batch_id)
            if status is None:
                raise held_error(submission, self._why_unknown(submission.intent, batch_id))
            self._seen[batch_id] = status
        return self._seen[batch_id]

    def _why_unknown(self, intent: Intent, batch_id: str) -> str:
        if intent.key != self._endpoint_of(intent).key_id:
            return f"{batch_id} was sent with another API key ({intent.key}), and this one does not know it"
        return f"the provider does not know {batch_id} any more, or its output is gone"

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

    async def _send(
        self, rows: Sequence[int], texts: Sequence[str], stopping: Callable[[], bool], *, cap: Cap, number: int
    ) -> None:
        room = CapRoom(self._dataset, job=self._dataset.admission(self._shard).job, cap=cap)
        left, most_bytes, most_lines = list(rows), self._endpoints[0].max_bytes, self._endpoints[0].max_lines
        while left and not stopping():
            await to_thread.run_sync(self._require_place)
            taken = _fitting(left, texts, most_lines=most_lines, most_bytes=most_bytes)
            taken = await room.affordable([texts[row] for row in left[:taken]])
            wanted = [texts[row] for row in left[:taken]]
            try:
                with _uncounted():
                    async with cap.set_aside(wanted) as hold:
                        await self._submit(
                            self._endpoints[0], left[:taken], wanted,
                            room=room, most_tokens=hold.most_tokens, number=number,
                        )  # fmt: skip
            except CapReached:
                # Redis knows of more than the logs, as what dead workers may have spent.
                if taken == 1:
                    raise
                most_lines = taken // 2
                continue
            except (InvalidKey, NoBalance):
                # Another key of the same owner may do.
                if len(self._endpoints) == 1:
                    raise
                del self._endpoints[0]
                continue
            except RequestTooLarge as error:
                if taken == 1:
                    raise BatchHeld(f"a batch of one passage is too large for the provider: {error}") from error
                most_bytes = sum(_line_bytes(texts[row]) for row in left[:taken]) // 2
                continue
            left, number = left[taken:], number + 1

    async def _submit(
        self, endpoint: BatchEndpoint, rows: Sequence[int], texts: Sequence[str], *,
        room: CapRoom, most_tokens: int, number: int,
    ) -> None:  # fmt: skip
        """texts: of these rows."""
        listed, _ = await endpoint.recent()
        estimates = await to_thread.run_sync(self._requester.embedder.estimate_tokens, texts)
        began_s = time.monotonic()

        def intend() -> Intent:
            return self._submissions.intend(
                self._shard,
                rows,
                number=number,
                model=endpoint.model,
                tokens=sum(estimates),
                key=endpoint.key_id,
                api_base=endpoint.api_base,
                worker=self._worker,
                before=[batch.batch_id for batch in listed],
                most_tokens=most_tokens,
            )

        try:
            intent = await to_thread.run_sync(intend)
        except ObjectExists as error:
            raise BatchPending("somebody else is at this shard", retry_after_s=LOOK_AGAIN_S) from error
        await afailpoint("batch.after_intent")
        if not await room.holds():
            # Somebody else took the room meanwhile, or stands back likewise.
            await to_thread.run_sync(self._submissions.withdraw, intent)
            raise BatchPending("others were faster at the job's cap", retry_after_s=random.uniform(1.0, 3.0))
        if time.monotonic() - began_s > _SENT_WITHIN_S:
            # Somebody may already be looking for it.
            raise BatchPending(f"submission {intent.name} was not sent in time", retry_after_s=LOOK_AGAIN_S)
        status = await self._answer(endpoint, intent, dict(zip(map(intent.custom_id, rows), texts, strict=True)))
        with anyio.CancelScope(shield=True):
            await afailpoint("batch.after_submit")
            await to_thread.run_sync(partial(self._submissions.accept, intent, status.batch_id, by="answer"))
            await afailpoint("batch.after_accept")
        self._seen[status.batch_id] = status

    async def _answer(self, endpoint: BatchEndpoint, intent: Intent, texts: Mapping[str, str]) -> BatchStatus:
        """What certainly made no batch is taken back; of what may have, the intent stays, and is looked for."""
        try:
            return await endpoint.submit(texts)
        except OutcomeUnknown as error:
            raise BatchPending(f"{error}; submission {intent.name}", retry_after_s=LOOK_AGAIN_S) from error
        except EmbedmillError as error:
            await to_thread.run_sync(self._submissions.withdraw, intent)
            if isinstance(error, InputRejected) and not isinstance(error, RequestTooLarge):
                raise BatchHeld(f"the batch endpoint refuses a whole batch: {error}; nothing is lost") from error
            raise

    def _endpoint_of(self, intent: Intent) -> BatchEndpoint:
        """With the key that it was sent with, while that may be used; else another one of the same owner's."""
        return next((one for one in self._endpoints if one.key_id == intent.key), self._endpoints[0])

    async def _open(self) -> list[Submission]:
        return [one for one in await self._read() if one.is_open]

    def _require_place(self) -> None:
        """Raises BatchPending; those who wait come back at some speed together, however many they are."""
        owed = self._dataset.owed()
        if self._submissions.count_open(owed) >= MOST_OPEN:
            delay_s = max(_PLACE_AGAIN_S, len(owed) / _WAITING_PER_S)
            raise BatchPending("as many batches as may be are open", retry_after_s=random.uniform(0.5, 1.5) * delay_s)

    async def _read(self) -> list[Submission]:
        return await to_thread.run_sync(self._submissions.of_shard, self._shard)

    def _pending(self, submission: Submission) -> BatchPending:
        """To be looked at again after a quarter of the time that it has waited."""
        accepted, intent = submission.accepted, submission.intent
        if accepted is None:
            return BatchPending(f"submission {intent.name} is unanswered", retry_after_s=LOOK_AGAIN_S)
        waited_s = (datetime.now(tz=UTC) - datetime.fromisoformat(accepted.at)).total_seconds()
        seen = self._seen.get(accepted.batch_id)
        words = f", {seen.completed + seen.failed:,} of {len(intent.row_numbers()):,} passages" if seen else ""
        return BatchPending(
            f"waiting for {accepted.batch_id} of shard {self._shard}{words}",
            retry_after_s=min(_LONGEST_LOOK_S, max(_FIRST_LOOK_S, waited_s / 4)),
        )


@contextmanager
def _uncounted() -> Iterator[None]:
    """What fails while nothing is paid for says nothing against the shard."""
    try:
        yield
    except (Overloaded, OutcomeUnknown) as error:
        raise BatchPending(str(error), retry_after_s=max(error.retry_after_s or 0.0, LOOK_AGAIN_S)) from error


def _fitting(rows: Sequence[int], texts: Sequence[str], *, most_lines: int, most_bytes: int) -> int:
    """How many of the first rows one batch may hold; at least one."""
    size = 0
    for count, row in enumerate(rows):
        size += _line_bytes(texts[row])
        if count and (count >= most_lines or size > most_bytes):
            return count
    return len(rows)


def _billed(intent: Intent, batch: BatchStatus) -> int:
    """Its estimate, where the provider does not say."""
    return batch.tokens or (intent.tokens if batch.state == "completed" else 0)


def _line_bytes(text: str) -> int:
    """At most, with its custom_id and what is around it."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 80
