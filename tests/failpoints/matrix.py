"""The cases: a part, a failpoint in it and what happens there; then all goes on, and nothing may be lost or doubled."""

from __future__ import annotations

import json
import multiprocessing
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import anyio
from anyio import to_thread

from embedmill.connection import Connection
from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.store import LocalStore
from embedmill.inbox import inbox_key
from scheduler.queue import Queue
from tests.invariants import check_dataset
from worker.embedders.null import NullEmbedder

from .parts import DIMENSIONS, INBOX, LEASE_S, PRODUCED, PUSHED, STALL_S, Place, main

Action = Literal["crash", "stall", "raise", "lost"]
CRASHED = 137
_WITHIN_S = 45.0
_HEAD_START_S = 0.3


@dataclass(frozen=True)
class Point:
    """A failpoint and where it lies, in words."""

    part: str
    name: str
    between: str
    told_to_end: bool = False

    @property
    def actions(self) -> tuple[Action, ...]:
        if self.name.startswith("redis."):
            return ("crash", "stall", "lost") if self.name.endswith(".reply") else ("crash", "stall")
        return ("crash", "stall", "raise")


POINTS = [
    Point("producer", "redis.embedmill/push", "a batch is formed | it is in the inbox"),
    Point("producer", "redis.embedmill/push.reply", "a batch is in the inbox | its producer knows"),
    Point("producer", "producer.after_push", "the producer knows | the receipt"),
    Point("scheduler", "scheduler.after_documents", "documents are in the log | the index"),
    Point("scheduler", "scheduler.before_admit", "documents are in the log | task queued, messages removed, receipts"),
    Point("scheduler", "redis.scheduler/admit.reply", "task queued, messages removed, receipts | the scheduler knows"),
    Point("scheduler", "scheduler.after_admit", "the scheduler knows | the next messages"),
    Point("pusher", "scheduler.after_documents", "documents are in the log (push) | the index"),
    Point("pusher", "redis.scheduler/enqueue", "documents are in the log (push) | the task is queued"),
    Point("pusher", "redis.scheduler/enqueue.reply", "the task is queued | the pusher knows"),
    Point("worker", "redis.scheduler/lease.reply", "the lease is given | the worker knows"),
    Point("worker", "worker.after_lease", "the worker knows | the dataset is opened"),
    Point("worker", "worker.after_open", "the dataset is opened | earlier results are adopted"),
    Point("worker", "worker.after_adopt", "earlier results are adopted | a request"),
    Point("worker", "worker.before_request", "a batch is formed | its request"),
    Point("worker", "worker.after_request", "the vectors came | a checkpoint"),
    Point("worker", "redis.scheduler/extend.reply", "the lease is extended | the worker knows"),
    Point("worker", "worker.before_vectors", "all vectors came | they are stored"),
    Point("worker", "worker.after_vectors", "vectors are stored | the marker"),
    Point("worker", "worker.after_marker", "the marker | checkpoints are swept"),
    Point("worker", "worker.after_sweep", "checkpoints are swept | the task is finished"),
    Point("worker", "redis.scheduler/finish", "checkpoints are swept | finished and announced"),
    Point("worker", "redis.scheduler/finish.reply", "finished and announced | the worker knows"),
    Point("worker", "worker.after_finish", "the worker knows | the next task"),
    Point("worker", "worker.before_release", "told to end | the task is handed back", told_to_end=True),
    Point("worker", "redis.scheduler/give_back.reply", "the task is handed back | the worker knows", told_to_end=True),
]


@dataclass(frozen=True)
class Outcome:
    """What was measured. again: passages that were sent to the embedder more than once; seconds: from fault to rest."""

    seconds: float
    again: int
    note: str

    def __str__(self) -> str:
        again = f", {self.again} passages embedded again" if self.again else ""
        return f"{self.note}; at rest after {self.seconds:.1f} s{again}"


async def run_case(point: Point, action: Action, *, redis: str, folder: Path) -> Outcome:
    """Raises AssertionError when something is lost, doubled, left over, or when the failpoint was not reached."""
    place = Place(redis, f"case-{uuid.uuid4().hex[:8]}", folder)
    await to_thread.run_sync(_create_dataset, place)
    plan = f"{point.name}={action}" + (f":{STALL_S}" if action == "stall" else "") + "@1"
    case = _Case(point, place, plan)
    try:
        return await case.run(action)
    finally:
        case.kill_all()


