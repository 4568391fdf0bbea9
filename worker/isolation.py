"""The trials of a suspect shard: which passage ends its worker, or fails for ever, and what becomes of it.

What is planned and noted is in `trials.py`. Nothing is buried but a row that was alone in a request, and nothing for a
failure unless the canary passed after it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
from anyio import to_thread

from embedmill.errors import BatchPending, EmbedderFailed, EmbedmillError, TransientError

from .requesting import CANARY, Requester
from .results import ShardResults
from .shard_requests import ShardRequests
from .trials import (
    DEATHS_TO_BURY,
    FAILURES_TO_BURY,
    Note,
    TrialNotes,
    control_wait_s,
    deadly,
    deaths_alone,
    failures_alone,
    plan_trials,
)

_MOST_FAILED_ALONE = 8
_log = logging.getLogger("embedmill.worker")


class Trials:
    """The trials of one delivery of one shard. left: the notes of earlier ones; ids, texts: of every row.

    permits: one for each request in flight; alone: while entered, nothing else of this process is in flight; keep: puts
    results into the checkpoint; stopping: whether nothing more is to be sent.
    """

    def __init__(
        self,
        requester: Requester,
        requests: ShardRequests,
        results: ShardResults,
        notes: TrialNotes,
        *,
        left: Sequence[Note],
        ids: Sequence[tuple[str, int]],
        texts: Sequence[str],
        permits: anyio.CapacityLimiter,
        alone: Callable[[], AbstractAsyncContextManager[None]],
        keep: Callable[[], Awaitable[None]],
        stopping: Callable[[], bool],
        draining: anyio.Event,
        windows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._requester = requester
        self._requests = requests
        self._results = results
        self._notes = notes
        self._left = left
        self._ids = ids
        self._texts = texts
        self._permits = permits
        self._alone = alone
        self._keep = keep
        self._stopping = stopping
        self._draining = draining
        self._windows = windows
        self._controlled = False
        self._failed_alone: list[EmbedmillError] = []
        self._trouble: EmbedmillError | None = None

    async def run(self, owed: Sequence[int]) -> None:
        """Work off the owed rows. Raises TransientError and EmbedderFailed when some of them failed and are not buried."""
        self._requests.sending, self._requests.on_trial = self._noted, True
        # A tokenizer may be what ends the worker: its estimate is part of the trial, and bytes stand for tokens here.
        sizes = [len(self._texts[row].encode("utf-8", "surrogatepass")) // 2 + 1 for row in owed]
        died = deadly(self._left)
        limits = self._requester.embedder.limits
        unsuspected, halves = plan_trials(owed, sizes, self._left, limits=limits, windows=self._windows)
        waiting = iter(unsuspected)
        async with anyio.create_task_group() as runners:
            for _ in range(min(int(self._permits.total_tokens), len(unsuspected))):
                runners.start_soon(self._try_each, waiting)
        for rows in halves if self._trouble is None else ():
            async with self._alone():
                if len(rows) == 1 and rows[0] in died and not self._stopping():
                    await self._try_deadly(rows[0])
                else:
                    await self._try(rows)
                await self._keep()
        if self._trouble is not None or self._failed_alone:
            raise self._trouble or self._failed_alone[0]

    async def _try_each(self, waiting: Iterator[tuple[int, ...]]) -> None:
        """Trouble in one lets the others finish what they have sent: it is paid for."""
        while True:
            async with self._permits:
                done = self._trouble is not None or self._stopping()
                rows = None if done else next(waiting, None)
                if rows is None:
                    return
                try:
                    await self._try(rows)
                except EmbedmillError as error:
                    self._trouble = self._trouble or error

    async def _try_deadly(self, row: int) -> None:
        left = await to_thread.run_sync(self._notes.left)
        deaths, controls = deaths_alone(row, left)
        if deaths - controls >= DEATHS_TO_BURY:
            await self._bury(row, "poison", f"it ended its worker {deaths} times when it was alone in a request")
            return
        async with self._notes.standing(Note((row,), control=True)):
            await self._requester.require_well(
                since_s=time.monotonic(),
                complaint="a passage that ended its worker",
                lane=self._requests.lane,
                cap=self._requests.cap,
            )
            wait_s = control_wait_s(self._requester.canary_s, canary=CANARY, text=self._texts[row])
            # Not in step with anything that kills at intervals.
            with anyio.move_on_after(wait_s * random.uniform(0.75, 1.5)):
                await self._draining.wait()
        await self._try((row,), controlled=True)

    async def _try(self, rows: Sequence[int], *, controlled: bool = False) -> None:
        """Embed rows; what fails is halved, once the canary has passed. controlled: of one row, after its control."""
        if self._stopping():
            return
        began_s = time.monotonic()
        try:
            async with self._notes.standing(Note(tuple(rows), controlled=controlled)):
                await self._requests.estimate(rows)
            self._controlled = controlled
            await self._requests.embed(rows)
        except BatchPending:
            # Nothing was sent: the cap has no room until batches end.
            raise
        except (TransientError, EmbedderFailed) as error:
            await self._requester.require_well(
                since_s=began_s, complaint=str(error), lane=self._requests.lane, cap=self._requests.cap
            )
            owed = set(self._results.owed())
            left = [row for row in rows if row in owed]
            if len(rows) == 1:
                await self._blame(rows[0], error)
            else:
                middle = (len(left) + 1) // 2
                for half in filter(None, (left[:middle], left[middle:])):
                    await self._try(half)

    @asynccontextmanager
    async def _noted(self, rows: Sequence[int]) -> AsyncIterator[None]:
        """Around each request of these rows. A control answers for as much time as one request takes: the first."""
        controlled, self._controlled = self._controlled, False
        async with self._notes.standing(Note(tuple(rows), controlled=controlled)):
            yield

    async def _blame(self, row: int, error: EmbedmillError) -> None:
        """A row failed alone, and the canary passed. A few such rows are enough for one delivery: the rest may fail, too."""
        failures = failures_alone(row, await to_thread.run_sync(self._notes.left)) + 1
        if failures >= FAILURES_TO_BURY:
            cause = f"alone in a request it failed {failures} times, while other texts passed: {error}"
            await self._bury(row, error.code, cause)
            return
        await to_thread.run_sync(self._notes.write, Note((row,), cause=str(error)))
        self._failed_alone.append(error)
        if len(self._failed_alone) >= _MOST_FAILED_ALONE:
            raise error

    async def _bury(self, row: int, code: str, cause: str) -> None:
        _log.error("passage %s is a dead letter: %s", self._ids[row][0], cause)
        self._requests.fail(row, code=code, cause=cause)
        await self._keep()
