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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

import anyio
from anyio import to_thread

from embedmill.connection import Connection, key_prefix
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.dataset.spending import Charged, JobAccount
from embedmill.errors import BatchPending, CapReached, EmbedmillError, Overloaded
from embedmill.messages import job_key
from embedmill.token_bounds import most_tokens

from .budget import Grant

log = logging.getLogger("embedmill.caps")

_SETTLE_WITHIN_S = 5.0
_LIMIT_KNOWN_S = 2.0
# Looked at again beside the requests; only one that finds a look this old and older waits for the next.
_LOOK_AGAIN_S, _LOOK_OLD_S = 5.0, 10.0
_ROOM_AGAIN_S = 10.0
_POLL_S = 0.25
# Estimates are within a tenth after some bills, and within a quarter before any.
_DOUBT = 1.25
_RESERVED, _NEVER, _WITHOUT_MEMORY, _LOOK_FIRST = 1, -1, -2, -3
_BEGUN = "begun"
T = TypeVar("T")


@dataclass(slots=True)
class Hold:
    """A reservation at a cap. grant: the budget's, which says how the request ended; without one it was never sent.

    most_tokens: 0 where nothing is capped; birth: of the account that gave it; for_batch: for as long as a batch is noted
    in the dataset, where it counts from then on.
    """

    est_tokens: int
    most_tokens: int = 0
    grant: Grant | None = None
    op: str = field(default_factory=lambda: uuid.uuid4().hex)
    birth: str = ""
    for_batch: bool = False

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


@dataclass(frozen=True, slots=True)
class Room:
    """limit: tokens of the cap, 0 for none; charged (its tokens), batches, abandoned: see
    `embedmill.dataset.spending.Charged`."""

    limit: int = 0
    charged: int = 0
    batches: int = 0
    abandoned: int = 0


class Cap(Protocol):
    """Where a request asks whether its job may still pay for it, before it waits for the budget."""

    def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AbstractAsyncContextManager[Hold]:
        """Enter when the cap has room; give the hold its grant; leave to settle it. Raises CapReached, and BatchPending
        while open batches may give back what is missing."""
        ...

    def set_aside(self, texts: Sequence[str]) -> AbstractAsyncContextManager[Hold]:
        """Hold the most that a batch can cost, from before its intent is written until it is: then that counts. Raises
        like `reserve`."""
        ...

    async def room(self) -> Room:
        """As the dataset has it at this moment."""
        ...


class Uncapped:
    """No cap, and no account."""

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        yield Hold(est_tokens)

    @asynccontextmanager
    async def set_aside(self, texts: Sequence[str]) -> AsyncIterator[Hold]:
        yield Hold(0)

    async def room(self) -> Room:
        return Room()


UNCAPPED = Uncapped()


