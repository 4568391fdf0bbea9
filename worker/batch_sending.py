"""What a shard owes, handed to the provider's batch endpoint: first noted, then sent.

Only so many batches are open at once, none is sent while one of the job is held, and a provider that takes no more is left
alone for a while.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Intent, OpenPlace, Submissions
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
    RequestTooLarge,
)
from embedmill.failpoints import afailpoint
from scheduler.caps import Cap

from .batch_caps import CapRoom
from .batch_endpoint import BatchEndpoint, BatchStatus
from .batch_pace import LOOK_AGAIN_S, Pace, uncounted
from .requesting import Requester

MOST_OPEN = 64
_PLACE_AGAIN_S, _WAITING_PER_S = 10.0, 5.0
# Between intent and request; older ones are let be, see `batch_matching.SETTLED_S`.
_SENT_WITHIN_S = 30.0


class BatchSender:
    """Sends batches of one shard. endpoints: of the keys that may be used, at least one; pace: shared by all of a process;
    seen: where a batch that was taken is put, with who knows it, by its id."""

    def __init__(
        self,
        endpoints: Sequence[BatchEndpoint],
        requester: Requester,
        dataset: Dataset,
        shard: int,
        *,
        worker: str,
        pace: Pace,
        seen: dict[str, tuple[BatchEndpoint, BatchStatus]],
    ) -> None:
        self.endpoints = list(endpoints)
        self._requester = requester
        self._dataset = dataset
        self._shard = shard
        self._job = dataset.admission(shard).job
        self._worker = worker
        self._pace = pace
        self._seen = seen
        self._submissions = Submissions(dataset)

    async def require_place(self) -> BatchEndpoint:
        """Where a batch may be handed over now. Raises BatchPending while none may."""
        soonest = min(self.endpoints, key=lambda one: self._pace.delay_s(one.key_id))
        if self._pace.delay_s(soonest.key_id):
            raise self._pace.pending(soonest.key_id)
        await to_thread.run_sync(self._require_place)
        return soonest

    async def send(
        self, rows: Sequence[int], texts: Sequence[str], stopping: Callable[[], bool], *, cap: Cap, number: int
    ) -> None:
        """Hand over these rows, in as many batches as it takes. texts: of every row; number: of the first submission.

        Raises BatchPending where there is no place, or it is not clear what became of it, BatchHeld, CapReached and like any
        request of the endpoint.
        """
        room = CapRoom(self._dataset, job=self._job, cap=cap)
        left, most_bytes, most_lines = list(rows), self.endpoints[0].max_bytes, self.endpoints[0].max_lines
        while left and not stopping():
            endpoint = await self.require_place()
            taken = _fitting(left, texts, most_lines=most_lines, most_bytes=most_bytes)
            taken = await room.affordable([texts[row] for row in left[:taken]])
            wanted = [texts[row] for row in left[:taken]]
            try:
                with uncounted():
                    async with cap.set_aside(wanted) as hold:
                        await self._submit(
                            endpoint, left[:taken], wanted,
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
                if len(self.endpoints) == 1:
                    raise
                self.endpoints.remove(endpoint)
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
        with self._pace.learning(endpoint.key_id):
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
        with self._pace.learning(endpoint.key_id):
            status = await self._answer(endpoint, intent, dict(zip(map(intent.custom_id, rows), texts, strict=True)))
        self._pace.taken(endpoint.key_id)
        with anyio.CancelScope(shield=True):
            await afailpoint("batch.after_submit")
            await to_thread.run_sync(partial(self._submissions.accept, intent, status.batch_id, by="answer"))
            await afailpoint("batch.after_accept")
        self._seen[status.batch_id] = endpoint, status

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

    def _require_place(self) -> None:
        """Raises BatchPending; those who wait come back at some speed together, however many they are. Jobs that stand still
        take no place: nobody fetches what is theirs."""
        places = self._submissions.open_places()
        held = [place for place in places if place.held and place.job == self._job]
        if any(self._is_owed(place) for place in held):
            raise self._no_place("a batch of the job is held, and nothing new is sent before that is decided")
        if len(places) < MOST_OPEN:
            return
        standing = {job.id for job in self._dataset.jobs() if job.state != "running"}
        if sum(place.job not in standing and self._is_owed(place) for place in places) >= MOST_OPEN:
            raise self._no_place("as many batches as may be are open")

    def _is_owed(self, place: OpenPlace) -> bool:
        return self._dataset.marker(place.shard) is None

    def _no_place(self, why: str) -> BatchPending:
        delay_s = max(_PLACE_AGAIN_S, len(self._dataset.owed()) / _WAITING_PER_S)
        return BatchPending(why, retry_after_s=random.uniform(0.5, 1.5) * delay_s)


def _fitting(rows: Sequence[int], texts: Sequence[str], *, most_lines: int, most_bytes: int) -> int:
    """How many of the first rows one batch may hold; at least one."""
    size = 0
    for count, row in enumerate(rows):
        size += _line_bytes(texts[row])
        if count and (count >= most_lines or size > most_bytes):
            return count
    return len(rows)


def _line_bytes(text: str) -> int:
    """At most, with its custom_id and what is around it."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 80
