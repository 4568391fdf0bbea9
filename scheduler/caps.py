"""The most tokens that one job may be billed, over the whole fleet: `jobs/JOB.json` says it, Redis keeps the account.

Before a request the most that its texts can count is reserved, after it what it was billed is charged, so the cap is passed
only by what a provider counts beyond that bound. A request whose answer was lost, and one whose worker died, is charged a
quarter more than its estimate. Redis' account may be lost: it is made anew from the spend logs, which have each request
before it is settled, and for as long as other workers need to say what they still hold nothing more is given.
"""

from __future__ import annotations

import logging
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import anyio
from anyio import to_thread

from embedmill.connection import Connection, key_prefix
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.spending import SpendLogs
from embedmill.errors import CapReached, Overloaded
from embedmill.messages import job_key
from embedmill.token_bounds import most_tokens

from .budget import Grant

log = logging.getLogger("embedmill.caps")

_SETTLE_WITHIN_S = 5.0
_LIMIT_KNOWN_S = 2.0
_LOGS_KNOWN_S = 5.0
# Longer than a request takes.
_BUSY_S = 300.0
_POLL_S = 0.25
# Estimates are within a tenth after some bills, and within a quarter before any.
_DOUBT = 1.25
_RESERVED, _NEVER, _WITHOUT_MEMORY = 1, -1, -2


@dataclass(slots=True)
class Hold:
    """A reservation at a cap. grant: the budget's, which says how the request ended; without one it was never sent.

    most_tokens: 0 where nothing is capped; birth: of the account that gave it.
    """

    est_tokens: int
    most_tokens: int = 0
    grant: Grant | None = None
    op: str = field(default_factory=lambda: uuid.uuid4().hex)
    birth: str = ""

    @property
    def billed_tokens(self) -> int:
        """As the provider counted."""
        return self.grant.actual_tokens if self.grant is not None and self.grant.outcome == "used" else 0

    @property
    def doubtful_tokens(self) -> int:
        """What it is charged when nobody knows its cost: more than the estimate, which errs, and no more than the most."""
        charge = math.ceil(_DOUBT * self.est_tokens)
        return min(self.most_tokens, charge) if self.most_tokens else charge

    @property
    def unknown_tokens(self) -> int:
        """What it is charged because nobody knows; 0 when somebody does."""
        return self.doubtful_tokens if self.grant is not None and self.grant.outcome == "unknown" else 0


class Cap(Protocol):
    """Where a request asks whether its job may still pay for it, before it waits for the budget."""

    def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AbstractAsyncContextManager[Hold]:
        """Enter when the cap has room; give the hold its grant; leave to settle it. Raises CapReached."""
        ...


class Uncapped:
    """No cap, and no account."""

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        yield Hold(est_tokens)


UNCAPPED = Uncapped()