class _Look(Generic[T]):
    """Something that is read by one caller at a time, for all who wait."""

    def __init__(self, read: Callable[[], T], *, known_s: float) -> None:
        self._read = read
        self._known_s = known_s
        self._lock = anyio.Lock()
        self._begun = self._done = 0
        self._read_at_s = float("-inf")
        self._value: T

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._read_at_s

    async def get(self, *, anew: bool = False) -> T:
        """anew: as it is now, or later."""
        wanted = self._begun + 1 if anew else self._done + (self.age_s >= self._known_s)
        if self._done < wanted:
            async with self._lock:
                if self._done < wanted:
                    self._begun += 1
                    now_s = time.monotonic()
                    self._value = await to_thread.run_sync(self._read)
                    self._done, self._read_at_s = self._begun, now_s
        return self._value


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
        self._account = JobAccount(dataset, job)
        self._look = _Look(self._read_account, known_s=_LOOK_OLD_S)
        self._limit = _Look(self._read_limit, known_s=_LIMIT_KNOWN_S)
        self._beginning = _Look(self._begin, known_s=float("inf"))
        self._began = False
        self._wants_markers = False
        self._knows_markers = False
        prefix = f"{key_prefix(namespace)}:cap:{job_key(dataset.info.id, job)}"
        self._keys = [prefix, *(f"{prefix}:{part}" for part in ("holders", "holds", "late"))]
        self._held: dict[str, Hold] = {}
        self._settled = anyio.Event()
        self._seen = ""

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        """Wait while others hold what is missing, then hold the most that `texts` can count.

        Cancelled while waiting, nothing is charged; in the body it is as if the answer was lost. Raises
        CapReached when these texts do not fit, whatever comes back; fewer may. BatchPending when open batches have what is
        missing, Overloaded without Redis.
        """
        async with self._holding(Hold(est_tokens), texts) as hold:
            yield hold

    @asynccontextmanager
    async def set_aside(self, texts: Sequence[str]) -> AsyncIterator[Hold]:
        """See `Cap.set_aside`."""
        async with self._holding(Hold(0, for_batch=True), texts) as hold:
            yield hold

    async def room(self) -> Room:
        """See `Cap.room`."""
        limit = await self._limit.get(anew=True)
        if not limit:
            return Room()
        charged = await self._charged(with_markers=not self._knows_markers)
        return Room(limit, charged.tokens, charged.batches, charged.abandoned)

    async def look_again(self) -> None:
        """Read on what the dataset says, so that no request has to wait for it."""
        if _LOOK_AGAIN_S <= self._look.age_s < float("inf") and self._held:
            await self._look.get(anew=True)

    @asynccontextmanager
    async def _holding(self, hold: Hold, texts: Sequence[str]) -> AsyncIterator[Hold]:
        if not await self._limit.get():
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

    def _read_limit(self) -> int:
        """Tokens, 0 for no cap: the record may be changed at any time."""
        record = self._dataset.job(self._job)
        return record.max_tokens if record is not None else 0

    def _read_account(self) -> Charged:
        with_markers, self._wants_markers = self._wants_markers, False
        return self._account.read(with_markers=with_markers)

    async def _wait_for_room(self, hold: Hold) -> None:
        limit, fresh, sure = await self._limit.get(), False, False
        if await self._beginning.get():
            self._began = True
        while limit:
            if self._settled.is_set():
                self._settled = anyio.Event()
            # Somebody may have worked for the job on another server.
            charged = await self._look.get()
            ask = [
                hold.op, hold.most_tokens, hold.doubtful_tokens, limit - charged.of_batches - charged.batches,
                self._hold_s * 1000, charged.tokens - charged.of_batches, self._gate_ms(), self._seen, int(fresh),
            ]  # fmt: skip
            answer, *rest = await self._connection.script("scheduler/cap_reserve", self._keys, ask)
            if answer == _WITHOUT_MEMORY:
                await self._charged(with_markers=True)
                fresh = True
                continue
            if answer == _LOOK_FIRST:
                await self._charged()
                self._seen = str(rest[0])
                continue
            self._seen, self._began = str(rest[2]), True
            if answer == _RESERVED:
                hold.birth = str(rest[3])
                self._held[hold.op] = hold
                return
            if fresh:
                await self.keep()
                fresh = False
            if answer == _NEVER:
                if sure:
                    raise self._refusal(hold, limit, charged, spent=int(rest[0]) + charged.of_batches)
                limit, sure = await self._limit.get(anew=True), True
                if charged.batches or charged.abandoned:
                    await self._charged()
                continue
            sure = False
            with anyio.move_on_after(_POLL_S * random.uniform(1.0, 1.5)):
                await self._settled.wait()
            limit = await self._limit.get()
        # The cap was lifted.
        hold.most_tokens = 0

    def _refusal(self, hold: Hold, limit: int, charged: Charged, *, spent: int) -> BatchPending | CapReached:
        if charged.batches and spent + hold.most_tokens <= limit:
            return batches_hold_the_rest()
        words = cap_reached_words(self._job, limit=limit, spent=spent, abandoned=charged.abandoned)
        return CapReached(words, limit=limit)

    async def _settle(self, hold: Hold) -> None:
        if not hold.most_tokens:
            return
        charge = hold.billed_tokens + hold.unknown_tokens
        try:
            settled = [hold.op, charge, hold.birth, int(hold.for_batch)]
            await self._connection.script("scheduler/cap_settle", self._keys, settled)
        except Overloaded:
            log.warning(
                "could not settle a request at the cap of job %s; it will be charged as a lost answer", self._job
            )

    def _gate_ms(self) -> float:
        """For how long an account that is born now gives nothing: until all that is under way was made known to it."""
        if self._began and not self._alone:
            return 1000 * 1.5 * self._hold_s / 4
        return 1000 * _POLL_S if self._held else 0.0

    def _begin(self) -> bool:
        """Note in the job's record, before anything is held, that somebody may pay for it; whether somebody did before."""
        before = True

        def note(record: Job) -> Job:
            nonlocal before
            before = bool(record.caps.get(_BEGUN))
            return record if before else replace(record, caps={**record.caps, _BEGUN: 1})

        self._dataset.change_job(self._job, note)
        return before

    async def _charged(self, *, with_markers: bool = False) -> Charged:
        """As the dataset says at this moment."""
        self._wants_markers |= with_markers
        charged = await self._look.get(anew=True)
        self._knows_markers |= with_markers
        return charged


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
        """Say regularly which requests live, and read on what the datasets say, until cancelled."""
        async with anyio.create_task_group() as both:
            both.start_soon(self._look_regularly)
            while True:
                await anyio.sleep(self._hold_s / 4)
                for cap in list(self._caps.values()):
                    await cap.keep()

    async def _look_regularly(self) -> None:
        """Apart from the signs of life: a slow disk must not hold those up."""
        while True:
            await anyio.sleep(_LOOK_AGAIN_S / 2)
            for cap in list(self._caps.values()):
                try:
                    await cap.look_again()
                except EmbedmillError as error:
                    log.warning("what a job has spent was not looked at again: %s", error)


def batches_hold_the_rest() -> BatchPending:
    """What is missing at a job's cap may come back."""
    return BatchPending("open batches hold what is left of the job's cap", retry_after_s=_ROOM_AGAIN_S)


def cap_reached_words(job: str, *, limit: int, spent: int, abandoned: int = 0) -> str:
    """What has happened, and how it goes on. abandoned: see `embedmill.dataset.spending.Charged`."""
    of_which = (
        f" ({abandoned:,} of them is the most that batches of passages that were given up can cost: `embedmill cancel` or"
        " `embedmill batches discard` ends those, see `embedmill batches list`)"
        if abandoned
        else ""
    )
    return (
        f"job {job} has reached its cap: {spent:,} of {limit:,} tokens were billed{of_which} when no further passage was"
        " sure to fit; nothing is lost, and a larger --max-tokens lets it go on"
    )
