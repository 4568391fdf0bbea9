"""A queue on an empty server, and its time, for the tests of the queue.

Time passes by moving every due time back: the same as a later clock, on a server whose clock cannot be set.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from dataclasses import dataclass

from embedmill.connection import Connection, key_prefix
from embedmill.messages import DeadLetter, Lane, Task
from scheduler.queue import Lease, Queue

LEASE_S = 30.0
NAMESPACE = "tested"
PREFIX = key_prefix(NAMESPACE)
DATASET_ID = "d0"
_NEVER_S = 10.0**8


@dataclass(frozen=True)
class Bench:
    """A queue on an empty server, and its time."""

    connection: Connection

    @property
    def queue(self) -> Queue:
        return Queue(self.connection, namespace=NAMESPACE, lease_s=LEASE_S, bulk_patience_s=_NEVER_S)

    async def elapse(self, seconds: float) -> None:
        for name in ("leased", "delayed"):
            key = f"{PREFIX}:{name}"
            for id_ in await self.connection.command("ZRANGE", key, 0, -1):
                await self.connection.command("ZINCRBY", key, -seconds * 1000, id_)

    async def announced(self) -> int:
        return int(await self.connection.command("XLEN", f"{PREFIX}:announced"))


def task(shard: int, *, lane: Lane = "bulk", job: str | None = None, tokens: int = 25, fingerprint: str = "f0") -> Task:
    """A task of the job that has the name of its lane, or another one."""
    return Task("/data/wiki über", DATASET_ID, shard, job or lane, 10, tokens * 4, lane, fingerprint)


def tasks(count: int, *, lane: Lane = "bulk") -> list[Task]:
    return [task(shard, lane=lane) for shard in range(count)]


def shards(leases: Iterable[Lease]) -> list[int]:
    return [lease.task.shard for lease in leases]


def letter(shard: int, row: int) -> DeadLetter:
    return DeadLetter("/data/wiki", "bulk", f"id{row}", 1, shard, row, "gate", "the vector is zero")


async def only(leases: Awaitable[list[Lease]]) -> Lease:
    (lease,) = await leases
    return lease
