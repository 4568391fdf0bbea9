"""The queue of shard tasks: lanes, fenced leases, delayed retries, dead letters. Redis decides every step, by its own clock.

A lease is known by its epoch, which grows with every lease: an earlier holder can neither extend nor hand back a later one.
The queue is disposable; the dataset is the truth, and `reconcile` rebuilds one from the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedmill.connection import Connection, key_prefix
from embedmill.messages import Announcement, DeadLetter, Lane, Task

_BLOCK = 200


@dataclass(frozen=True, slots=True)
class Lease:
    """A task that is ours until it expires. `deliveries` counts consecutive ones that added nothing to the checkpoint."""

    task: Task
    epoch: str
    deliveries: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Depth:
    """Tasks by place."""

    ready_live: int
    ready_bulk: int
    leased: int
    delayed: int
    dead: int

    @property
    def open(self) -> int:
        return self.ready_live + self.ready_bulk + self.leased + self.delayed


class Queue:
    """The queue of one namespace. Every method is atomic and may be repeated without harm, but for `lease`: a lease whose
    reply was lost comes back when it expires."""

    def __init__(self, connection: Connection, *, namespace: str = "default", lease_s: float = 30.0) -> None:
        self._connection = connection
        self._prefix = key_prefix(namespace)
        self.lease_s = lease_s

    async def enqueue(self, tasks: Iterable[Task]) -> int:
        """Add tasks that are not yet known; how many were added."""
        added = 0
        by_lane: dict[Lane, list[Task]] = {}
        for task in tasks:
            by_lane.setdefault(task.lane, []).append(task)
        for lane, members in by_lane.items():
            for start in range(0, len(members), _BLOCK):
                parts = [part for task in members[start : start + _BLOCK] for part in (task.id, task.to_json())]
                added += int(await self._connection.script("scheduler/enqueue", [self._prefix], [lane, *parts]))
        return added

    async def lease(self, owner: str, *, count: int = 1) -> list[Lease]:
        """Take up to `count` tasks; expired leases of dead workers come first."""
        arguments = [owner, int(self.lease_s * 1000), count]
        reply = await self._connection.script("scheduler/lease", [self._prefix], arguments)
        return [
            Lease(Task.from_json(payload), str(epoch), int(deliveries), int(attempts))
            for _, payload, epoch, deliveries, attempts in reply
        ]

    async def extend(self, leases: Sequence[Lease], *, progressed: Iterable[str] = ()) -> set[str]:
        """Keep leases alive; ids of those that are lost. `progressed`: ids of tasks whose checkpoint grew."""
        grown = set(progressed)
        triples = [part for held in leases for part in (held.task.id, held.epoch, int(held.task.id in grown))]
        return set(
            await self._connection.script("scheduler/extend", [self._prefix], [int(self.lease_s * 1000), *triples])
        )

    async def finish(self, task: Task, *, dead: Sequence[DeadLetter] = ()) -> bool:
        """The shard has its marker: ack, announce and keep its dead letters. False when that was done before."""
        announcement = Announcement(task.dataset, task.dataset_id, task.shard)
        letters = [part for letter in dead for part in (letter.key, letter.to_json())]
        return bool(
            await self._connection.script(
                "scheduler/finish", [self._prefix], [task.id, announcement.to_json(), *letters]
            )
        )

    async def drop(self, lease: Lease) -> bool:
        """Forget a task that is about nothing. False when the lease is lost."""
        return bool(await self._connection.script("scheduler/drop", [self._prefix], [lease.task.id, lease.epoch]))

    async def unknown(self, ids: Sequence[str]) -> list[str]:
        """Which of these tasks the queue does not have."""
        return list(await self._connection.script("scheduler/unknown", [self._prefix], ids)) if ids else []

    async def release(self, lease: Lease) -> bool:
        """Hand back at once, as if it had never been taken. False when the lease is lost."""
        arguments = [lease.task.id, lease.epoch, 0, 0]
        return bool(await self._connection.script("scheduler/give_back", [self._prefix], arguments))

    async def retry(self, lease: Lease, *, delay_s: float) -> bool:
        """Hand back for later, counting an attempt. False when the lease is lost."""
        arguments = [lease.task.id, lease.epoch, max(1, int(delay_s * 1000)), 1]
        return bool(await self._connection.script("scheduler/give_back", [self._prefix], arguments))

    async def depth(self) -> Depth:
        return Depth(*(int(count) for count in await self._connection.script("scheduler/depth", [self._prefix])))

    async def clear(self) -> int:
        """Forget every task, lease and dead letter: for a queue with one owner, which rebuilds it from the dataset."""
        return int(await self._connection.script("scheduler/clear", [self._prefix]))

    async def wait_for_work(self, after: str, *, timeout_s: float) -> str:
        """Sleep until tasks were added after the wake-up `after` (start with "0"), at most `timeout_s`."""
        return await self._connection.wait_for_entry(f"{self._prefix}:wake", after, timeout_s=timeout_s)

    async def wait_for_announcement(self, after: str, *, timeout_s: float) -> str:
        """The same for committed shards."""
        return await self._connection.wait_for_entry(f"{self._prefix}:announced", after, timeout_s=timeout_s)
