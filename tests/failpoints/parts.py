"""One part of the system as a process of its own: real code, a short lease, and a plan of failpoints."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pyarrow as pa
from anyio import to_thread

import loader.target
from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.local_store import LocalStore
from embedmill.documents import Cursor, SourceDocument, hash16
from embedmill.embedder import BatchLimits, Embedding, Role
from embedmill.errors import ConfigurationError
from embedmill.producer import Producer
from loader.service import Loader
from scheduler.admission import Admitter
from scheduler.budget import Unlimited
from scheduler.inbox import InboxAdmission
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.service import run_scheduler
from worker import batch_lane, batch_matching, batch_sending
from worker.embedders.null import NullEmbedder
from worker.service import Worker

from .batch_provider import BatchedEmbedder

LEASE_S = 1.0
STALL_S = 2.5
DIMENSIONS = 3
# The status of a part that refuses to start, as the command's.
REFUSED = 2
INBOX = "inbox"
_COLLECTION = "cases"
# Shards of five rows are sent in several batches.
_LOADER_BATCH_ROWS = 2
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

    @property
    def batches(self) -> Path:
        """The batches that were submitted."""
        return self.folder / "batches"

    @property
    def fault(self) -> Path:
        """It is there from the moment at which the failpoint acts."""
        return self.folder / "fault"

    @property
    def milvus(self) -> Path:
        """The database of Milvus Lite."""
        return self.folder / "milvus.db"

    @property
    def rows(self) -> Path:
        """What the reader found in the collection: rows by id, JSON."""
        return self.folder / "rows.json"

    def sweep(self) -> None:
        """Remove half-written files, however young."""
        LocalStore(self.dataset).sweep(older_than_s=0)


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
    await _work(place, connection, CountingEmbedder(place))


async def _batch_worker(place: Place, connection: Connection) -> None:
    # Moments in place of the minutes after which a request that nobody heard of was not executed.
    batch_sending._SENT_WITHIN_S, batch_matching.SETTLED_S = 0.8, 1.5
    batch_lane._FIRST_LOOK_S = batch_lane.LOOK_AGAIN_S = batch_matching.LOOK_AGAIN_S = 0.1
    await _work(place, connection, BatchedEmbedder(DIMENSIONS, place.batches, place.sent))


async def _work(place: Place, connection: Connection, embedder: NullEmbedder) -> None:
    worker = Worker(_queue(place, connection), embedder, budget=Unlimited(), grace_s=1)
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


async def _loader(place: Place, connection: Connection) -> None:
    stopping = anyio.Event()
    target = loader.target.MilvusTarget(str(place.milvus), collection=_COLLECTION)
    async with Loader(Dataset.open(str(place.dataset)), target) as service, anyio.create_task_group() as group:
        group.start_soon(_on_terminate, stopping.set)
        await service.follow(_queue(place, connection), stopping, sweep_every_s=0.3)
        group.cancel_scope.cancel()


async def _reader(place: Place, _: Connection) -> None:
    """The collection by Milvus' own client, so that nothing of the loader is trusted."""
    from pymilvus import MilvusClient

    client: Any = MilvusClient(str(place.milvus))
    client.load_collection(_COLLECTION)
    found = client.query(_COLLECTION, filter="", limit=1000, output_fields=["version", "text", "metadata", "vector"])
    rows = {
        row["id"]: {
            "version": row["version"],
            "text": row["text"],
            "metadata": row["metadata"],
            "vector": np.asarray(row["vector"], dtype=np.float32).tobytes().hex(),
        }
        for row in found
    }
    assert len(rows) == len(found), f"{len(found)} rows of {len(rows)} ids"
    place.rows.write_text(json.dumps(rows))


async def _compactor(place: Place, _: Connection) -> None:
    await to_thread.run_sync(partial(compact, Dataset.open(str(place.dataset)), grace_s=0))


PARTS = {
    "compactor": _compactor,
    "worker": _worker,
    "batch worker": _batch_worker,
    "scheduler": _scheduler,
    "pusher": _pusher,
    "producer": _producer,
    "loader": _loader,
    "reader": _reader,
}


class _NotedPoint(failpoints._Point):
    """A failpoint that says in a file that it acts."""

    note: Path

    def due(self) -> bool:
        due = super().due()
        if due:
            self.note.touch()
        return due


def _arm(plan: str, place: Place) -> None:
    points = {}
    for name, point in failpoints.parse_plan(plan).items():
        points[name] = noted = _NotedPoint(name, point.action, point.stall_s, point.at)
        noted.note = place.fault
    failpoints._plan.points = dict(points)


def main(part: str, place: Place, plan: str) -> None:
    """Run a part to its end, in this process; exit status 1 when it raised, 2 when it refused to start."""
    logging.basicConfig(filename=place.folder / f"{part}-{os.getpid()}.log", level=logging.INFO, force=True)
    _arm(plan, place)
    loader.target._BATCH_ROWS = _LOADER_BATCH_ROWS
    try:
        anyio.run(_run, part, place)
    except BaseException as error:
        logging.exception("%s ended", part)
        raise SystemExit(REFUSED if isinstance(error, ConfigurationError) else 1) from None


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
