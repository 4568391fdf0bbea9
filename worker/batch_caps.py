"""How much of a job's cap is left for batches: what was billed, and the most that open batches can cost, taken off.

The intents in the dataset are the account, so nothing of it can be lost: an intent is written, then all are added up, and
who finds too much takes its own back. While it is written its tokens are held in Redis, where ordinary requests hold theirs
(`Cap.set_aside`); after that these look at the intents.
"""

from __future__ import annotations

from collections.abc import Sequence

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.errors import CapReached
from embedmill.token_bounds import most_tokens
from scheduler.caps import Cap, batches_hold_the_rest, cap_reached_words


class CapRoom:
    """The room at the cap of one job."""

    def __init__(self, dataset: Dataset, *, job: str, cap: Cap) -> None:
        self._job = job
        self._cap = cap
        self._max_input_tokens = dataset.info.embedder.max_input_tokens

    async def affordable(self, texts: Sequence[str]) -> int:
        """How many of the first texts the cap has room for.

        Raises CapReached when it has none for even one, BatchPending when open batches may give some back.
        """
        room = await self._cap.room()
        if not room.limit:
            return len(texts)
        count = await to_thread.run_sync(self._fitting, texts, room.limit - room.charged - room.batches)
        if not count and room.batches:
            raise batches_hold_the_rest()
        if not count:
            words = cap_reached_words(self._job, limit=room.limit, spent=room.charged, abandoned=room.abandoned)
            raise CapReached(words, limit=room.limit)
        return count

    async def holds(self) -> bool:
        """Whether the cap holds whatever the open batches cost."""
        room = await self._cap.room()
        return not room.limit or room.charged + room.batches <= room.limit

    def _fitting(self, texts: Sequence[str], left: int) -> int:
        for count, text in enumerate(texts):
            left -= most_tokens([text], max_input_tokens=self._max_input_tokens)
            if left < 0:
                return count
        return len(texts)
