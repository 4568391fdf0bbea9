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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import anyio

from embedmill.connection import Connection, key_prefix
from embedmill.errors import Overloaded, RateLimited, RequestTooLarge

log = logging.getLogger("embedmill.budget")

_SETTLE_WITHIN_S = 5.0
_NO_PERMIT = 1
_WITHOUT_MEMORY = -2


@dataclass(slots=True)
class Grant:
    """Leave to send one request now. Say how it ended before leaving; left unsaid, the whole estimate is charged."""

    est_tokens: int
    op: str = field(default_factory=lambda: uuid.uuid4().hex)
    outcome: Literal["used", "unknown", "unsent", "limited"] = "unsent"
    actual_tokens: int = 0
    refusal: RateLimited | None = None

    def settle(self, actual_tokens: int) -> None:
        """The provider counted so many tokens; 0 for a request that was refused or not executed."""
        self.outcome, self.actual_tokens = "used", actual_tokens

    def limited(self, refusal: RateLimited) -> None:
        """The provider refused for its rate: the whole fleet learns from it."""
        self.outcome, self.refusal = "limited", refusal


class RequestBudget(Protocol):
    """Where requests wait for their turn. key_id: what stands for the API key in logs, "" where there is none."""

    @property
    def key_id(self) -> str: ...

    def reserve(self, est_tokens: int) -> AbstractAsyncContextManager[Grant]:
        """Enter when the request may be sent; leave to settle it. Raises RequestTooLarge for what can never be sent."""
        ...

    async def restore(self, spent_tokens: int) -> None:
        """Charge tokens of the last window to a budget that does not remember them."""
        ...

    def remember_by(self, busy: Callable[[], Awaitable[bool]]) -> None:
        """Ask `busy` whether requests of the last window are known of, when Redis has lost the budget.

        Then it is born closed for one window.
        """
        ...

    async def keep_alive(self) -> None:
        """Say that this process lives, until cancelled: what a dead one held comes back soon."""
        ...


class Unlimited:
    """No limits: local models."""

    key_id = ""

    @asynccontextmanager
    async def reserve(self, est_tokens: int) -> AsyncIterator[Grant]:
        yield Grant(est_tokens, outcome="unknown")

    async def restore(self, spent_tokens: int) -> None:
        """Nothing is limited, so nothing is remembered."""

    def remember_by(self, busy: Callable[[], Awaitable[bool]]) -> None:
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
        self._connection = connection
        self._limits = {"requests": rpm or 0, "tokens": tpm or 0, "concurrency": concurrency or 0}
        self._window_ms = window_s * 1000
        self._times_ms = (self._window_ms, slack_s * 1000, max_wait_s * 1000, holder_s * 1000)
        prefix = f"{key_prefix(namespace)}:rl:{key_id}"
        self._holder_s = holder_s
        self._held: set[str] = set()
        self._keys = [f"{prefix}:{part}" for part in ("state", "holders", "grants", "window")]
        # Only one task of this process asks at a time: the others are behind it anyway, and asking costs a round trip.
        self._turn = anyio.Lock()
        self._permit_back = anyio.Event()
        self._closed_until = -math.inf
        self._busy: Callable[[], Awaitable[bool]] | None = None

    def remember_by(self, busy: Callable[[], Awaitable[bool]]) -> None:
        self._busy = busy

    @asynccontextmanager
    async def reserve(self, est_tokens: int) -> AsyncIterator[Grant]:
        """Wait for a turn, then hold a permit while the body runs.

        Cancelled while waiting, nothing is charged; cancelled in the body, the estimate is.
        Raises RequestTooLarge when the request alone exceeds a whole window's tokens, Overloaded without Redis.
        """
        grant = Grant(max(1, est_tokens))
        try:
            await self._wait_for_turn(grant)
            grant.outcome = "unknown"
            yield grant
        finally:
            self._held.discard(grant.op)
            with anyio.CancelScope(shield=True), anyio.move_on_after(_SETTLE_WITHIN_S):
                await self._settle(grant)
            self._permit_back.set()

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

    async def restore(self, spent_tokens: int) -> None:
        """Charge what was sent in the last window to a budget that has no memory of it, as after a loss of Redis."""
        limit = self._limits["tokens"]
        if spent_tokens <= 0 or not limit or await self._connection.command("EXISTS", self._keys[0]):
            return
        async with self.reserve(min(spent_tokens, limit)):
            pass

    async def _wait_for_turn(self, grant: Grant) -> None:
        while True:
            wait_s = await self._granted(grant)
            self._held.add(grant.op)
            await anyio.sleep(wait_s)
            if self._closed_until <= anyio.current_time():
                return
            # Another task's refusal closed the key meanwhile: a later turn must be counted where it falls.
            self._held.discard(grant.op)
            await self._settle(grant)
            grant.op = uuid.uuid4().hex

    async def _granted(self, grant: Grant) -> float:
        """Seconds until the start that was given."""
        request = [grant.op, grant.est_tokens, *self._limits.values(), *self._times_ms]
        known: Literal["", 0, 1] = "" if self._busy is not None else 0
        async with self._turn:
            while True:
                self._permit_back = anyio.Event()
                granted, *rest = await self._connection.script("scheduler/reserve", self._keys, [*request, known])
                if granted == _WITHOUT_MEMORY and self._busy is not None:
                    known = 1 if await self._busy() else 0
                    if known:
                        log.warning("the budget was lost, and requests were sent in its last window: closed for one")
                    continue
                wait_ms, *rest = rest
                if granted < 0:
                    raise RequestTooLarge(
                        f"a request of about {grant.est_tokens} tokens can never be sent: this key may send {wait_ms} per"
                        " minute; make passages shorter, or raise --tpm to what the key allows"
                    )
                if granted:
                    self._note_gate(rest[0])
                    return float(wait_ms) / 1000
                await self._wait(wait_ms / 1000, for_permit=rest[0] == _NO_PERMIT)

    async def _wait(self, seconds: float, *, for_permit: bool) -> None:
        # The jitter keeps the workers of a fleet from asking in step.
        jittered = seconds * random.uniform(1.0, 1.5) if for_permit else seconds + random.uniform(0, 0.02)
        if not for_permit:
            await anyio.sleep(jittered)
            return
        with anyio.move_on_after(jittered):
            await self._permit_back.wait()

    async def _settle(self, grant: Grant) -> None:
        refusal = grant.refusal or RateLimited("")
        wait_ms = -1 if refusal.retry_after_s is None else math.ceil(refusal.retry_after_s * 1000)
        args: list[str | int | float] = [
            grant.op,
            grant.outcome,
            grant.actual_tokens,
            refusal.limit,
            refusal.allowed or 0,
            wait_ms,
            self._limits.get(refusal.limit, 0),
            self._window_ms,
        ]
        try:
            _, gate_ms = await self._connection.script("scheduler/settle", self._keys, args)
        except Overloaded:
            # The permit comes back when the holder expires, and the estimate stays charged: safe, only slower.
            log.warning("could not settle a request's budget; its permit comes back by itself")
        else:
            self._note_gate(gate_ms)

    def _note_gate(self, gate_ms: int) -> None:
        if gate_ms > 0:
            self._closed_until = max(self._closed_until, anyio.current_time() + gate_ms / 1000)


def key_id(provider: str, key: str) -> str:
    """What stands for an API key in Redis: 16 hex digits, the same in every worker, from which the key cannot be read."""
    return hashlib.blake2b(f"{provider}\0{key}".encode(), digest_size=8, person=b"embedmill").hexdigest()
