"""When a provider's batch endpoint is asked again after it gave no answer, or took nothing more."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from embedmill.errors import BatchPending, OutcomeUnknown, Overloaded, RateLimited

LOOK_AGAIN_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 300.0


@contextmanager
def uncounted() -> Iterator[None]:
    """What fails while nothing is paid for says nothing against the shard. Raises BatchPending for it."""
    try:
        yield
    except (Overloaded, OutcomeUnknown) as error:
        raise BatchPending(str(error), retry_after_s=max(error.retry_after_s or 0.0, LOOK_AGAIN_S)) from error


@dataclass(slots=True)
class _Wait:
    wait_s: float
    until_s: float
    said: str


@dataclass(slots=True)
class Pace:
    """How soon keys (by id) may hand over batches again, shared by all lanes of a process: after each refusal in a row
    twice as late, or when the provider says."""

    _waits: dict[str, _Wait] = field(default_factory=dict)

    def delay_s(self, key_id: str) -> float:
        """0 for a key that may."""
        wait = self._waits.get(key_id)
        return max(0.0, wait.until_s - time.monotonic()) if wait is not None else 0.0

    def pending(self, key_id: str) -> BatchPending:
        """For one that may not."""
        return BatchPending(
            f"no batches are handed over for now: {self._waits[key_id].said}",
            retry_after_s=random.uniform(1.0, 1.5) * self.delay_s(key_id),
        )

    @contextmanager
    def learning(self, key_id: str) -> Iterator[None]:
        """Around what is asked of the endpoint in order to hand over a batch. Raises BatchPending where it refuses."""
        try:
            yield
        except (RateLimited, Overloaded, OutcomeUnknown) as error:
            self._refused(key_id, said=str(error), asked_s=error.retry_after_s or 0.0)
            raise self.pending(key_id) from error

    def taken(self, key_id: str) -> None:
        """A batch was handed over."""
        self._waits.pop(key_id, None)

    def _refused(self, key_id: str, *, said: str, asked_s: float) -> None:
        known = self._waits.get(key_id)
        wait_s = known.wait_s if known is not None else _FIRST_WAIT_S
        if known is not None and not self.delay_s(key_id):
            # Not for those who had begun before an earlier refusal.
            wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
        self._waits[key_id] = _Wait(wait_s, time.monotonic() + max(wait_s, asked_s), said)
