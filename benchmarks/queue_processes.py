"""Embedmill's own processes for `benchmarks.queue`, one role each: cycle, wake, push, produce,
admit, take."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from anyio import to_thread

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.documents import Cursor, SourceDocument, canonical_json
from embedmill.producer import Producer
from scheduler.admission import Admitter
from scheduler.queue import Queue
from scheduler.service import serve_dataset
from worker.embedders.null import NullEmbedder

from .processes import in_batches, load_documents, options_of_child, say_result, wait_for_go

_BLOCK = 1024
_IDLE_S = 1.0


async def cycle(queue: Queue, options: dict[str, Any]) -> None:
    """Lease, extend and finish one task after the other until none is left, in `in_flight` coroutines."""
    done = 0
    ended_at = 0.0

    async def work(owner: str) -> None:
        nonlocal done, ended_at
        while leases := await queue.lease(owner):
            extended = await queue.extend(leases)
            if extended.lost or not await queue.finish(leases[0].task):
                raise RuntimeError("a lease was lost")
            done += 1
            ended_at = time.monotonic()

    # Opens the connections, before the clock runs.
    await queue.depth()
    started_at, cpu_s = wait_for_go(), time.process_time()
    async with anyio.create_task_group() as group:
        for number in range(options["in_flight"]):
            group.start_soon(work, f"{options['owner']}-{number}")
    say_result({"started_at": started_at, "ended_at": ended_at, "done": done, "used_s": time.process_time() - cpu_s})


async def wake(queue: Queue, options: dict[str, Any]) -> None:
    """An idle worker: waits for work, leases, finishes. When each task (by shard) was ours."""
    leased_at: dict[int, float] = {}
    seen = "0"
    await queue.depth()
    wait_for_go()
    while len(leased_at) < options["samples"]:
        leases = await queue.lease("waiting")
        now = time.monotonic()
        for lease in leases:
            leased_at[lease.task.shard] = now
            await queue.finish(lease.task)
        if not leases:
            seen = await queue.wait_for_work(seen, timeout_s=_IDLE_S)
    say_result({"leased_at": sorted(leased_at.items())})


async def push(queue: Queue, options: dict[str, Any]) -> None:
    """Documents that are in memory go into the dataset's log, shard by shard, and onto the queue."""
    dataset = Dataset.open(options["dataset"])
    documents = load_documents(options["documents"])
    admitter = Admitter(dataset, dataset.open_index(), job="main")
    await queue.depth()
    started_at, cpu_s = wait_for_go(), time.process_time()
    taken = 0
    for block in in_batches(documents, _BLOCK):
        records = [_as_source_document(document, taken + number) for number, document in enumerate(block, 1)]
        taken += len(block)
        await queue.enqueue((await to_thread.run_sync(admitter.admit, "in-memory", "in-memory", records)).tasks)
    await queue.enqueue(await to_thread.run_sync(admitter.close_shard))
    say_result({"started_at": started_at, "ended_at": time.monotonic(), "used_s": time.process_time() - cpu_s})


async def produce(queue: Queue, options: dict[str, Any]) -> None:
    """The same documents through `embedmill.Producer` with its defaults, to the last receipt."""
    documents = load_documents(options["documents"])
    await queue.depth()
    async with Producer(options["url"], inbox=options["inbox"], namespace=options["namespace"]) as producer:
        started_at, cpu_s = wait_for_go(), time.process_time()
        for document in documents:
            metadata = {name: value for name, value in document.items() if name not in ("id", "text")}
            await producer.add(document["id"], document["text"], metadata=metadata)
        await producer.flush()
        ended_at = time.monotonic()
        if producer.receipts.admitted != len(documents):
            raise RuntimeError(f"{producer.receipts.admitted} of {len(documents)} documents were admitted")
        say_result({"started_at": started_at, "ended_at": ended_at, "used_s": time.process_time() - cpu_s})


async def admit(queue: Queue, options: dict[str, Any]) -> None:
    """A scheduler, until its process is ended."""
    dataset = await to_thread.run_sync(Dataset.open, options["dataset"])
    await queue.depth()
    wait_for_go()
    await serve_dataset(
        dataset, Connection(options["url"]), inbox=options["inbox"], namespace=options["namespace"],
        stopping=anyio.Event(), linger_s=options["linger_s"],
    )  # fmt: skip


async def take(queue: Queue, options: dict[str, Any]) -> None:
    """Lease, read the documents if asked to, compute nothing, finish; until `rows` rows were taken."""
    datasets: dict[str, Dataset] = {}
    rows, seen = 0, "0"
    await queue.depth()
    cpu_s = time.process_time()
    wait_for_go()
    while rows < options["rows"]:
        leases = await queue.lease("taking", count=2)
        for lease in leases:
            task = lease.task
            if options["read"]:
                if task.dataset not in datasets:
                    datasets[task.dataset] = Dataset.open(task.dataset)
                table, _ = await to_thread.run_sync(datasets[task.dataset].documents, task.shard)
                rows += len(table.column("text").to_pylist())
            else:
                rows += task.rows
            await queue.finish(task)
        if not leases:
            seen = await queue.wait_for_work(seen, timeout_s=_IDLE_S)
    say_result({"ended_at": time.monotonic(), "rows": rows, "used_s": time.process_time() - cpu_s})


_ROLES: dict[str, Callable[[Queue, dict[str, Any]], Coroutine[Any, Any, None]]] = {
    "cycle": cycle, "wake": wake, "push": push, "produce": produce, "admit": admit, "take": take,
}  # fmt: skip


async def main() -> None:
    options = options_of_child()
    queue = Queue(Connection(options["url"]), namespace=options["namespace"])
    await _ROLES[options["role"]](queue, options)


def make_dataset(path: str) -> Dataset:
    """An empty dataset of the null embedder."""
    return Dataset.open_or_create(path, embedder=NullEmbedder(384).spec)


def _as_source_document(document: dict[str, Any], record: int) -> SourceDocument:
    metadata = {name: value for name, value in document.items() if name not in ("id", "text")}
    return SourceDocument(document["id"], document["text"], canonical_json(metadata), Cursor(record=record), "")


if __name__ == "__main__":
    anyio.run(main)
