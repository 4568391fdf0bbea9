"""One trial: a fleet of real processes over one dataset, faults while it works, then peace until nothing is owed.

`calm` trials have one of each service, no faults and no waiting; what they leave is what every other trial must leave.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import redis

from embedmill.connection import Connection
from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.local_store import LocalStore
from embedmill.errors import EmbedmillError
from embedmill.inbox import inbox_key
from scheduler.queue import Queue
from tests.servers import free_port, redis_binary, valkey_binary
from worker.embedders.null import NullEmbedder

from .embedder import Requests
from .faults import Action, Fault, Kind
from .parts import Part, python
from .workload import Workload

DIMENSIONS = 64
NAME = "dataset"
_POLL_S = 0.02
_GRACE_S = 30.0
_STANDSTILL = 1.5


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fleet, and how it works. inputs: passages in one request, which takes `delay_s`; lease_s: of tasks.

    producing_s: how long the programs take over what they push; promised: whether the deaths are few enough, beside what is
    to be embedded in between, for the promise of less than 5 % done twice.
    """

    shard_rows: int
    inputs: int
    delay_s: float
    lease_s: float
    producing_s: float
    promised: bool
    workers: int = 3
    schedulers: int = 2
    drain_s: float = 120.0


@dataclass
class Report:
    """What happened in a trial. faults: those that hit something; done_s: seconds until nothing was owed any more."""

    faults: Counter[tuple[Action, Kind]] = field(default_factory=Counter)
    missed: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    deaths: list[tuple[str, int]] = field(default_factory=list)
    ends: dict[str, tuple[int | None, float]] = field(default_factory=dict)
    pushed_again: int = 0
    done_s: float | None = None
    owing: str = ""
    tracebacks: list[str] = field(default_factory=list)


