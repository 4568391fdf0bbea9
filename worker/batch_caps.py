"""How much of a job's cap is left for batches: what was billed, and the most that open batches can cost, taken off.

The intents in the dataset are the account, so nothing of it can be lost: an intent is written, then all are added up, and
who finds too much takes its own back. Ordinary requests have their account in Redis, which does not know of open batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.spending import SpendLogs
from embedmill.dataset.submissions import Submissions
from embedmill.errors import BatchPending, CapReached
from embedmill.token_bounds import most_tokens
from scheduler.caps import cap_reached_words

_ROOM_AGAIN_S = 10.0


class CapRoom:
    """The room at the cap of the job that a shard is of. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset, shard: int) -> None:
        self._dataset = dataset
        self._job = dataset.admission(shard).job

    def most_tokens(self, texts: Sequence[str]) -> int:
        """0 where the job has no cap."""
        return self._bound(texts) if self._limit() else 0

    def affordable(self, texts: Sequence[str]) -> int:
        """How many of the first texts the cap has room for.

        Raises CapReached when it has none for even one, BatchPending when open batches may give some back.
        """
        limit = self._limit()
        if not limit:
            return len(texts)
        billed, open_tokens = self._charged(), self._open_tokens()
        left = limit - billed - open_tokens
        for count, text in enumerate(texts):
            left -= self._bound([text])
            if left < 0 and count:
                return count
            if left < 0 and open_tokens:
                raise BatchPending("open batches hold what is left of the job's cap", retry_after_s=_ROOM_AGAIN_S)
            if left < 0:
                raise CapReached(cap_reached_words(self._job, limit=limit, spent=billed), limit=limit)
        return len(texts)

    def holds(self) -> bool:
        """Whether the cap holds whatever the open batches cost."""
        limit = self._limit()
        return not limit or self._charged() + self._open_tokens() <= limit

    def _bound(self, texts: Sequence[str]) -> int:
        return most_tokens(texts, max_input_tokens=self._dataset.info.embedder.max_input_tokens)

    def _limit(self) -> int:
        record = self._dataset.job(self._job)
        return record.max_tokens if record is not None else 0

    def _charged(self) -> int:
        return SpendLogs(self._dataset).charged(self._job, with_markers=True)

    def _open_tokens(self) -> int:
        mine = [shard for shard in self._dataset.owed() if self._dataset.admission(shard).job == self._job]
        found = Submissions(self._dataset).of_shards(mine)
        return sum(one.intent.most_tokens for one in found if one.is_open)
