"""The queue against a model of it in Python, step by step. Every command may be sent twice, as when its reply was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from embedmill.connection import FAKE_URL, Connection
from embedmill.messages import Lane, Task
from scheduler.queue import Depth, Lease
from tests.contract.queue_bench import DATASET_ID, LEASE_S, Bench, task

T = TypeVar("T")
SHARDS = st.integers(0, 7)
LANE_OF: dict[str, Lane] = {"live": "live", "a": "bulk", "b": "bulk"}


def task_of(shard: int) -> Task:
    """Every shard has its job and its size for good."""
    job = ("live", "a", "b", "b")[shard % 4]
    return task(shard, lane=LANE_OF[job], job=job, tokens=10 * (1 + shard % 3))


@dataclass
class Place:
    """What the model knows of one task. due_s: when its lease or its delay ends."""

    task: Task
    position: int
    state: str = "ready"
    due_s: float = 0
    epoch: str = "0"
    deliveries: int = 0
    attempts: int = 0


@dataclass
class Turns:
    """Jobs of one lane by the tokens that they were served, and how far the turns have come."""

    jobs: dict[str, int] = field(default_factory=dict)
    clock: int = 0


class QueueModel(RuleBasedStateMachine):
    """The queue against dictionaries."""

    given = Bundle("given")
    twice = st.booleans()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.bench = self.run(self._start())
        self.places: dict[int, Place] = {}
        self.served: dict[str, int] = {}
        self.turns: dict[Lane, Turns] = {"live": Turns(), "bulk": Turns()}
        self.paused: set[str] = set()
        self.now_s = 0.0
        self.turn = self.position = self.announced = 0
        self.last_epoch = 0

    async def _start(self) -> Bench:
        return Bench(Connection(FAKE_URL))

    def run(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self.runner.run(wait())

    def teardown(self) -> None:
        self.run(self.bench.connection.aclose())
        self.runner.close()

    def ready(self, job: str) -> list[Place]:
        found = [p for p in self.places.values() if p.state == "ready" and p.task.job == job]
        return sorted(found, key=lambda place: place.position)

    def join(self, job: str) -> None:
        turns = self.turns[LANE_OF[job]]
        if job not in self.paused and self.ready(job) and job not in turns.jobs:
            turns.jobs[job] = max(self.served.get(job, 0), turns.clock)

    def leave(self, job: str) -> None:
        self.turns[LANE_OF[job]].jobs.pop(job, None)

    def remove(self, shard: int) -> bool:
        place = self.places.pop(shard, None)
        if place and place.state == "ready" and not self.ready(place.task.job):
            self.leave(place.task.job)
        return place is not None

    @rule(shard=SHARDS, again=twice)
    def enqueue(self, shard: int, again: bool) -> None:
        for _ in range(1 + again):
            assert self.run(self.bench.queue.enqueue([task_of(shard)])) == (shard not in self.places)
            if shard not in self.places:
                self.position += 1
                self.places[shard] = Place(task_of(shard), self.position)
            self.join(task_of(shard).job)

    @rule(target=given, count=st.integers(1, 3))
    def lease(self, count: int) -> object:
        leases = self.run(self.bench.queue.lease("w", count=count))
        expected = self._lease(count)
        assert [(lease.task.shard, lease.deliveries, lease.attempts) for lease in leases] == [
            (shard, self.places[shard].deliveries, self.places[shard].attempts) for shard in expected
        ]
        for lease in leases:
            assert int(lease.epoch) > self.last_epoch
            self.last_epoch = int(lease.epoch)
            self.places[lease.task.shard].epoch = lease.epoch
        return multiple(*leases)

    def _back(self) -> None:
        for place in self.places.values():
            if place.state != "ready" and place.due_s <= self.now_s:
                place.state = "ready"
                self.join(place.task.job)

    def _refund(self, task: Task) -> None:
        jobs = self.turns[LANE_OF[task.job]].jobs
        if jobs.get(task.job) == self.served[task.job]:
            jobs[task.job] -= task.cost
        self.served[task.job] -= task.cost

    def _lease(self, count: int) -> list[int]:
        self._back()
        taken: list[int] = []
        while len(taken) < count:
            lanes: list[Lane] = ["bulk", "live"] if (self.turn + 1) % 9 == 0 else ["live", "bulk"]
            turns = next((self.turns[lane] for lane in lanes if self.turns[lane].jobs), None)
            if turns is None:
                break
            self.turn += 1
            served, job = min((served, f"{DATASET_ID}:{job}") for job, served in turns.jobs.items())
            job = job.removeprefix(f"{DATASET_ID}:")
            place = self.ready(job)[0]
            place.state, place.due_s, place.deliveries = "leased", self.now_s + LEASE_S, place.deliveries + 1
            turns.clock = served
            self.served[job] = turns.jobs[job] = served + place.task.cost
            if not self.ready(job):
                self.leave(job)
            taken.append(place.task.shard)
        return taken

    def _held(self, lease: Lease) -> Place | None:
        place = self.places.get(lease.task.shard)
        return place if place and place.state == "leased" and place.epoch == lease.epoch else None

    @rule(lease=given, progressed=st.booleans(), again=twice)
    def extend(self, lease: Lease, progressed: bool, again: bool) -> None:
        place, id_ = self._held(lease), lease.task.id
        for _ in range(1 + again):
            extended = self.run(self.bench.queue.extend([lease], progressed=[id_] if progressed else []))
            assert extended.lost == (set() if place else {id_})
            assert extended.halted == ({id_} if place and lease.task.job in self.paused else set())
        if place:
            place.due_s = self.now_s + LEASE_S
            place.deliveries = 0 if progressed else place.deliveries
        self._back()

    @rule(lease=given, delay_s=st.sampled_from([0, 10, 20]), counted=st.booleans(), again=twice)
    def hand_back(self, lease: Lease, delay_s: float, counted: bool, again: bool) -> None:
        queue, place = self.bench.queue, self._held(lease)

        def call() -> Awaitable[bool]:
            return queue.retry(lease, delay_s=delay_s, counted=counted) if delay_s else queue.release(lease)

        assert self.run(call()) == (place is not None)
        if again:
            assert not self.run(call())
        if place:
            place.deliveries = max(0, place.deliveries - 1)
            place.attempts += bool(delay_s) and counted
            place.state, place.due_s = ("delayed", self.now_s + delay_s) if delay_s else ("ready", 0)
            if not delay_s:
                self._refund(place.task)
                self.join(place.task.job)

    @rule(shard=SHARDS, again=twice)
    def finish(self, shard: int, again: bool) -> None:
        done = self.run(self.bench.queue.finish(task_of(shard)))
        assert done == self.remove(shard)
        self.announced += done
        if again:
            assert not self.run(self.bench.queue.finish(task_of(shard)))

    @rule(job=st.sampled_from(sorted(LANE_OF)), again=twice)
    def pause(self, job: str, again: bool) -> None:
        for _ in range(1 + again):
            assert self.run(self.bench.queue.pause(DATASET_ID, job)) == (job not in self.paused)
            self.paused.add(job)
            self.leave(job)

    @rule(job=st.sampled_from(sorted(LANE_OF)), again=twice)
    def resume(self, job: str, again: bool) -> None:
        for _ in range(1 + again):
            assert self.run(self.bench.queue.resume(DATASET_ID, job)) == (job in self.paused)
            self.paused.discard(job)
            self.join(job)

    @rule(job=st.sampled_from(sorted(LANE_OF)))
    def forget(self, job: str) -> None:
        members = [shard for shard, place in self.places.items() if place.task.job == job]
        assert self.run(self.bench.queue.forget(DATASET_ID, job)) == len(members)
        for shard in members:
            self.remove(shard)
        self.paused.discard(job)
        self.served.pop(job, None)

    @rule(seconds=st.sampled_from([10, 30]))
    def elapse(self, seconds: int) -> None:
        self.now_s += seconds
        self.run(self.bench.elapse(seconds))

    @invariant()
    def every_task_is_in_one_place(self) -> None:
        states = [f"ready {p.task.lane}" if p.state == "ready" else p.state for p in self.places.values()]
        expected = [*(states.count(state) for state in ("ready live", "ready bulk", "leased", "delayed")), 0]
        assert self.run(self.bench.queue.depth()) == Depth(*expected)
        assert self.run(self.bench.announced()) == self.announced

    @invariant()
    def what_jobs_have_open_adds_up(self) -> None:
        for job in self.run(self.bench.queue.jobs()):
            mine = [place for place in self.places.values() if place.task.job == job.job]
            assert (job.tasks, job.rows, job.tokens) == (
                len(mine), sum(p.task.rows for p in mine), sum(p.task.cost for p in mine)
            )  # fmt: skip
            assert job.paused == (job.job in self.paused)


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