class Trial:
    """Runs in `folder`, which it makes. The dataset is `dataset` in it; `requests` tells what the embedder was sent."""

    def __init__(self, folder: Path, workload: Workload, size: Size, *, faults: Sequence[Fault], calm: bool) -> None:
        self.folder = folder
        self.dataset = folder / NAME
        self.milvus = None if calm else folder / "milvus.db"
        self.requests = Requests(folder / "requests.jsonl")
        self.report = Report()
        self._workload = workload
        self._size = size
        self._waiting = list(faults)
        self._calm = calm
        self._share = 0.0
        self._port = free_port()
        self._redis = f"redis://127.0.0.1:{self._port}/0"
        self._logged_before: dict[str, int] = {}
        self._server = Part("redis", "redis", self._server_command(), folder / "redis")
        self._services = [*self._worker_parts(), *self._scheduler_parts(), *self._loader_parts()]
        self._pushes = [self._push_part(n, path) for n, path in enumerate(workload.files)]
        self._programs = [self._program_part(n, path) for n, path in enumerate(workload.scripts)]

    @property
    def parts(self) -> list[Part]:
        return [self._server, *self._services, *self._pushes, *self._programs]

    def run(self) -> Report:
        """Until nothing is owed, at most `drain_s` after the last fault and the end of the producers."""
        began = time.monotonic()
        with self._ended_anyway():
            self._make_dataset()
            self._server.start()
            self._wait_for_server()
            while (self._waiting or not self._producers_done) and not self._hopeless:
                self._turn()
            if self._drained():
                self.report.done_s = time.monotonic() - began
            self._end_by_sigterm()
        return self._finished_report()

    @property
    def _producers_done(self) -> bool:
        return all(part.done for part in (*self._pushes, *self._programs))

    @property
    def _hopeless(self) -> bool:
        """A part ends by itself again and again: nothing will come of it."""
        return any(len(part.deaths) - part.deaths.count(-signal.SIGKILL) > 5 for part in self.parts)

    def _turn(self) -> None:
        for part in (self._server, *self._services, *self._programs):
            part.supervise()
        self._supervise_pushes()
        self.requests.read()
        self._share = len(self.requests.answered) / self._workload.to_embed
        # A fault that finds nothing to hit waits, and the others go on.
        for fault in [fault for fault in self._waiting if fault.at <= self._share]:
            if self._strike(fault):
                self._waiting.remove(fault)
        time.sleep(_POLL_S)

    def _supervise_pushes(self) -> None:
        """One after the other, spread over the first half of the work."""
        for number, part in enumerate(self._pushes):
            if not part.done:
                if part.starts or self._share >= 0.5 * number / len(self._pushes):
                    if not part.alive:
                        self._logged_before[part.name] = self._logged()
                    part.supervise()
                return

    def _strike(self, fault: Fault) -> bool:
        """Let it happen; False while there is nothing to hit."""
        parts = [part for part in self.parts if part.kind == fault.kind]
        if all(part.done for part in parts) or (self._share >= 1.0 and self._producers_done):
            self.report.missed += 1
            return True
        hit = [part for part in parts if part.vulnerable and self._is_at_work(part)]
        if not hit:
            return False
        part = hit[int(fault.chance * len(hit))]
        if fault.action == "flush":
            if not self._flush():
                return False
        elif fault.action == "kill":
            part.kill()
        else:
            part.stop_for(_STANDSTILL * self._size.lease_s)
        self.report.faults[fault.action, fault.kind] += 1
        return True

    def _is_at_work(self, part: Part) -> bool:
        """What is still starting has nothing to lose."""
        assert part.process is not None
        if part.kind == "worker":
            return part.process.pid in self.requests.processes
        if part.kind == "push":
            last = part is self._pushes[-1] and time.monotonic() - part.started_at > 0.7
            return last or self._logged() > self._logged_before[part.name]
        return time.monotonic() - part.started_at > 1.0

    def _flush(self) -> bool:
        try:
            with redis.Redis(port=self._port, socket_timeout=5) as client:
                return bool(client.flushall())
        except redis.RedisError:
            return False

    def _drained(self) -> bool:
        self.report.owing = "the producers have not ended"
        deadline = time.monotonic() + self._size.drain_s
        checked_at = 0.0
        while time.monotonic() < deadline and not self._hopeless:
            self._turn()
            if time.monotonic() - checked_at > 0.3:
                self.report.owing = self._owing()
                if not self.report.owing:
                    return True
                checked_at = time.monotonic()
        return False

    def _owing(self) -> str:
        """What is not done yet, in words; "" when everything is."""
        if not self._producers_done:
            return "a producer has not ended"
        dataset = Dataset.open(str(self.dataset))
        if owed := dataset.owed():
            return f"shards {owed[:10]} are owed"
        try:
            queued = anyio.run(self._queued)
        except EmbedmillError as error:
            return f"the queue does not answer: {error}"
        if queued:
            return queued
        if self.milvus is not None:
            loaded = {number for path in self.dataset.glob("loads/*") for number in _numbers(path)}
            if behind := set(dataset.committed()) - loaded:
                return f"shards {sorted(behind)[:10]} are not loaded"
        return ""

    async def _queued(self) -> str:
        connection = Connection(self._redis, retry_for_s=5)
        try:
            depth = await Queue(connection, namespace=NAME).depth()
            inbox = int(await connection.command("XLEN", inbox_key(NAME, NAME)))
        finally:
            await connection.aclose()
        return f"{depth.open} tasks and {inbox} messages are queued" if depth.open or inbox else ""

    def _end_by_sigterm(self) -> None:
        for part in self._services:
            self.report.ends[part.name] = part.terminate(within_s=_GRACE_S)

    def _finished_report(self) -> Report:
        self.requests.read()
        report = self.report
        report.missed += len(self._waiting)
        for part in self.parts:
            report.restarts[part.kind] += max(0, part.starts - 1)
            report.deaths += [(part.name, status) for status in part.deaths]
            if part.log.exists() and "Traceback" in part.log.read_text(errors="replace"):
                report.tracebacks.append(str(part.log))
        report.pushed_again = sum(_pushed_again(part) for part in self._programs)
        return report

    @contextmanager
    def _ended_anyway(self) -> Iterator[None]:
        try:
            yield
        finally:
            for part in self.parts:
                part.end()

    def _make_dataset(self) -> None:
        """Smaller shards than usual, so that there are many."""
        spec = NullEmbedder(DIMENSIONS).spec
        rows = self._size.shard_rows
        info = DatasetInfo("chaos", "2026-01-01T00:00:00+00:00", spec, shard_rows=rows, chunk_rows=min(64, rows))
        self.dataset.mkdir(parents=True)
        LocalStore(self.dataset).create(layout.DATASET_KEY, info.to_bytes())
        Dataset.open_or_create(str(self.dataset), embedder=spec)

    def _logged(self) -> int:
        return sum(1 for _ in (self.dataset / layout.DOCUMENTS_FOLDER).glob("*.parquet"))

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                with redis.Redis(port=self._port, socket_timeout=5) as client:
                    client.ping()
                return
            except redis.RedisError:
                assert self._server.alive, self._server.log.read_text()
                assert time.monotonic() < deadline, "the Redis server does not answer"
                time.sleep(_POLL_S)

    def _server_command(self) -> list[str]:
        options: dict[str, object] = {
            "port": self._port,
            "bind": "127.0.0.1",
            "dir": self.folder / "redis",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [
            redis_binary() or valkey_binary(),
            *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
        ]

    def _service(self, kind: str, number: int, command: Sequence[str]) -> Part:
        return Part(f"{kind}-{number}", kind, command, self.folder)

    @property
    def _queue_options(self) -> tuple[str, ...]:
        return ("--redis", self._redis, "--namespace", NAME)

    def _worker_parts(self) -> list[Part]:
        settings = {
            "dimensions": DIMENSIONS,
            "inputs": self._size.inputs,
            "delay_s": 0.0 if self._calm else self._size.delay_s,
            "log": str(self.folder / "requests.jsonl"),
            "calm": self._calm,
        }
        lease = ("--lease", f"{self._size.lease_s:g}")
        arguments = (json.dumps(settings), "worker", "--model", f"null/{DIMENSIONS}", *lease, *self._queue_options)
        command = python("-m", "tests.chaos.worker_process", *arguments)
        return [self._service("worker", n, command) for n in range(1 if self._calm else self._size.workers)]

    def _scheduler_parts(self) -> list[Part]:
        command = python("-m", "embedmill", "scheduler", self.dataset, *self._queue_options)
        return [self._service("scheduler", n, command) for n in range(1 if self._calm else self._size.schedulers)]

    def _loader_parts(self) -> list[Part]:
        target = ("--to", self.dataset, "--milvus", self.milvus)
        command = python("-m", "embedmill", "loader", *target, *self._queue_options)
        return [] if self._calm else [self._service("loader", 0, command)]

    def _push_part(self, number: int, path: Path) -> Part:
        options = ("--to", self.dataset, "--model", f"null/{DIMENSIONS}", *self._queue_options)
        command = python("-m", "embedmill", "push", path, *options)
        return Part(f"push-{number}", "push", command, self.folder, once=True)

    def _program_part(self, number: int, path: Path) -> Part:
        pace_s = 0.0 if self._calm else self._pace_s(path)
        arguments = (path, self.folder / f"program-{number}.done", self._redis, NAME, NAME, pace_s)
        command = python("-m", "tests.chaos.producer_process", *arguments)
        return Part(f"program-{number}", "program", command, self.folder, once=True)

    def _pace_s(self, path: Path) -> float:
        return self._size.producing_s / len(path.read_text(encoding="utf-8").splitlines())


def _pushed_again(part: Part) -> int:
    lines = part.log.read_text().splitlines() if part.log.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("again "))


def _numbers(folder: Path) -> list[int]:
    return layout.numbers([path.name for path in folder.iterdir()], suffix=".json")
