"""The cases: a part, a failpoint in it and what happens there; then all goes on, and nothing may be lost or doubled."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import anyio
from anyio import to_thread

from embedmill.connection import Connection
from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.local_store import LocalStore
from embedmill.inbox import inbox_key
from scheduler.queue import Queue
from tests.invariants import check_dataset
from worker.embedders.null import NullEmbedder

from .batch_provider import submitted
from .compactor_case import run_compactor_case
from .loader_case import run_loader_case
from .parts import DIMENSIONS, INBOX, LEASE_S, PRODUCED, PUSHED, Place
from .points import Action, Ended, Outcome, Point
from .processes import CRASHED, Processes, until, until_ended

_WITHIN_S = 45.0
_HEAD_START_S = 0.3
_WORKERS = ("worker", "batch worker")


async def run_case(point: Point, action: Action, *, redis: str, folder: Path) -> Outcome:
    """Raises AssertionError when something is lost, doubled, left over, or when the failpoint was not reached."""
    place = Place(redis, f"case-{uuid.uuid4().hex[:8]}", folder)
    await to_thread.run_sync(_create_dataset, place)
    processes = Processes(place, point, action)
    try:
        if point.part == "loader":
            return await run_loader_case(place, processes, action)
        if point.part == "compactor":
            return await run_compactor_case(place, processes, action)
        return await _QueueCase(point, place, processes).run()
    finally:
        processes.kill_all()


class _QueueCase:
    """A case of a part that meets the others at the queue."""

    def __init__(self, point: Point, place: Place, processes: Processes) -> None:
        self._point, self._place, self._processes = point, place, processes

    async def run(self) -> Outcome:
        point, processes = self._point, self._processes
        connection = Connection(self._place.redis)
        queue = Queue(connection, namespace=self._place.namespace, lease_s=LEASE_S)
        try:
            if point.part in _WORKERS:
                await self._admit()
            armed = processes.start_armed()
            await anyio.sleep(_HEAD_START_S)
            if point.part == "batch worker":
                # Between two looks at a batch its shard is anybody's: another worker might take each of them over.
                await until(self._place.fault.exists, what="the fault")
            if point.told_to_end:
                await until(self._place.sent.exists, what="the first request")
                armed.terminate()
            clean = {part: processes.start(part) for part in self._beside()}
            ended = await self._until_rest(armed, clean, queue, connection)
            seconds = processes.since_the_fault_s()
            await processes.end(armed)
            dead = (await queue.depth()).dead
            assert dead == 0, f"{dead} dead letters"
        finally:
            await connection.aclose()
        await to_thread.run_sync(self._check)
        sent = Counter(self._place.sent.read_text().splitlines())
        return Outcome(seconds, ended, again=sum(times - 1 for times in sent.values()))

    def _beside(self) -> Sequence[str]:
        """What runs beside the armed part: one of each other, and another worker."""
        if self._point.part in _WORKERS:
            return ("scheduler", self._point.part)
        return [part for part in ("scheduler", "pusher", "producer", "worker") if part != self._point.part]

    async def _admit(self) -> None:
        """Everything into the queue, so that the armed worker has the first choice."""
        scheduler = self._processes.start("scheduler")
        for part in [self._processes.start("pusher"), self._processes.start("producer")]:
            await until_ended(part)
        scheduler.terminate()
        await until_ended(scheduler)
        if self._point.part == "batch worker":
            await to_thread.run_sync(self._change_to_batches)

    def _change_to_batches(self) -> None:
        dataset = Dataset.open(str(self._place.dataset))
        for job in ("pushed", "produced"):
            dataset.change_job(job, lambda known: replace(known, mode="batch"))

    async def _until_rest(
        self, armed: BaseProcess, clean: dict[str, BaseProcess], queue: Queue, connection: Connection
    ) -> Ended:
        """Wait until everything is stored and nothing waits, and start again what died; what became of the armed part."""
        ended: Ended = "went on"
        deadline = time.monotonic() + _WITHIN_S
        current = armed
        while True:
            if current.exitcode not in (None, 0):
                status = current.exitcode
                assert current is armed, f"a clean {self._point.part} ended with status {status}"
                ended = "died" if status == CRASHED else "gave up"
                current = self._processes.start(self._point.part)
            finite = [process for part, process in clean.items() if part in ("pusher", "producer")]
            if self._point.part in ("pusher", "producer"):
                finite.append(current)
            if all(process.exitcode == 0 for process in finite) and await self._at_rest(queue, connection):
                return ended
            assert time.monotonic() < deadline, f"not at rest after {_WITHIN_S:.0f} s: {await queue.depth()}"
            await anyio.sleep(0.05)

    async def _at_rest(self, queue: Queue, connection: Connection) -> bool:
        dataset = Dataset.open(str(self._place.dataset))
        rows = sum(marker.rows for shard in dataset.committed() if (marker := dataset.marker(shard)))
        waiting = int(await connection.command("XLEN", inbox_key(self._place.namespace, INBOX)))
        return rows >= len(PUSHED) + len(PRODUCED) and (await queue.depth()).open == 0 and not waiting

    def _check(self) -> None:
        # What a killed process leaves half-written is of no effect, and swept by age.
        self._place.sweep()
        dataset = Dataset.open(str(self._place.dataset))
        dataset.publish_shape()
        check_dataset(self._place.dataset, source=PUSHED | PRODUCED)
        rows = sum(dataset.documents(shard)[0].num_rows for shard in dataset.admitted())
        if self._point.part == "batch worker":
            texts = [*PUSHED.values(), *PRODUCED.values()]
            assert submitted(self._place.batches) == Counter(texts), "a text was sent in two batches, or in none"
        assert rows == len(PUSHED) + len(PRODUCED), f"{rows} rows for {len(PUSHED) + len(PRODUCED)} documents"


def _create_dataset(place: Place) -> None:
    spec = NullEmbedder(DIMENSIONS).spec
    info = DatasetInfo("d0", "2026-01-01T00:00:00+00:00", spec, shard_rows=5, chunk_rows=5)
    LocalStore(place.dataset).create(layout.DATASET_KEY, info.to_bytes())
    Dataset.open_or_create(str(place.dataset), embedder=spec)
