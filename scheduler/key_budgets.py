"""What the budgets of a namespace's API keys stand at, read and not changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedmill.connection import Connection, key_prefix


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key: per window, and at the same time. 0: none."""

    requests: int
    tokens: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class KeyBudget:
    """The budget of one key, as Redis has it.

    learned: limits that a refusal named within the hour; requests, tokens: that started within the last window, as settled
    or estimated, later_...: that have leave to start; permits: in use, of `most_permits` (0: no limit), `live_permits` of
    them by live; closed_s: until the key opens; factor: of the pace, below 1 after refusals; live_s: since live asked, None
    if it never did; idle_s: since anybody asked.
    """

    key_id: str
    configured: Limits
    learned: Limits
    requests: int
    tokens: int
    later_requests: int
    later_tokens: int
    permits: int
    live_permits: int
    most_permits: int
    closed_s: float
    factor: float
    live_s: float | None
    idle_s: float
    window_s: float

    @property
    def limits(self) -> Limits:
        """What holds: of configured and learned the lower one."""
        pairs = zip(_values(self.configured), _values(self.learned), strict=True)
        return Limits(*(min(pair, key=lambda limit: limit or float("inf")) for pair in pairs))


async def read_budgets(connection: Connection, *, namespace: str) -> list[KeyBudget]:
    """Those that were used within a day, the newest first."""
    rows = await connection.script("scheduler/budgets", [key_prefix(namespace)])
    return [_parsed(row) for row in rows]


def _parsed(row: list[Any]) -> KeyBudget:
    key_id, *rest = row
    numbers = [float(value) for value in rest]
    configured, learned = (Limits(*map(round, numbers[start : start + 3])) for start in (0, 3))
    requests, tokens, later_requests, later_tokens, permits, live, most = map(round, numbers[6:13])
    closed_ms, factor, live_ms, idle_ms, window_ms = numbers[13:]
    return KeyBudget(
        str(key_id), configured, learned, requests, tokens, later_requests, later_tokens, permits, live, most,
        closed_s=closed_ms / 1000, factor=factor, live_s=None if live_ms < 0 else live_ms / 1000,
        idle_s=max(0.0, idle_ms / 1000), window_s=window_ms / 1000,
    )  # fmt: skip


def _values(limits: Limits) -> tuple[int, int, int]:
    return limits.requests, limits.tokens, limits.concurrency
