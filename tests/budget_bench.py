"""The scripts of the budget under a clock of the test's own: fakeredis reads `time.time`."""

from __future__ import annotations

from scheduler.budget import Budget, Grant


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Asker:
    """Speaks to the scripts as `Budget` does, without sleeping."""

    def __init__(self, connection, **limits):
        self.connection = connection
        self.budget = Budget(connection, namespace="t", key_id="k", **limits)

    async def reserve(self, est_tokens=1, op=None, lane="bulk"):
        """The reply, its times in seconds, and the grant."""
        grant = Grant(est_tokens, op=op) if op else Grant(est_tokens)
        [(status, wait_ms, *rest)] = await self.budget.reserve_slice(lane, [grant])
        return status, wait_ms / 1000, rest, grant

    async def settle(self, grant, actual_tokens=None, refusal=None, outcome="unknown"):
        """As it ended: `unknown`, `unsent`, used or refused."""
        grant.outcome = outcome
        if actual_tokens is not None:
            grant.settle(actual_tokens)
        if refusal is not None:
            grant.limited(refusal)
        await self.budget._settle(grant)

    async def held(self):
        return int(await self.connection.command("ZCARD", self.budget._keys[1]))
