"""What one API key may still send: one budget for the whole fleet, kept in Redis.

Requests and tokens are paced ahead of time (a reservation is told when to send), so that no window holds more than the
limit; permits bound what is in flight. An estimate is reserved before a request and settled after it: with the provider's
own count, with nothing when it was refused or never sent, with the whole estimate when nobody knows. The permit of a
holder that died comes back by itself; its tokens stay charged. Redis' clock is the only clock.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio

from embedmill.connection import Connection, key_prefix
from embedmill.errors import EmbedmillError, Overloaded, RateLimited, RequestTooLarge
from embedmill.messages import Lane

from .slices import Line, Member, Often

log = logging.getLogger("embedmill.budget")

_SETTLE_WITHIN_S = 5.0
# Of a process that sends often: what is asked and what is settled in between goes into one call.
_ASK_EVERY_S, _SETTLE_EVERY_S = 0.02, 0.005
Busy = Callable[[str], Awaitable[bool]]
"""Whether requests of the last window are known of, for a key by its id."""
Spent = Mapping[str, Sequence[tuple[float, int]]]
"""By key id, requests that it is known to have been billed in the last window: how many seconds ago, and tokens."""
_RESTORED_STEP_S = 0.5
_NO_PERMIT = 1
_WITHOUT_MEMORY = -2
_LIMIT_WORDS = {
    "requests": ("requests a minute", "--rpm"),
    "tokens": ("tokens a minute", "--tpm"),
    "concurrency": ("requests at a time", "--concurrency"),
}


@dataclass(slots=True)
class Grant:
    """Leave to send one request now. Say how it ended before leaving; left unsaid, the whole estimate is charged.

    secret: the API key to send it with, where the budget has several; key_id: what stands for it; error: what the request
    ended with; other_key: set on leaving, where that was a refusal of the key and there are others.
    """

    est_tokens: int
    op: str = field(default_factory=lambda: uuid.uuid4().hex)
    outcome: Literal["used", "unknown", "unsent", "limited"] = "unsent"
    actual_tokens: int = 0
    refusal: RateLimited | None = None
    secret: str = field(default="", repr=False)
    key_id: str = ""
    error: EmbedmillError | None = None
    other_key: bool = False

    def settle(self, actual_tokens: int) -> None:
        """The provider counted so many tokens; 0 for a request that was refused or not executed."""
        self.outcome, self.actual_tokens = "used", actual_tokens

    def limited(self, refusal: RateLimited) -> None:
        """The provider refused for its rate: the whole fleet learns from it."""
        self.outcome, self.refusal = "limited", refusal


class RequestBudget(Protocol):
    """Where requests wait for their turn. key_ids: what stands for the API keys in logs, none where there are none;
    trouble: why nothing can be sent at the moment, for people."""

    @property
    def key_ids(self) -> tuple[str, ...]: ...

    @property
    def trouble(self) -> str: ...

    def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AbstractAsyncContextManager[Grant]:
        """Enter when the request may be sent; leave to settle it. Raises RequestTooLarge for what can never be sent."""
        ...

    async def restore(self, spent: Spent) -> None:
        """Note requests of the last window in a budget that does not remember them."""
        ...

    def remember_by(self, busy: Busy) -> None:
        """Ask `busy` whether requests of the last window are known of, when Redis has lost the budget.

        Then it is born closed for one window.
        """
        ...

    async def keep_alive(self) -> None:
        """Say that this process lives, until cancelled: what a dead one held comes back soon."""
        ...


class Unlimited:
    """No limits: local models."""

    key_ids: tuple[str, ...] = ()
    trouble = ""

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        yield Grant(est_tokens, outcome="unknown")

    async def restore(self, spent: Spent) -> None:
        """Nothing is limited, so nothing is remembered."""

    def remember_by(self, busy: Busy) -> None:
        """Nor is it looked up."""

    async def keep_alive(self) -> None:
        await anyio.sleep_forever()


class Budget:
    """The budget of one key, shared by everybody with the same `namespace` and `key_id`.

    rpm, tpm, concurrency: the key's limits, None or 0 for none; a lower limit that the provider announces is believed for
    an hour. window_s: what "per minute" means. slack_s: how much nearer to each other two requests may arrive than they
    were sent. max_wait_s: how far ahead a turn is given. holder_s: when an unsettled grant counts as abandoned, unless
    `keep_alive` runs beside it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str,
        key_id: str,
        rpm: int | None = None,
        tpm: int | None = None,
        concurrency: int | None = None,
        window_s: float = 60.0,
        slack_s: float = 0.25,
        max_wait_s: float = 5.0,
        holder_s: float = 20.0,
    ) -> None:
        self.key_id = key_id
        self.key_ids = (key_id,)
        self.trouble = ""
        self._connection = connection
        self._limits = {"requests": rpm or 0, "tokens": tpm or 0, "concurrency": concurrency or 0}
        self._window_ms = window_s * 1000
        self._times_ms = (self._window_ms, slack_s * 1000, max_wait_s * 1000, holder_s * 1000)
        prefix = f"{key_prefix(namespace)}:rl:{key_id}"
        self._holder_s = holder_s
        self._held: set[str] = set()
        self._keys = [f"{prefix}:{part}" for part in ("state", "holders", "grants", "window")]
        self._keys.append(f"{key_prefix(namespace)}:budgets")
        self._often = Often()
        # Live does not stand behind bulk: each lane asks for itself, and the script knows who goes first.
        self._asking: dict[Lane, _Asking] = {"live": _Asking(self, "live"), "bulk": _Asking(self, "bulk")}
        self._settling: Line[Grant] = Line(self._settle_all, ready=self._gather_settlements)
        self._closed_until = -math.inf
        self._busy: Busy | None = None

    def remember_by(self, busy: Busy) -> None:
        self._busy = busy

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        """Wait for a turn, then hold a permit while the body runs.

        Cancelled while waiting, nothing is charged; cancelled in the body, the estimate is.
        Raises RequestTooLarge when the request alone exceeds a whole window's tokens, Overloaded without Redis.
        """
        grant = Grant(max(1, est_tokens), key_id=self.key_id)
        self._often.count()
        try:
            await self._wait_for_turn(grant, lane)
            grant.outcome = "unknown"
            yield grant
        finally:
            self._held.discard(grant.op)
            with anyio.CancelScope(shield=True), anyio.move_on_after(_SETTLE_WITHIN_S):
                await self._settle(grant)
            for asking in self._asking.values():
                asking.permit_is_back()

    async def keep_alive(self) -> None:
        while True:
            await anyio.sleep(self._holder_s / 4)
            if self._held:
                try:
                    await self._connection.script(
                        "scheduler/keep", self._keys[1:2], [self._holder_s * 1000, *self._held]
                    )
                except Overloaded as error:
                    log.warning("permits were not kept: %s", error)

    async def restore(self, spent: Spent) -> None:
        """Note what was sent in the last window where it falls, in a budget without memory, as after a loss of Redis."""
        by_age: dict[int, tuple[int, int]] = {}
        for age_s, tokens in spent.get(self.key_id, ()):
            step = max(0, int(age_s / _RESTORED_STEP_S))
            requests, before = by_age.get(step, (0, 0))
            by_age[step] = requests + 1, before + tokens
        if by_age:
            triples = [part for step, both in by_age.items() for part in (step * _RESTORED_STEP_S * 1000, *both)]
            await self._connection.script("scheduler/restore", self._keys, [self._window_ms, *triples])

    async def _wait_for_turn(self, grant: Grant, lane: Lane) -> None:
        while True:
            start_s = await self._asking[lane].granted(grant)
            self._held.add(grant.op)
            await anyio.sleep_until(start_s)
            if self._closed_until <= anyio.current_time():
                return
            # Another task's refusal closed the key meanwhile: a later turn must be counted where it falls.
            self._held.discard(grant.op)
            await self._settle(grant)
            grant.op = uuid.uuid4().hex

    async def reserve_slice(self, lane: Lane, grants: Sequence[Grant]) -> list[tuple[int, ...]]:
        """The replies of the script for the first of these grants, at least one."""
        known: Literal["", 0, 1] = "" if self._busy is not None else 0
        asked = [part for grant in grants for part in (grant.op, grant.est_tokens)]
        while True:
            args = [self.key_id, *self._limits.values(), *self._times_ms, known, lane, *asked]
            replies = await self._connection.script("scheduler/reserve", self._keys, args)
            if replies[0][0] != _WITHOUT_MEMORY or self._busy is None:
                return [tuple(map(int, reply)) for reply in replies]
            known = 1 if await self._busy(self.key_id) else 0
            if known:
                log.warning("the budget was lost, and requests were sent in its last window: closed for one")

    @property
    def in_slices(self) -> bool:
        """Requests are so many that asking for each would cost more than waiting some milliseconds."""
        return bool(self._often) and not any(asking.for_permit for asking in self._asking.values())

    async def _gather_settlements(self) -> None:
        if self.in_slices:
            await anyio.sleep(_SETTLE_EVERY_S)

    async def _settle(self, grant: Grant) -> None:
        try:
            await self._settling.join(grant)
        except Overloaded:
            # The permit comes back when the holder expires, and the estimate stays charged: safe, only slower.
            log.warning("could not settle a request's budget; its permit comes back by itself")

    async def _settle_all(self, members: Sequence[Member[Grant]]) -> None:
        await self.settle_slice([member.item for member in members])
        for member in members:
            member.done = True

    async def settle_slice(self, grants: Sequence[Grant]) -> None:
        """Settle these grants as they ended, in one call. Raises Overloaded."""
        args: list[str | int | float] = [self._window_ms, *self._limits.values()]
        for grant in grants:
            refusal = grant.refusal or RateLimited("")
            wait_ms = -1 if refusal.retry_after_s is None else math.ceil(refusal.retry_after_s * 1000)
            args += [grant.op, grant.outcome, grant.actual_tokens, refusal.limit, refusal.allowed or 0, wait_ms]
        gate_ms, *news = await self._connection.script("scheduler/settle", self._keys, args)
        self.note_gate(gate_ms)
        for limit, named in zip(news[::2], news[1::2], strict=True):
            log.warning("%s", limit_words(str(limit), int(named), configured=self._limits[str(limit)]))

    def note_gate(self, gate_ms: int) -> None:
        if gate_ms > 0:
            self._closed_until = max(self._closed_until, anyio.current_time() + gate_ms / 1000)


