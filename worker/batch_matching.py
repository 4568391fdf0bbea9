"""What became of a submission whose answer nobody heard: matched against the provider's own list.

A batch carries no mark that its status shows, but every line of its output has a custom_id, which begins with the attempt.
So a batch that is done proves whose it is, and one that is not yet done is waited for. What is left, nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial

from anyio import to_thread

from embedmill.dataset.submissions import Intent, Submission, Submissions
from embedmill.errors import BatchHeld, BatchPending

from .batch_endpoint import BatchEndpoint, BatchStatus

# Longer than a request can take, and than a worker that was stopped between intent and request waits before it lets it be.
SETTLED_S = 300.0
LOOK_AGAIN_S = 5.0
_OTHER_KEY_AFTER_S = 3600.0


class Matching:
    """Finds the batch of a submission, or says what to do without it."""

    def __init__(self, endpoint: BatchEndpoint, submissions: Submissions) -> None:
        self._endpoint = endpoint
        self._submissions = submissions

    async def find(self, submission: Submission) -> str | None:
        """The id of its batch, which is noted then, too; None where it certainly reached nobody, and is ended as that.

        Raises BatchPending to look again later, BatchHeld where a person has to decide.
        """
        intent = submission.intent
        listed, is_all = await self._endpoint.recent()
        taken = await to_thread.run_sync(self._submissions.batch_ids)
        possible = [batch for batch in listed if batch.batch_id not in taken and _may_be(batch, intent)]
        unclear = []
        for batch in possible:
            if batch.is_open:
                continue
            owner = await self._owner(batch)
            if owner is None:
                unclear.append(batch.batch_id)
            elif intent.row_of(owner) is not None:
                await to_thread.run_sync(partial(self._submissions.accept, intent, batch.batch_id, by="match"))
                return batch.batch_id
        if submission.held is not None:
            raise held_error(submission, submission.held.reason)
        if any(batch.is_open for batch in possible) or _age_s(intent) < SETTLED_S:
            raise BatchPending(f"nobody knows yet what became of submission {intent.name}", retry_after_s=LOOK_AGAIN_S)
        if intent.key != self._endpoint.key_id:
            if _age_s(intent) < _OTHER_KEY_AFTER_S:
                raise BatchPending(f"submission {intent.name} was sent with another key", retry_after_s=60.0)
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

    async def _owner(self, batch: BatchStatus) -> str | None:
        """The custom_id of any of its lines; None where it has no lines to show."""
        if batch.state == "completed":
            for lines in (self._endpoint.output(batch.batch_id), self._endpoint.errors(batch.batch_id)):
                async with aclosing(lines):
                    async for line in lines:
                        if line.custom_id:
                            return line.custom_id
        return None


def held_error(submission: Submission, reason: str) -> BatchHeld:
    """Says what a person does. It is never sent again by itself."""
    intent = submission.intent
    return BatchHeld(
        f"submission {intent.name} is held: {reason}; nothing is sent again by itself. Look at `embedmill batches list`,"
        f" then `embedmill batches adopt {intent.name} BATCH_ID` or `embedmill batches discard {intent.name}`, and let the"
        " job go on"
    )


def _may_be(batch: BatchStatus, intent: Intent) -> bool:
    lines = len(intent.row_numbers())
    return batch.batch_id not in intent.before and batch.model == intent.model and batch.total in (None, lines)


def _age_s(intent: Intent) -> float:
    return (datetime.now(tz=UTC) - datetime.fromisoformat(intent.at)).total_seconds()
