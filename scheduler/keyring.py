"""Several keys of one owner, used side by side: each request goes with the key that can send it soonest.

Every key has a budget and a breaker of its own. A key that the provider refuses is taken out while another is left;
the last one never is, so that its refusal goes up as the job's. Keys join and leave while requests are under way.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputRejected,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
)
from embedmill.messages import Lane

from .breaker import Breaker, Health
from .budget import Busy, Grant, RequestBudget, Spent

log = logging.getLogger("embedmill.keys")

_LOOK_EVERY_S = 3.0
_LEARN_WITHIN_S = 10.0
_LIMITED_S = 1.0
_BALANCE_AGAIN_S = 600.0
_NEVER_AGAIN = float("inf")


class KeySource(Protocol):
    """Where keys come from that may change while we run."""

    async def changed(self) -> Sequence[str] | None:
        """The keys, when they are not those of the last call. Raises ConfigurationError for what cannot be used."""
        ...


@dataclass(slots=True, eq=False)
class Key:
    """One key with what bounds its use. waiting: scopes of the requests that wait for their turn with it.

    out_until: it was refused, and is not used before; limited_until: a refusal for rate, in seconds of the loop's clock.
    """

    secret: str = field(repr=False)
    budget: RequestBudget
    breaker: Breaker
    waiting: set[anyio.CancelScope] = field(default_factory=set)
    in_flight: int = 0
    out_until: float = float("-inf")
    limited_until: float = float("-inf")

    @property
    def id(self) -> str:
        return self.budget.key_ids[0]

    @property
    def held_up(self) -> bool:
        """Nothing can be sent with it for now, as far as this process knows."""
        return self.breaker.is_open or self.limited_until > anyio.current_time()

    @property
    def load(self) -> tuple[bool, int, int]:
        """The less, the sooner it sends: those who wait for a slow key grow more."""
        return self.held_up, len(self.waiting), self.in_flight


class KeyRing:
    """A `RequestBudget` over the budgets of several keys. open_key: makes one of a secret; source: where keys may change.

    Each grant says by `secret` which key the request is to be sent with.
    """

    def __init__(
        self, secrets: Sequence[str], *, open_key: Callable[[str], Key], source: KeySource | None = None
    ) -> None:
        self._open_key = open_key
        self._source = source
        self._keys = {secret: open_key(secret) for secret in secrets}
        self._leaving: list[Key] = []
        self._busy: Busy | None = None
        self._looking = anyio.Lock()
        self._looked_at = float("-inf")

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Of all keys, also of those that were refused."""
        return tuple(key.id for key in self._keys.values())

    @property
    def secrets(self) -> tuple[str, ...]:
        """Of all keys, also of those that were refused."""
        return tuple(self._keys)

    @property
    def usable_secrets(self) -> tuple[str, ...]:
        """For what is no request of the budget's. All keys, should every one have been refused."""
        return tuple(key.secret for key in self._usable())

    @property
    def trouble(self) -> str:
        """Why nothing can be sent at the moment; empty while any key can."""
        troubles = [key.breaker.trouble for key in self._usable()]
        return troubles[0] if all(troubles) else ""

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        """See `Budget.reserve`. Waits while the breaker of every key is open."""
        while True:
            async with AsyncExitStack() as turn:
                key = self._soonest()
                grant, probe = await self._wait_with(key, est_tokens, lane, turn)
                if grant is None:
                    continue
                key.in_flight += 1
                try:
                    yield grant
                finally:
                    key.in_flight -= 1
                    with anyio.move_on_after(_LEARN_WITHIN_S, shield=True):
                        await self._learn(key, probe, grant)
                return

    async def restore(self, spent: Spent) -> None:
        for key in self._keys.values():
            await key.budget.restore(spent)

    def remember_by(self, busy: Busy) -> None:
        self._busy = busy
        for key in self._keys.values():
            key.budget.remember_by(busy)

    async def keep_alive(self) -> None:
        """Keep what is held, and look whether the keys have changed, until cancelled."""
        kept: dict[Key, anyio.CancelScope] = {}
        async with anyio.create_task_group() as group:
            while True:
                self._leaving = [key for key in self._leaving if key.in_flight or key.waiting]
                present = [*self._keys.values(), *self._leaving]
                for key in present:
                    if key not in kept:
                        kept[key] = anyio.CancelScope()
                        group.start_soon(_keep, key, kept[key])
                for key in kept.keys() - set(present):
                    kept.pop(key).cancel()
                await anyio.sleep(_LOOK_EVERY_S)
                await self._look()

    def _usable(self) -> list[Key]:
        """Those that were not refused; all, should every one have been."""
        now = anyio.current_time()
        return [key for key in self._keys.values() if key.out_until <= now] or list(self._keys.values())

    def _soonest(self) -> Key:
        return min(self._usable(), key=lambda key: key.load)

    async def _wait_with(self, key: Key, est_tokens: int, lane: Lane, turn: AsyncExitStack) -> tuple[Grant | None, str]:
        """The key's grant, entered into `turn`; none when another key should be asked instead."""
        probe, grant = "", None
        with anyio.CancelScope() as scope:
            key.waiting.add(scope)
            try:
                probe = await key.breaker.admit()
                if probe:
                    turn.push_async_callback(key.breaker.note, probe, "unclear")
                grant = await turn.enter_async_context(key.budget.reserve(est_tokens, lane=lane))
            finally:
                key.waiting.discard(scope)
        if grant is None:
            return None, probe
        if scope.cancel_called or (key.breaker.is_open and not probe):
            grant.outcome = "unsent"
            return None, probe
        grant.secret, grant.key_id = key.secret, key.id
        return grant, probe

    async def _learn(self, key: Key, probe: str, grant: Grant) -> None:
        """From how a request ended: of the provider, of the key, of its limits."""
        error, now = grant.error, anyio.current_time()
        await key.breaker.note(probe, _health(grant), said=str(error or ""))
        if isinstance(error, (InvalidKey, NoBalance)):
            await self._take_out(key, error)
            grant.other_key = any(other is not key and other.out_until <= now for other in self._keys.values())
        elif isinstance(error, RateLimited):
            key.limited_until = now + max(_LIMITED_S, error.retry_after_s or 0.0)
        if key.held_up:
            self._redirect(key)

    async def _take_out(self, key: Key, refusal: EmbedmillError) -> None:
        """Use the others, if there are any."""
        if key.out_until > anyio.current_time():
            return
        await self._look(at_once=True)
        others = [other for other in self._usable() if other is not key]
        if self._keys.get(key.secret) is not key or not others or key.out_until > anyio.current_time():
            return
        again_s = _BALANCE_AGAIN_S if isinstance(refusal, NoBalance) else _NEVER_AGAIN
        key.out_until = anyio.current_time() + again_s
        log.warning("key %s is not used any more (others left: %d): %s", key.id, len(others), refusal)
        self._redirect(key)

    def _redirect(self, key: Key) -> None:
        """Those who wait for this key choose again, when another one can send."""
        if any(not other.held_up for other in self._usable() if other is not key):
            for scope in list(key.waiting):
                scope.cancel()

    async def _look(self, *, at_once: bool = False) -> None:
        """Take over keys that have changed."""
        if self._source is None:
            return
        async with self._looking:
            if not at_once and anyio.current_time() - self._looked_at < _LOOK_EVERY_S / 2:
                return
            self._looked_at = anyio.current_time()
            try:
                secrets = await self._source.changed()
            except ConfigurationError as error:
                log.warning("the keys that we have go on: %s", error)
                return
            if secrets is not None:
                self._replace(secrets)

    def _replace(self, secrets: Sequence[str]) -> None:
        former = self._keys
        self._keys = {secret: former.get(secret) or self._joined(secret) for secret in secrets}
        gone = [key for secret, key in former.items() if secret not in self._keys]
        self._leaving += gone
        joined = [key.id for secret, key in self._keys.items() if secret not in former]
        log.warning(
            "the API keys have changed: %s joined, %s left, %d in use",
            ", ".join(joined) or "none",
            ", ".join(key.id for key in gone) or "none",
            len(self._usable()),
        )
        for key in gone:
            self._redirect(key)

    def _joined(self, secret: str) -> Key:
        key = self._open_key(secret)
        if self._busy is not None:
            key.budget.remember_by(self._busy)
        return key


async def _keep(key: Key, scope: anyio.CancelScope) -> None:
    async def keep_probe() -> None:
        while True:
            await anyio.sleep(_LOOK_EVERY_S)
            await key.breaker.keep()

    with scope:
        async with anyio.create_task_group() as group:
            group.start_soon(key.budget.keep_alive)
            group.start_soon(keep_probe)


def _health(grant: Grant) -> Health:
    match grant.error:
        case Overloaded() | OutcomeUnknown():
            return "failed"
        # Who refuses a text is well enough to have read it.
        case InputRejected():
            return "good"
        case None if grant.outcome == "used":
            return "good"
        case _:
            return "unclear"
