"""The queue of shard tasks: lanes, turns, fenced leases, delayed retries, dead letters. Redis decides every step, by its own
clock.

A lease is known by its epoch, which grows with every lease: an earlier holder can neither extend nor hand back a later one.
The queue is disposable; the dataset is the truth, and `reconcile` rebuilds one from the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedmill.connection import Connection, key_prefix
from embedmill.messages import Announcement, DeadLetter, Task, job_key

LEASE_S = 30.0
_BLOCK = 200
_BULK_PATIENCE_S = 10.0
_SILENCE_S = 300.0
# A scheduler claims its inboxes every five seconds.
_CLAIMED_S = 20.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A task that is ours until it expires. `deliveries` counts consecutive ones that added nothing to the checkpoint."""

    task: Task
    epoch: str
    deliveries: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Extended:
    """Ids of tasks whose lease is lost, and of those that are ours and whose job is paused."""

    lost: frozenset[str] = frozenset()
    halted: frozenset[str] = frozenset()


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


@dataclass(frozen=True, slots=True)
class JobDepth:
    """What one job has in the queue. rows, tokens (estimated): of all its tasks; oldest_s: age of its oldest ready task."""

    dataset_id: str
    job: str
    dataset: str
    lane: str
    fingerprint: str
    paused: bool
    ready: int
    leased: int
    delayed: int
    rows: int
    tokens: int
    oldest_s: float
    dead: int

    @property
    def tasks(self) -> int:
        return self.ready + self.leased + self.delayed


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker last said of itself, and how long ago."""

    owner: str
    record: Mapping[str, Any]
    age_s: float


@dataclass(frozen=True, slots=True)
class InboxDepth:
    """Messages that wait in an inbox, the dataset that it is admitted into, and since when no scheduler has said so."""

    name: str
    messages: int
    dataset_id: str
    dataset: str
    silent_s: float

    @property
    def is_served(self) -> bool:
        return self.silent_s < _CLAIMED_S


class Queue:
    """The queue of one namespace. Every method may be repeated without harm, but for `lease`: a lease whose reply was lost
    comes back when it expires, with a delivery more. All are atomic, but for `forget` and `clear`, which work in blocks.

    bulk_patience_s: bulk is served at least this often, however much live there is.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str = "default",
        lease_s: float = LEASE_S,
        bulk_patience_s: float = _BULK_PATIENCE_S,
    ) -> None:
        self.connection = connection
        self.namespace = namespace
        self._prefix = key_prefix(namespace)
        self._bulk_patience_ms = int(bulk_patience_s * 1000)
        self.lease_s = lease_s

    async def enqueue(self, tasks: Iterable[Task]) -> int:
        """Add tasks that are not yet known; how many were added."""
        by_job: dict[tuple[str, ...], list[Task]] = {}
        for task in tasks:
            by_job.setdefault((task.job_key, task.dataset, task.lane, task.fingerprint), []).append(task)
        added = 0
        for members in by_job.values():
            for start in range(0, len(members), _BLOCK):
                added += int(await self._script("enqueue", enqueue_arguments(members[start : start + _BLOCK])))
        return added

    async def lease(self, owner: str, *, count: int = 1, fingerprint: str = "") -> list[Lease]:
        """Take up to `count` tasks of an embedder (of any, without a fingerprint).

        Expired leases of dead workers come first.
        """
        arguments = [owner, int(self.lease_s * 1000), count, fingerprint, self._bulk_patience_ms]
        reply = await self._script("lease", arguments)
        return [
            Lease(Task.from_json(payload), str(epoch), int(deliveries), int(attempts))
            for _, payload, epoch, deliveries, attempts in reply
        ]

    async def extend(self, leases: Sequence[Lease], *, progressed: Iterable[str] = ()) -> Extended:
        """Keep leases alive. `progressed`: ids of tasks whose checkpoint grew. What others let expire comes back."""
        grown = set(progressed)
        triples = [part for held in leases for part in (held.task.id, held.epoch, int(held.task.id in grown))]
        lost, halted = await self._script("extend", [int(self.lease_s * 1000), *triples])
        return Extended(frozenset(lost), frozenset(halted))

    async def finish(self, task: Task, *, dead: Sequence[DeadLetter] = ()) -> bool:
        """The shard has its marker: ack, announce and keep its dead letters. False when that was done before."""
        announcement = Announcement(task.dataset, task.dataset_id, task.shard)
        letters = [part for letter in dead for part in (letter.key, letter.to_json())]
        return bool(await self._script("finish", [task.id, task.job_key, announcement.to_json(), *letters]))

    async def drop(self, lease: Lease) -> bool:
        """Forget a task that is about nothing. False when the lease is lost."""
        return bool(await self._script("drop", [lease.task.id, lease.epoch]))

    async def unknown(self, ids: Sequence[str]) -> list[str]:
        """Which of these tasks the queue does not have."""
        return list(await self._script("unknown", list(ids))) if ids else []

    async def release(self, lease: Lease) -> bool:
        """Hand back at once, as if it had never been taken: its job is not charged. False when the lease is lost."""
        return bool(await self._script("give_back", [lease.task.id, lease.epoch, 0, 0]))

    async def retry(self, lease: Lease, *, delay_s: float, counted: bool = True) -> bool:
        """Hand back for later; not counted: what was not tried spends no attempt. The turn is used. False when the lease is
        lost."""
        arguments = [lease.task.id, lease.epoch, max(1, int(delay_s * 1000)), int(counted)]
        return bool(await self._script("give_back", arguments))

    async def pause(self, dataset_id: str, job: str) -> bool:
        """Hand out no more tasks of a job; who holds one is told when extending. False when that was so already."""
        return bool(await self._script("pause", [job_key(dataset_id, job), 1]))

    async def resume(self, dataset_id: str, job: str) -> bool:
        """Undo `pause`."""
        return bool(await self._script("pause", [job_key(dataset_id, job), 0]))

    async def forget(self, dataset_id: str, job: str) -> int:
        """Remove a job with all its tasks, whose holders lose their leases; how many there were.

        It is paused from the first block on. Cancelled in between, it stays so, with the tasks that are left.
        """
        removed, place, cursor = 0, "leased", "0"
        while place:
            count, place, cursor = await self._script("forget", [job_key(dataset_id, job), 0, place, cursor])
            removed += int(count)
        return removed

    async def forget_idle(self, dataset_id: str, job: str, *, idle_s: float) -> bool:
        """Remove the record and the dead letters of a job that has had no task for so long; False when it has not."""
        arguments = [job_key(dataset_id, job), max(1, int(idle_s * 1000)), "ready", "0"]
        removed, _, _ = await self._script("forget", arguments)
        return int(removed) >= 0

    async def forget_dead(self, dataset_id: str, job: str, keys: Sequence[str]) -> None:
        """Drop dead letters, by `DeadLetter.key`: they were retried, or somebody has seen to them."""
        for start in range(0, len(keys), _BLOCK):
            block = keys[start : start + _BLOCK]
            await self.connection.command("HDEL", f"{self._prefix}:dead:{job_key(dataset_id, job)}", *block)

    async def dead_letters(self, dataset_id: str, job: str) -> dict[str, tuple[str, int]]:
        """(id, version) of each dead letter, by `DeadLetter.key`. Their rows may have moved since."""
        found: dict[str, tuple[str, int]] = {}
        cursor, key = 0, f"{self._prefix}:dead:{job_key(dataset_id, job)}"
        while True:
            cursor, letters = await self.connection.command("HSCAN", key, cursor, "COUNT", _BLOCK)
            for name, letter in letters.items():
                record = json.loads(letter)
                found[str(name)] = (str(record["id"]), int(record["version"]))
            if not cursor:
                return found

    async def depth(self) -> Depth:
        return Depth(*(int(count) for count in await self._script("depth")))

    async def jobs(self) -> list[JobDepth]:
        """Every job that the queue knows, by dataset and name."""
        found = []
        for key, dataset, lane, fingerprint, paused, *counts, age_ms, dead in await self._script("jobs"):
            dataset_id, _, job = str(key).partition(":")
            ready, leased, delayed, rows, tokens = map(int, counts)
            found.append(
                JobDepth(
                    dataset_id, job, dataset, lane, fingerprint, paused == "1",
                    ready, leased, delayed, rows, tokens, int(age_ms) / 1000, int(dead),
                )
            )  # fmt: skip
        return sorted(found, key=lambda job: (job.dataset, job.job))

    async def report(self, owner: str, record: Mapping[str, Any] | None) -> None:
        """A worker says what it has done so far, or (None) that it ends. Who is silent for five minutes is forgotten."""
        text = "" if record is None else json.dumps(record, ensure_ascii=False)
        await self._script("report", [owner, text, int(_SILENCE_S * 1000)])

    async def workers(self) -> list[WorkerReport]:
        reply = await self._script("workers")
        return [WorkerReport(str(owner), json.loads(record), int(age_ms) / 1000) for owner, record, age_ms in reply]

    async def inboxes(self) -> list[InboxDepth]:
        """Those that a scheduler has ever admitted, by name. A producer may not write that there is another one."""
        reply = await self._script("inboxes")
        return sorted(
            (InboxDepth(str(name), int(waiting), str(id_), str(place), int(silent_ms) / 1000)
             for name, waiting, id_, place, silent_ms in reply),
            key=lambda inbox: inbox.name,
        )  # fmt: skip

    async def clear(self) -> int:
        """Forget every task, lease and dead letter: for a queue with one owner, which rebuilds it from the dataset."""
        forgotten, more = 0, 1
        while more:
            count, more = await self._script("clear")
            forgotten += int(count)
        return forgotten

    async def wait_for_work(self, after: str, *, timeout_s: float) -> str:
        """Sleep until tasks were added after the wake-up `after` (start with "0"), at most `timeout_s`."""
        return await self.connection.wait_for_entry(f"{self._prefix}:wake", after, timeout_s=timeout_s)

    async def wait_for_announcement(self, after: str, *, timeout_s: float) -> str:
        """The same for committed shards."""
        return await self.connection.wait_for_entry(f"{self._prefix}:announced", after, timeout_s=timeout_s)

    async def _script(self, name: str, arguments: Sequence[object] = ()) -> Any:
        return await self.connection.script(f"scheduler/{name}", [self._prefix], arguments)


def enqueue_arguments(tasks: Sequence[Task]) -> list[str | int]:
    """What `add_tasks` in scripts/adding.lua takes: tasks of one job, one dataset, one lane."""
    first = tasks[0]
    arguments: list[str | int] = [first.job_key, first.dataset, first.lane, first.fingerprint, len(tasks)]
    for task in tasks:
        arguments += [task.id, task.to_json(), task.cost, task.rows]
    return arguments