@dataclass(slots=True, eq=False)
class _Request:
    """One that waits for leave; start_s: when it may be sent, on this process' clock, once it has leave."""

    grant: Grant
    start_s: float = math.inf


class _Asking:
    """The requests of one lane that wait for leave. for_permit: it is permits that they wait for."""

    def __init__(self, budget: Budget, lane: Lane) -> None:
        self._budget = budget
        self._lane: Lane = lane
        self._line: Line[_Request] = Line(self._ask, ready=self._until_it_helps)
        self._not_before_s = self._asked_s = -math.inf
        self._permit_back = anyio.Event()
        self.for_permit = False

    async def granted(self, grant: Grant) -> float:
        """The start that was given, on this process' clock."""
        request = _Request(grant)
        await self._line.join(request)
        return request.start_s

    def permit_is_back(self) -> None:
        self._permit_back.set()

    async def _until_it_helps(self) -> None:
        if self.for_permit:
            with anyio.move_on_after(self._not_before_s - anyio.current_time()):
                await self._permit_back.wait()
            return
        slice_s = self._asked_s + _ASK_EVERY_S if self._budget.in_slices else -math.inf
        await anyio.sleep_until(max(self._not_before_s, slice_s))

    async def _ask(self, members: Sequence[Member[_Request]]) -> None:
        self._permit_back = anyio.Event()
        self._asked_s, self.for_permit, self._not_before_s = anyio.current_time(), False, -math.inf
        replies = await self._budget.reserve_slice(self._lane, [member.item.grant for member in members])
        now = anyio.current_time()
        unwanted = []
        for member, (status, *rest) in zip(members, replies, strict=False):
            if status < 0:
                member.error = _too_large(member.item.grant, allowed=rest[0])
            elif status == 0:
                self._wait(rest[0] / 1000, for_permit=rest[1] == _NO_PERMIT)
            elif member.gone:
                unwanted.append(member.item.grant)
            else:
                self._budget.note_gate(rest[1])
                member.item.start_s = now + rest[0] / 1000
                member.done = True
        if unwanted:
            await self._budget.settle_slice(unwanted)

    def _wait(self, seconds: float, *, for_permit: bool) -> None:
        # The jitter keeps the workers of a fleet from asking in step.
        jittered = seconds * random.uniform(1.0, 1.5) if for_permit else seconds + random.uniform(0, 0.02)
        self._not_before_s, self.for_permit = anyio.current_time() + jittered, for_permit


def limit_words(limit: str, named: int, *, configured: int) -> str:
    """What a refusal's limit means for a key that is configured otherwise."""
    unit, option = _LIMIT_WORDS[limit]
    if configured and named > configured:
        return (
            f"the provider allows {named:,} {unit}, {configured:,} are configured: somebody else may be using this key;"
            f" {option} raises what is used"
        )
    than = f"not {configured:,} as configured ({option})" if configured else f"and none is configured ({option})"
    return f"the provider allows {named:,} {unit}, {than}: that is used from now on"


def _too_large(grant: Grant, *, allowed: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"a request of about {grant.est_tokens} tokens can never be sent: this key may send {allowed} per minute;"
        " make passages shorter, or raise --tpm to what the key allows"
    )


def key_id(provider: str, key: str) -> str:
    """What stands for an API key in Redis: 16 hex digits, the same in every worker, from which the key cannot be read."""
    return hashlib.blake2b(f"{provider}\0{key}".encode(), digest_size=8, person=b"embedmill").hexdigest()
