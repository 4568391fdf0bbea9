"""One part of the system as a process of its own: real code, a short lease, and a plan of failpoints."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import pyarrow as pa

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.documents import Cursor, SourceDocument, hash16
from embedmill.embedder import BatchLimits, Embedding, Role
from embedmill.producer import Producer
from scheduler.admission import Admitter
from scheduler.budget import Unlimited
from scheduler.inbox import InboxAdmission
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.service import run_scheduler
from worker.embedders.null import NullEmbedder
from worker.service import Worker

LEASE_S = 1.0
STALL_S = 2.5
DIMENSIONS = 3
INBOX = "inbox"
PUSHED = {f"pushed-{number}": f"pushed text {number}" for number in range(12)}
PRODUCED = {f"produced-{number}": f"produced text {number}" for number in range(9)}

# The first array makes pyarrow look for pandas, which takes longer than all else: once, ahead of every fork.
pa.array([0])


@dataclass(frozen=True)
class Place:
    """Where the parts of one case meet. `folder` has the dataset, and the notes of what happened."""

    redis: str
    namespace: str
    folder: Path

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def sent(self) -> Path:
        """A line for each passage that was sent to the embedder."""
        return self.folder / "sent.log"

    def reached(self, part: str) -> Path:
        """How often each failpoint of a part was reached, JSON; it is missing after a crash."""
        return self.folder / f"{part}.reached"


class CountingEmbedder(NullEmbedder):
    """null/3 that notes what it is sent, and takes its time."""

    def __init__(self, place: Place) -> None:
        super().__init__(DIMENSIONS)
        self._sent = place.sent

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(max_inputs=2, max_tokens=10_000, padded=False, concurrency=2)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        with self._sent.open("a") as file:
            file.write("".join(f"{text}\n" for text in texts))
        await anyio.sleep(0.15)
        return await super().embed(texts, role=role)


class _Source:
    """PUSHED, as a source that can be resumed."""

    name = "pushed"
    push_key = hash16("pushed").hex()

    def total_bytes(self) -> int | None:
        return None

    def position_bytes(self, cursor: Cursor) -> int:
        return cursor.record

    def remarks(self) -> list[str]:
        return []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument]:
        for number, (id_, text) in enumerate(PUSHED.items()):
            if after is None or number >= after.record:
                yield SourceDocument(id_, text, "{}", Cursor(record=number + 1), f"pushed:{number}")


async def _worker(place: Place, connection: Connection) -> None:
    worker = Worker(_queue(place, connection), CountingEmbedder(place), budget=Unlimited(), grace_s=1)
    async with anyio.create_task_group() as group:
        group.start_soon(_on_terminate, worker.stop)
        await worker.run()
        group.cancel_scope.cancel()


async def _scheduler(place: Place, connection: Connection) -> None:
    stopping = anyio.Event()
    dataset, queue = Dataset.open(str(place.dataset)), _queue(place, connection)
    inbox = InboxAdmission(dataset, queue, connection, name=INBOX, namespace=place.namespace, linger_s=0.3)
    async with anyio.create_task_group() as group:
        group.start_soon(_on_terminate, stopping.set)
        async with anyio.create_task_group() as work:
            work.start_soon(inbox.run, stopping)
            await run_scheduler([dataset], queue, stopping=stopping, every_s=0.5)
        group.cancel_scope.cancel()


async def _pusher(place: Place, connection: Connection) -> None:
    dataset = Dataset.open(str(place.dataset))
    admitter = Admitter(dataset, dataset.open_index(), job="pushed")
    await Intake(admitter, _queue(place, connection), rejects=place.folder / "rejects").run([_Source()])


async def _producer(place: Place, connection: Connection) -> None:
    options = {"inbox": INBOX, "namespace": place.namespace, "job": "produced"}
    async with Producer(connection, **options, batch_documents=3, linger_s=0.05, resend_s=1.0) as producer:  # type: ignore[arg-type]
        for id_, text in PRODUCED.items():
            await producer.add(id_, text)


PARTS = {"worker": _worker, "scheduler": _scheduler, "pusher": _pusher, "producer": _producer}


def main(part: str, place: Place, plan: str) -> None:
    """Run a part to its end, in this process; exit status 1 when it raised."""
    logging.basicConfig(filename=place.folder / f"{part}-{os.getpid()}.log", level=logging.INFO, force=True)
    failpoints.arm(plan)
    try:
        anyio.run(_run, part, place)
    except BaseException:
        logging.exception("%s ended", part)
        raise SystemExit(1) from None
    finally:
        points = failpoints.parse_plan("") if not plan else failpoints._plan.points or {}
        reached = {name: next(point.reached) - 1 for name, point in points.items()}
        logging.info("%s took %.2f s of CPU", part, time.process_time())
        if reached:
            place.reached(part).write_text(json.dumps(reached))


async def _run(part: str, place: Place) -> None:
    connection = Connection(place.redis, retry_for_s=10)
    try:
        await PARTS[part](place, connection)
    finally:
        await connection.aclose()


def _queue(place: Place, connection: Connection) -> Queue:
    return Queue(connection, namespace=place.namespace, lease_s=LEASE_S)


async def _on_terminate(stop: Callable[[], None]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            stop()