class JobCap:
    """The cap of one job, shared by everybody with the same `namespace`, as its record in the dataset says at the moment.

    hold_s: when a hold without a sign of life counts as abandoned; `Caps.keep_alive` gives that sign. alone: nobody else can
    work for the job, so a lost account needs no time for others to say what they hold.
    """

    def __init__(
        self, connection: Connection, *, namespace: str, dataset: Dataset, job: str, alone: bool, hold_s: float = 20.0
    ) -> None:
        self._connection = connection
        self._dataset = dataset
        self._job = job
        self._hold_s = hold_s
        self._alone = alone
        self._logs = SpendLogs(dataset)
        self._reading = anyio.Lock()
        prefix = f"{key_prefix(namespace)}:cap:{job_key(dataset.info.id, job)}"
        self._keys = [prefix, *(f"{prefix}:{part}" for part in ("holders", "holds", "late"))]
        self._held: dict[str, Hold] = {}
        self._settled = anyio.Event()
        self._limit = 0
        self._limit_until_s = self._logs_until_s = float("-inf")

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        """Wait while others hold what is missing, then hold the most that `texts` can count.

        Cancelled while waiting, nothing is charged; in the body it is as if the answer was lost. Raises
        CapReached when these texts do not fit, whatever comes back; fewer may. Overloaded without Redis.
        """
        hold = Hold(est_tokens)
        if not await self._read_limit():
            yield hold
            return
        limit = self._dataset.info.embedder.max_input_tokens
        hold.most_tokens = await to_thread.run_sync(partial(most_tokens, texts, max_input_tokens=limit))
        try:
            await self._wait_for_room(hold)
            yield hold
        finally:
            self._held.pop(hold.op, None)
            with anyio.CancelScope(shield=True), anyio.move_on_after(_SETTLE_WITHIN_S):
                await self._settle(hold)
            self._settled.set()

    async def keep(self) -> None:
        """Say which requests live. An account that was born meanwhile learns of them so."""
        holds = list(self._held.values())
        if not holds:
            return
        named = [part for hold in holds for part in (hold.op, hold.most_tokens, hold.doubtful_tokens, hold.birth)]
        try:
            birth = await self._connection.script("scheduler/cap_keep", self._keys, [self._hold_s * 1000, *named])
        except Overloaded as error:
            log.warning("holds at the cap of job %s were not kept: %s", self._job, error)
            return
        for hold in holds if birth else ():
            hold.birth = str(birth)

    async def _read_limit(self, *, now: bool = False) -> int:
        """Tokens, 0 for no cap: the record may be changed at any time."""
        if now or time.monotonic() >= self._limit_until_s:
            record = await to_thread.run_sync(self._dataset.job, self._job)
            self._limit = record.max_tokens if record is not None else 0
            self._limit_until_s = time.monotonic() + _LIMIT_KNOWN_S
        return self._limit

    async def _wait_for_room(self, hold: Hold) -> None:
        logged: int | str = ""
        if time.monotonic() >= self._logs_until_s:
            # Somebody may have worked for the job on another server.
            logged = await self._charged()
            self._logs_until_s = time.monotonic() + _LOGS_KNOWN_S
        limit, newborn = self._limit, False
        while limit:
            if self._settled.is_set():
                self._settled = anyio.Event()
            ask = [hold.op, hold.most_tokens, hold.doubtful_tokens, limit, self._hold_s * 1000, logged, self._gate_ms()]
            answer, *rest = await self._connection.script("scheduler/cap_reserve", self._keys, ask)
            if answer == _RESERVED:
                hold.birth = str(rest[2])
                self._held[hold.op] = hold
                return
            if answer == _WITHOUT_MEMORY:
                logged, newborn = await self._charged(with_markers=True), True
                continue
            logged = ""
            if newborn:
                await self.keep()
                newborn = False
            if answer == _NEVER:
                asked, limit = limit, await self._read_limit(now=True)
                if 0 < limit <= asked:
                    raise CapReached(cap_reached_words(self._job, limit=limit, spent=int(rest[0])), limit=limit)
                continue
            with anyio.move_on_after(_POLL_S * random.uniform(1.0, 1.5)):
                await self._settled.wait()
            limit = await self._read_limit()
        # The cap was lifted.
        hold.most_tokens = 0

    async def _settle(self, hold: Hold) -> None:
        if not hold.most_tokens:
            return
        charge = hold.billed_tokens + hold.unknown_tokens
        try:
            await self._connection.script("scheduler/cap_settle", self._keys, [hold.op, charge, hold.birth])
        except Overloaded:
            log.warning(
                "could not settle a request at the cap of job %s; it will be charged as a lost answer", self._job
            )

    def _gate_ms(self) -> float:
        """For how long an account that is born now gives nothing: until all that is under way was made known to it."""
        latest = self._logs.latest
        if not self._alone and latest is not None and (datetime.now(tz=UTC) - latest).total_seconds() < _BUSY_S:
            return 1000 * 1.5 * self._hold_s / 4
        return 1000 * _POLL_S if self._held else 0.0

    async def _charged(self, *, with_markers: bool = False) -> int:
        async with self._reading:
            return await to_thread.run_sync(partial(self._logs.charged, self._job, with_markers=with_markers))


class Caps:
    """The caps of the jobs that one process works for. hold_s, alone: see `JobCap`."""

    def __init__(self, connection: Connection, *, namespace: str, alone: bool, hold_s: float = 20.0) -> None:
        self._connection = connection
        self._namespace = namespace
        self._alone = alone
        self._hold_s = hold_s
        self._caps: dict[tuple[str, str], JobCap] = {}

    def of(self, dataset: Dataset, job: str) -> JobCap:
        """That of a job of this dataset; the same one each time."""
        place = (dataset.info.id, job)
        if place not in self._caps:
            self._caps[place] = JobCap(
                self._connection,
                namespace=self._namespace,
                dataset=dataset,
                job=job,
                alone=self._alone,
                hold_s=self._hold_s,
            )
        return self._caps[place]

    async def keep_alive(self) -> None:
        """Say regularly which requests live, until cancelled."""
        while True:
            await anyio.sleep(self._hold_s / 4)
            for cap in list(self._caps.values()):
                await cap.keep()


def cap_reached_words(job: str, *, limit: int, spent: int) -> str:
    """What has happened, and how it goes on."""
    return (
        f"job {job} has reached its cap: {spent:,} of {limit:,} tokens are billed, and no further passage is sure to fit;"
        " nothing is lost, and a larger --max-tokens lets it go on"
    )