class _Case:
    def __init__(self, point: Point, place: Place, plan: str) -> None:
        self._point, self._place, self._plan = point, place, plan
        self._parts: list[tuple[str, BaseProcess]] = []

    async def run(self, action: Action) -> Outcome:
        point = self._point
        connection = Connection(self._place.redis)
        queue = Queue(connection, namespace=self._place.namespace, lease_s=LEASE_S)
        try:
            if point.part == "worker":
                await self._admit(queue)
            began = time.monotonic()
            armed = self._start(point.part, self._plan)
            await anyio.sleep(_HEAD_START_S)
            if point.told_to_end:
                await _until(self._place.sent.exists)
                armed.terminate()
            clean = [self._start(part) for part in ("scheduler", "pusher", "producer", "worker") if self._wanted(part)]
            note = await self._until_rest(armed, clean, queue, connection)
            seconds = time.monotonic() - began
            await self._end(armed)
            self._require_reached(armed, action)
            dead = (await queue.depth()).dead
            assert dead == 0, f"{dead} dead letters"
        finally:
            await connection.aclose()
        await to_thread.run_sync(self._check)
        sent = Counter(self._place.sent.read_text().splitlines())
        return Outcome(seconds, sum(times - 1 for times in sent.values()), note)

    def _wanted(self, part: str) -> bool:
        """What runs beside the armed part: one of each other, and another worker."""
        admitted = self._point.part == "worker"
        return part == "worker" or (part != self._point.part and not (admitted and part in ("pusher", "producer")))

    async def _admit(self, queue: Queue) -> None:
        """Everything into the queue, so that the armed worker has the first choice."""
        scheduler = self._start("scheduler")
        for part in [self._start("pusher"), self._start("producer")]:
            await _ended(part)
        scheduler.terminate()
        await _ended(scheduler)

    async def _until_rest(
        self, armed: BaseProcess, clean: list[BaseProcess], queue: Queue, connection: Connection
    ) -> str:
        """Wait until everything is stored and nothing waits, and start again what died; what became of the armed part."""
        note = "it went on"
        deadline = time.monotonic() + _WITHIN_S
        current = armed
        while True:
            if current.exitcode not in (None, 0):
                status = current.exitcode
                assert current is armed, f"a clean {self._point.part} ended with status {status}"
                note = "it died" if status == CRASHED else "it gave up"
                current = self._start(self._point.part)
            finite = [process for part, process in self._parts if part in ("pusher", "producer")]
            replaced = armed if current is not armed else None
            if all(p.exitcode == 0 for p in finite if p is not replaced) and await self._at_rest(queue, connection):
                return note
            assert time.monotonic() < deadline, f"not at rest after {_WITHIN_S:.0f} s: {await queue.depth()}"
            await anyio.sleep(0.05)

    async def _at_rest(self, queue: Queue, connection: Connection) -> bool:
        dataset = Dataset.open(str(self._place.dataset))
        rows = sum(marker.rows for shard in dataset.committed() if (marker := dataset.marker(shard)))
        waiting = int(await connection.command("XLEN", inbox_key(self._place.namespace, INBOX)))
        return rows >= len(PUSHED) + len(PRODUCED) and (await queue.depth()).open == 0 and not waiting

    async def _end(self, armed: BaseProcess) -> None:
        """A clean end. Who stalls gets up first: it may still do harm."""
        if armed.is_alive():
            await anyio.sleep(STALL_S if "stall" in self._plan else 0)
        for _, process in self._parts:
            if process.is_alive():
                process.terminate()
        for _, process in self._parts:
            await _ended(process)

    def _require_reached(self, armed: BaseProcess, action: Action) -> None:
        path = self._place.reached(self._point.part)
        reached = armed.exitcode == CRASHED or (path.exists() and json.loads(path.read_text())[self._point.name] > 0)
        assert reached, f"{self._point.name} was not reached (status {armed.exitcode})"
        assert action != "crash" or armed.exitcode == CRASHED, f"it ended with {armed.exitcode} instead of dying"

    def _check(self) -> None:
        # What a killed process leaves half-written is of no effect, and swept by age.
        LocalStore(self._place.dataset).sweep(older_than_s=0)
        Dataset.open(str(self._place.dataset)).publish_shape()
        check_dataset(self._place.dataset, source=PUSHED | PRODUCED)
        rows = sum(Dataset.open(str(self._place.dataset)).documents(s)[0].num_rows for s in _shards(self._place))
        assert rows == len(PUSHED) + len(PRODUCED), f"{rows} rows for {len(PUSHED) + len(PRODUCED)} documents"

    def _start(self, part: str, plan: str = "") -> BaseProcess:
        process = _context.Process(target=main, args=(part, self._place, plan), daemon=True)
        process.start()
        self._parts.append((part, process))
        return process

    def kill_all(self) -> None:
        for _, process in self._parts:
            process.kill()
            process.join()


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.failpoints.parts"])


def _shards(place: Place) -> list[int]:
    return Dataset.open(str(place.dataset)).admitted()


def _create_dataset(place: Place) -> None:
    spec = NullEmbedder(DIMENSIONS).spec
    info = DatasetInfo("d0", "2026-01-01T00:00:00+00:00", spec, shard_rows=5, chunk_rows=5)
    LocalStore(place.dataset).create(layout.DATASET_KEY, info.to_bytes())
    Dataset.open_or_create(str(place.dataset), embedder=spec)


async def _ended(process: BaseProcess) -> None:
    await _until(lambda: process.exitcode is not None)


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.02)
