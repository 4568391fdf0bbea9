"""What became of a submission whose answer nobody heard: matched against the provider's own list.

A batch carries no mark that its status shows, but every line of its output has a custom_id, which begins with the attempt.
So a batch that is done proves whose it is, and one that is not yet done is waited for. What is left, nobody can tell: of
the model and the size that a list shows, nothing says that they are those that were sent, or when they are final.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from anyio import to_thread

from embedmill.dataset.submissions import Intent, Submission, Submissions
from embedmill.errors import BatchHeld, BatchPending

from .batch_endpoint import BatchEndpoint, BatchStatus, OutputMissing
from .batch_pace import LOOK_AGAIN_S

# Longer than a request can take, and than a worker that was stopped between intent and request waits before it lets it be.
SETTLED_S = 300.0
_OTHER_KEY_AFTER_S, _OTHER_KEY_AGAIN_S = 3600.0, 60.0
_OUTPUT_LATE_S = 60.0


@dataclass(slots=True)
class Sightings:
    """What a process has seen of batches that may be anybody's.

    owners: the custom_id of a line, by batch; mute_since_s: when a completed batch first had lines missing, on the monotonic
    clock; candidates: the batches that a submission, by its attempt, may be, which is final when it is settled.
    """

    owners: dict[str, str] = field(default_factory=dict)
    mute_since_s: dict[str, float] = field(default_factory=dict)
    candidates: dict[str, frozenset[str]] = field(default_factory=dict)

    def may_be_late(self, batch_id: str) -> bool:
        """Whether lines that a completed batch does not show may yet come."""
        now_s = time.monotonic()
        return now_s - self.mute_since_s.setdefault(batch_id, now_s) < _OUTPUT_LATE_S


class Matching:
    """Finds the batch of a submission, or says what to do without it."""

    def __init__(self, endpoint: BatchEndpoint, submissions: Submissions, sightings: Sightings) -> None:
        self._endpoint = endpoint
        self._submissions = submissions
        self._sightings = sightings

    async def find(self, submission: Submission) -> str | None:
        """The id of its batch, which is noted then, too; None where it certainly reached nobody, and is ended as that.

        Raises BatchPending to look again later, BatchHeld where a person has to decide.
        """
        intent = submission.intent
        if intent.api_base != self._endpoint.api_base:
            # Not noted: where it was sent, it may be found.
            raise held_error(
                submission, f"it was sent to {intent.api_base}; say --api-base {intent.api_base} to look there"
            )
        listed, is_all = await self._endpoint.recent()
        taken = await to_thread.run_sync(self._submissions.batch_ids)
        new = [batch for batch in listed if batch.batch_id not in taken and batch.batch_id not in intent.before]
        candidates = self._candidates(intent, new)
        waited_for, unclear = list[str](), list[str]()
        for batch in sorted(new, key=lambda one: not _fits(one, intent)):
            owner = None if batch.is_open else await self._owner(batch)
            if owner is None and batch.batch_id in candidates:
                (waited_for if batch.is_open or self._may_be_late(batch) else unclear).append(batch.batch_id)
            elif owner is not None and intent.row_of(owner) is not None:
                await to_thread.run_sync(partial(self._submissions.accept, intent, batch.batch_id, by="match"))
                return batch.batch_id
        unclear += sorted(candidates - {batch.batch_id for batch in listed} - taken - self._sightings.owners.keys())
        if submission.held is not None:
            raise held_error(submission, submission.held.reason)
        if waited_for or _age_s(intent.at) < SETTLED_S:
            may_be = f", which may be {', '.join(waited_for[:3])}" if waited_for else ""
            raise BatchPending(
                f"nobody knows yet what became of submission {intent.name}{may_be}", retry_after_s=LOOK_AGAIN_S
            )
        if intent.key != self._endpoint.key_id:
            if _age_s(intent.at) < _OTHER_KEY_AFTER_S:
                raise BatchPending(
                    f"submission {intent.name} was sent with another key", retry_after_s=_OTHER_KEY_AGAIN_S
                )
            await self._hold(
                submission, f"it was sent with another API key ({intent.key}), which no worker has", unclear
            )
        if unclear:
            await self._hold(
                submission, f"{', '.join(unclear)} may be it, and ended without an output to tell", unclear
            )
        if not is_all and not {batch.batch_id for batch in listed}.intersection(intent.before):
            await self._hold(submission, "the provider's list of batches does not reach back to it", unclear)
        reason = "the provider's list does not have it"
        await to_thread.run_sync(partial(self._submissions.end, intent, "never", reason=reason))
        return None

    async def _hold(self, submission: Submission, reason: str, candidates: Sequence[str]) -> None:
        await to_thread.run_sync(partial(self._submissions.hold, submission.intent, reason, candidates=candidates))
        raise held_error(submission, reason)

    def _candidates(self, intent: Intent, new: Sequence[BatchStatus]) -> frozenset[str]:
        """Those that it may be, of the new ones: what comes into its key's list when it is settled was sent later."""
        found = frozenset(batch.batch_id for batch in new)
        if intent.key != self._endpoint.key_id or _age_s(intent.at) < SETTLED_S:
            return found
        return self._sightings.candidates.setdefault(intent.attempt, found)

    async def _owner(self, batch: BatchStatus) -> str | None:
        """The custom_id of any of its lines; None where it has no lines to show."""
        owners = self._sightings.owners
        if batch.state == "completed" and batch.batch_id not in owners:
            for read in (self._endpoint.output, self._endpoint.errors):
                with suppress(OutputMissing):
                    async with aclosing(read(batch.batch_id)) as lines:
                        async for line in lines:
                            if line.custom_id:
                                owners[batch.batch_id] = line.custom_id
                                return line.custom_id
        return owners.get(batch.batch_id)

    def _may_be_late(self, batch: BatchStatus) -> bool:
        return batch.state == "completed" and self._sightings.may_be_late(batch.batch_id)


def held_error(submission: Submission, reason: str) -> BatchHeld:
    """Says what a person does. It is never sent again by itself."""
    intent = submission.intent
    return BatchHeld(
        f"submission {intent.name} is held: {reason}; nothing is sent again by itself. Look at"
        f" `embedmill batches list --to DATASET`, then `embedmill batches adopt {intent.name} BATCH_ID --to DATASET` or"
        f" `embedmill batches discard {intent.name} --to DATASET`, and let the job go on"
    )


def unknown_error(submission: Submission, *, own_key: bool) -> BatchPending | BatchHeld:
    """What it means that the provider does not have the batch of a submission. own_key: that which sent it says so."""
    intent, accepted = submission.intent, submission.accepted
    assert accepted is not None
    batch_id, age_s = accepted.batch_id, _age_s(accepted.at)
    if age_s < SETTLED_S:
        return BatchPending(f"the provider does not show {batch_id} yet", retry_after_s=LOOK_AGAIN_S)
    if own_key:
        return held_error(submission, f"the provider does not know {batch_id} any more, or its output is gone")
    if age_s < _OTHER_KEY_AFTER_S:
        return BatchPending(
            f"{batch_id} was sent with another key, which cannot be asked", retry_after_s=_OTHER_KEY_AGAIN_S
        )
    return held_error(
        submission, f"{batch_id} was sent with another API key ({intent.key}), and those at hand do not know it"
    )


def _fits(batch: BatchStatus, intent: Intent) -> bool:
    return batch.model == intent.model and batch.total in (None, len(intent.row_numbers()))


def _age_s(at: str) -> float:
    return (datetime.now(tz=UTC) - datetime.fromisoformat(at)).total_seconds()
