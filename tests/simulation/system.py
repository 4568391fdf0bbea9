"""The simulated system: pushers, a producer, schedulers and workers, all real code, under faults, and then left alone.

When the faults have stopped, everything must drain; what is stored in the end must be what a calm run stores.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import anyio

from embedmill import failpoints
from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.local_store import LocalStore
from embedmill.documents import Cursor, SourceDocument, hash16
from embedmill.embedder import BatchLimits, Embedding, Role
from embedmill.producer import Producer
from scheduler.admission import Admitter
from scheduler.budget import Unlimited
from scheduler.inbox import InboxAdmission
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.service import run_scheduler
from tests.invariants import FinalSet, assert_same_set, check_dataset, final_set, living
from worker.embedders.null import NullEmbedder
from worker.service import Worker

from .history import History
from .loop import Baton, Process, SimulatedLoop, Stuck, current_process, process_of_this_task, process_or_none
from .promises import QueuePromises
from .server import Faults, Server
from .world import simulated_world

NAMESPACE = "simulated"
LEASE_S = 8.0
# Clean seeds take 47 s at most (of 0 to 60 and 1000 to 1119); the summary of `python -m tests.simulation` says it.
TO_DRAIN_S = 120.0
# Two rounds of a scheduler, and a lease.
_TO_TIDY_S = 18.0
_PUSHERS = ("a", "b")
_PRODUCER = "p"
_EVERYBODY = (*_PUSHERS, _PRODUCER)
_PARTS = 4
_PART_DOCUMENTS = 8
_SHARD_ROWS = 6
_TOLD_WHILE_STALLED = 0.5
_EMPTIED_LAST = 0.3
# A hot failpoint hits so often, at most, and whoever reaches it with this probability.
_HITS = 3
_HIT = 0.3


def texts_of(pusher: str, part: int) -> dict[str, str]:
    """Texts by id of one push. The last one of a pusher changes half of its first."""
    texts = {f"{pusher}{part}-{number}": f"text {number} of {pusher}{part}" for number in range(_PART_DOCUMENTS)}
    if part == _PARTS - 1:
        texts |= {f"{pusher}0-{number}": f"changed {number} of {pusher}" for number in range(0, _PART_DOCUMENTS, 2)}
    return texts


class Broken(AssertionError):
    """What a simulation found."""


@dataclass(frozen=True)
class Found:
    """How a simulation ended. `failure` is None when every promise was kept; drained_in_s: virtual, from the last fault."""

    seed: int
    failure: str | None
    digest: str
    lines: list[str]
    steps: int
    virtual_s: float
    drained_in_s: float


class SlowEmbedder(NullEmbedder):
    """null/3, a few texts to a request, and requests that take their time."""

    def __init__(self, chance: Random) -> None:
        super().__init__(3)
        self._chance = chance

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(max_inputs=2, max_tokens=10_000, padded=False, concurrency=2)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        await anyio.sleep(self._chance.choice([0.05, 0.3, 1.0, 3.0]))
        return await super().embed(texts, role=role)


class ListSource:
    """Documents of a list, as a source that can be resumed."""

    def __init__(self, name: str, texts: dict[str, str]) -> None:
        self.name = name
        self.push_key = hash16(name).hex()
        self._texts = texts

    def total_bytes(self) -> int | None:
        return None

    def position_bytes(self, cursor: Cursor) -> int:
        return cursor.record

    def remarks(self) -> list[str]:
        return []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument]:
        for number, (id_, text) in enumerate(self._texts.items()):
            if after is None or number >= after.record:
                yield SourceDocument(id_, text, "{}", Cursor(record=number + 1), f"{self.name}:{number}")


class _Pause:
    """What a failpoint does whose process was hit: the task or the thread goes no further until the process does."""

    action = "stall"
    stall_s = 0.0

    def act(self) -> None:
        Baton.pause()


@dataclass
class System:
    """One simulation of one seed."""

    seed: int
    folder: Path
    calm: bool = False
    verbose: bool = False
    chance: Random = field(init=False)
    faults: Faults = field(default_factory=Faults)
    batons: list[Baton] = field(default_factory=list)
    over: bool = False
    calm_since_s: float = 0.0
    drained_in_s: float = 0.0
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.chance = Random(self.seed)
        self.history = History(str(self.folder), self.verbose)
        self.loop = SimulatedLoop(self.chance, before_step=self._before_step)
        self.loop.set_exception_handler(self._loop_failed)
        self.pushed = dict.fromkeys(_EVERYBODY, 0)
        self.root = self.folder / "dataset"
        self.server = Server(self.loop, self.chance, self.faults, self.history, self._fail)
        self._hits_left: dict[str, int] = {}
        self._stops: dict[Process, Callable[[], None]] = {}
        self._mains: dict[Process, Callable[[], Awaitable[None]]] = {}

    def run(self) -> None:
        """Raises what was found."""
        silent = logging.root.manager.disable
        logging.disable()
        try:
            world = simulated_world(self.loop, self.chance, note=self._note, batons=self.batons)
            between_steps = mock.patch.object(failpoints, "_due", self._at_failpoint)
            with world, between_steps, self.server.instead_of_fakeredis():
                self._create_dataset()
                try:
                    self.loop.run_until_complete(self._conduct())
                except (Broken, Stuck) as error:
                    self._fail(error)
            if self.failure is not None:
                raise self.failure
            newest = {
                id_: text for p in _EVERYBODY for part in range(_PARTS) for id_, text in texts_of(p, part).items()
            }
            check_dataset(self.root, source=newest)
            if not self.calm:
                # A scheduler may have compacted what a later version overrules.
                assert_same_set(living(final_set(self.root)), living(calm_set()))
        finally:
            self._bury()
            logging.disable(silent)

    def _bury(self) -> None:
        """End what the killed processes left standing still, now that nobody looks any more."""
        self.over = True
        for baton in list(self.batons):
            baton.abandon()
        self.loop.bury()

    def _create_dataset(self) -> None:
        spec = SlowEmbedder(self.chance).spec
        info = DatasetInfo("d0", "2026-01-01T00:00:00+00:00", spec, shard_rows=_SHARD_ROWS, chunk_rows=3)
        LocalStore(self.root).create(layout.DATASET_KEY, info.to_bytes())
        self.dataset = Dataset.open_or_create(str(self.root), embedder=spec)
        self.server.promises = QueuePromises(self.server.redis, namespace=NAMESPACE, is_committed=self._is_committed)

    def _is_committed(self, task_id: str) -> bool:
        return (self.root / layout.commit_key(int(task_id.rpartition(":")[2]))).exists()

    async def _conduct(self) -> None:
        parts: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            (f"scheduler-{number}", self._schedule) for number in (1, 2)
        ]
        parts += [("producer", self._produce)]
        parts += [(f"pusher-{pusher}", partial(self._push, pusher)) for pusher in _PUSHERS]
        parts += [(f"worker-{number}", self._work) for number in range(1, 4)]
        for name, main in parts:
            self._start(name, main)
        if not self.calm:
            await self._disturb()
        deadline = self.loop.time() + TO_DRAIN_S
        while not await self._drained():
            if self.loop.time() > deadline:
                raise Broken(f"I7: {TO_DRAIN_S:.0f} s after the last fault there is work left: {self._left()}")
            await asyncio.sleep(1.0)
        self.drained_in_s = self.loop.time() - self.calm_since_s
        await self._let_latecomers_be_late()
        self.dataset.publish_shape()

    async def _disturb(self) -> None:
        """A time of faults."""
        chance, faults = self.chance, self.faults
        faults.lost = chance.choice([0.0, 0.02, 0.1])
        faults.crash = chance.choice([0.0, 0.002, 0.01])
        faults.stall = chance.choice([0.0, 0.002, 0.006])
        faults.hot = chance.choice([0.0, 0.15, 0.3])
        faults.longest_stall_s = 3 * LEASE_S
        end = self.loop.time() + chance.uniform(10, 40)
        while self.loop.time() < end and self.failure is None:
            await asyncio.sleep(chance.uniform(1, 8))
            if chance.random() < 0.1:
                self.server.flush()
            if chance.random() < 0.15:
                faults.away_until = self.loop.time() + chance.uniform(0.5, 6)
                self._note("away")
        if chance.random() < _EMPTIED_LAST:
            # Pushers are done by now, mostly: who rebuilds the queue is the scheduler.
            self.server.flush()
        faults.stop()
        self._note("the faults stop")
        self.calm_since_s = self.loop.time()

    async def _let_latecomers_be_late(self) -> None:
        """Whoever still stands still gets up and does its worst, and schedulers clean up after it."""
        await asyncio.sleep(max(0.0, self.loop.latest_wake() - self.loop.time()) + _TO_TIDY_S)
        if not await self._drained():
            raise Broken(f"I7: it was drained, and then was not: {self._left()}")

    async def _drained(self) -> bool:
        if self.failure is not None:
            raise Broken(str(self.failure)) from self.failure
        return (
            min(self.pushed.values()) == _PARTS and not Dataset.open(str(self.root)).owed() and not self.server.tasks()
        )

    def _left(self) -> str:
        owed = Dataset.open(str(self.root)).owed()
        return f"pushed: {self.pushed}, owed: {owed}, tasks: {self.server.tasks()}"

    # The processes.

    def _queue(self) -> Queue:
        return Queue(self.server.connect(), namespace=NAMESPACE, lease_s=LEASE_S)

    async def _push(self, pusher: str) -> None:
        """One command after the other; an interrupted one is given again."""
        dataset = Dataset.open(str(self.root))
        index = await anyio.to_thread.run_sync(dataset.open_index)
        while (part := self.pushed[pusher]) < _PARTS:
            intake = Intake(Admitter(dataset, index, job=f"job-{pusher}"), self._queue(), rejects=self.root / "rejects")
            await intake.run([ListSource(f"{pusher}{part}", texts_of(pusher, part))])
            self.pushed[pusher] += 1
            self._note(f"pushed part {part}")
            await anyio.sleep(self.chance.uniform(0, 8))

    async def _produce(self) -> None:
        """The same through the inbox; what had no receipt is added again."""
        while (part := self.pushed[_PRODUCER]) < _PARTS:
            options: dict[str, Any] = {"inbox": "dataset", "namespace": NAMESPACE, "job": "job-p", "batch_documents": 3}
            async with Producer(self.server.connect(), **options) as producer:
                for id_, text in texts_of(_PRODUCER, part).items():
                    await producer.add(id_, text)
            self.pushed[_PRODUCER] += 1
            self._note(f"produced part {part}")
            await anyio.sleep(self.chance.uniform(0, 8))

    async def _schedule(self) -> None:
        connection, stopping = self.server.connect(), anyio.Event()
        dataset, queue = Dataset.open(str(self.root)), Queue(connection, namespace=NAMESPACE, lease_s=LEASE_S)
        inbox = InboxAdmission(dataset, queue, connection, name="dataset", namespace=NAMESPACE)
        async with anyio.create_task_group() as group:
            group.start_soon(inbox.run, stopping)
            await run_scheduler([dataset], queue, stopping=stopping)

    async def _work(self) -> None:
        grace_s = self.chance.choice([0.0, 2.0])
        worker = Worker(self._queue(), SlowEmbedder(self.chance), budget=Unlimited(), grace_s=grace_s)
        self._stops[process_of_this_task()] = worker.stop
        await worker.run()
        self._note("ended as told")

    def _start(self, name: str, main: Callable[[], Awaitable[None]]) -> None:
        process = Process(name, mortal=not self.calm)
        self._mains[process] = main

        async def guarded() -> None:
            try:
                await main()
            except Exception as error:
                self._fail(Broken(f"{name} ended with {error!r}"), error)
            if process in self._stops:
                self._start_later(process)

        self.loop.spawn(process, guarded)

    def _start_later(self, process: Process) -> None:
        again = (process.name, self._mains[process])
        self.loop.call_later(self.chance.uniform(0.5, LEASE_S), self._start, *again, context=Context())

    def _before_step(self, process: Process) -> None:
        draw, faults = self.chance.random(), self.faults
        if draw < faults.crash:
            self._kill(process, "")
        elif draw < faults.crash + faults.stall:
            self._stall(process, "")

    def _at_failpoint(self, name: str) -> _Pause | None:
        """In the place of the plan: the process in which this failpoint was reached may die or stall right there."""
        process, chance = process_or_none(), self.chance
        if process is None or not process.mortal or process.dead or self.over or not self.faults.hot:
            return None
        if name not in self._hits_left:
            self._hits_left[name] = _HITS if chance.random() < self.faults.hot else 0
        if not self._hits_left[name] or chance.random() > _HIT:
            return None
        self._hits_left[name] -= 1
        hit = chance.choice([self._kill, self._kill, self._stall, self._stall, self._black_out])
        hit(process, f" at {name}")
        return _Pause()

    def _black_out(self, process: Process, where: str) -> None:
        """The machine goes down that this process and Redis are on."""
        self.server.flush()
        self._kill(process, where)

    def _kill(self, process: Process, where: str) -> None:
        self.server.note(process.name, f"killed{where}")
        self.loop.kill(process)
        self._start_later(process)

    def _stall(self, process: Process, where: str) -> None:
        seconds = self.chance.uniform(0.2, self.faults.longest_stall_s)
        self.server.note(process.name, f"stalled for {seconds:.3f} s{where}")
        process.stalled_until = self.loop.time() + seconds
        if self.chance.random() < _TOLD_WHILE_STALLED:
            self._tell_to_end(process)

    def _tell_to_end(self, process: Process) -> None:
        """SIGTERM, which a stalled process gets before anything else when it goes on."""
        stop = self._stops.get(process)
        if stop is not None:
            self.loop.call_first(process, stop)

    def _note(self, event: str) -> None:
        self.server.note(current_process(), event)

    def _fail(self, failure: BaseException, cause: BaseException | None = None) -> None:
        if self.failure is None and not self.over:
            self._note(f"BROKEN: {failure}")
            if cause is not None:
                failure.__cause__ = cause
            self.failure = failure

    def _loop_failed(self, _loop: Any, context: dict[str, Any]) -> None:
        if "was destroyed" not in context["message"]:
            self._fail(Broken(str(context)), context.get("exception"))


def simulate(seed: int, folder: Path, *, calm: bool = False, verbose: bool = False) -> Found:
    """Run one seed in `folder`, which must be empty."""
    system = System(seed, folder, calm=calm, verbose=verbose)
    failure: str | None = None
    try:
        system.run()
    except AssertionError as error:
        failure = str(error) or repr(error)
    history, loop = system.history, system.loop
    return Found(seed, failure, history.digest, history.lines, loop.steps, loop.time(), system.drained_in_s)


@cache
def calm_set() -> FinalSet:
    """What is stored in the end when nothing goes wrong."""
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(0, Path(folder), calm=True)
        if found.failure is not None:
            raise Broken(f"without any fault: {found.failure}")
        return final_set(Path(folder) / "dataset")
