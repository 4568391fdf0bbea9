"""The leases that a worker holds: extended at a quarter of their time, dropped when Redis says that they are lost."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

import anyio

from embedmill.dataset.dataset import now_iso
from embedmill.errors import TransientError
from scheduler.queue import Lease, Queue

from .embedding import ShardEmbedding, Tools

HUNG_AFTER_S = 900.0
_RECENT_S = 60.0
_HUNG_STATUS = 3
_log = logging.getLogger("embedmill.worker")


@dataclass(slots=True)
class Held:
    """A lease that is ours, the work under it, and the way to stop that work. settled: nothing is to be handed back."""

    lease: Lease
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    work: ShardEmbedding | None = None
    settled: bool = False

    def lose(self) -> None:
        """The lease is somebody else's now: the work under it ends at once."""
        self.settled = True
        self.scope.cancel()


class Leases:
    """What one worker holds, by epoch. hung: what to do about a call of the embedder that does not come back."""

    def __init__(self, queue: Queue, tools: Tools, *, on_hung: Callable[[str], None]) -> None:
        self._queue = queue
        self._tools = tools
        self._on_hung = on_hung
        self._held: dict[str, Held] = {}
        self._started_at = now_iso()
        self._history: deque[tuple[float, dict[str, tuple[int, int]]]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def add(self, lease: Lease) -> Held:
        """Hold a new lease. A task that expired under us and came back to us: the work under its former lease ends."""
        for former in self:
            if former.lease.task.id == lease.task.id:
                former.lose()
        held = self._held[lease.epoch] = Held(lease)
        return held

    def remove(self, held: Held) -> None:
        del self._held[held.lease.epoch]

    async def keep(self) -> None:
        """Extend and report until cancelled."""
        every_s = self._queue.lease_s / 4
        await self._report()
        try:
            while True:
                began_s = time.monotonic()
                await anyio.sleep(every_s)
                self._note_lag(time.monotonic() - began_s - every_s)
                if self._tools.requester.oldest_call_s > HUNG_AFTER_S:
                    self._on_hung(f"the model has not answered for {HUNG_AFTER_S / 60:.0f} minutes")
                    continue
                await self._extend()
                await self._report()
        finally:
            with anyio.move_on_after(1, shield=True):
                await self._say(None)

    async def _extend(self) -> None:
        held = [h for h in self if not h.settled]
        grown = [h.work for h in held if h.work is not None and h.work.grown]
        if not held:
            return
        progressed = [h.lease.task.id for h in held if h.work in grown]
        for work in grown:
            work.grown = False
        try:
            extended = await self._queue.extend([h.lease for h in held], progressed=progressed)
        except TransientError as error:
            _log.warning("leases were not extended: %s", error)
            for work in grown:
                work.grown = True
            return
        self._heed(held, lost=extended.lost, halted=extended.halted)

    def _heed(self, held: Iterable[Held], *, lost: frozenset[str], halted: frozenset[str]) -> None:
        for h in held:
            if h.lease.task.id in lost and not h.settled:
                h.lose()
            elif h.lease.task.id in halted and h.work is not None:
                h.work.halt()

    def _note_lag(self, lag_s: float) -> None:
        if lag_s > self._queue.lease_s / 8:
            self._tools.counts.stalls += 1
            _log.warning("the event loop stood still for %.1f s; leases last %.0f s", lag_s, self._queue.lease_s)

    async def _report(self) -> None:
        counts = asdict(self._tools.counts)
        done = counts.pop("jobs")
        budget = self._tools.requester.budget
        counts["last_trouble"] = budget.trouble or counts["last_trouble"]
        await self._say(
            {
                "model": self._tools.embedder.spec.model,
                "keys": list(budget.key_ids),
                "started_at": self._started_at,
                "holds": len(self),
                **counts,
                **self._recent(time.monotonic(), done),
            }
        )

    def _recent(self, now_s: float, done: dict[str, tuple[int, int]]) -> dict[str, object]:
        """(passages, tokens) of the last minute by job, and of how many seconds; a minute is at least two reports."""
        self._history.append((now_s, done))
        while len(self._history) > 2 and now_s - self._history[1][0] >= _RECENT_S:
            self._history.popleft()
        then_s, before = self._history[0]
        grown = {}
        for job, (passages, tokens) in done.items():
            old_passages, old_tokens = before.get(job, (0, 0))
            if passages > old_passages or tokens > old_tokens:
                grown[job] = passages - old_passages, tokens - old_tokens
        return {"recent_s": round(now_s - then_s, 3), "recent": grown}

    async def _say(self, record: dict[str, object] | None) -> None:
        try:
            await self._queue.report(self._tools.worker, record)
        except TransientError as error:
            _log.warning("no report: %s", error)


def end_process(reason: str) -> None:
    """The only way out of a thread that hangs. The leases expire, and what was kept stays; others take it from there."""
    _log.critical("%s; this process ends, and the leases that it holds expire", reason)
    logging.shutdown()
    os._exit(_HUNG_STATUS)
