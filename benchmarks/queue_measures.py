"""What `benchmarks.queue` measures of Embedmill's own queue; every figure is of processes that were started beforehand."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import anyio

from embedmill.connection import Connection
from embedmill.errors import EmbedmillError
from embedmill.messages import Task
from scheduler.queue import Queue

from .command import Cost, run_embedmill
from .processes import Child
from .queue_processes import make_dataset

SHARD_ROWS = 4096
MODEL = "null/384"
_MODULE = "benchmarks.queue_processes"
_MEMORY_DATASET = "s3://corpora/wikipedia-2026-11/embeddings"
_LOOK_EVERY_S = 0.05
_LINGER_S = 0.2
_TEXT_BYTES = 260 * SHARD_ROWS


class Server:
    """The server under test, asked for what it says of itself."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def info(self) -> dict[str, str]:
        connection = Connection(self.url)
        try:
            return await connection.check()
        finally:
            await connection.aclose()

    def used_cpu_s(self) -> float:
        info = anyio.run(self.info)
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


class MemoryWatch:
    """As a context: how far a server's used_memory rises above what it was at the beginning."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._watch,), daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    async def _watch(self) -> None:
        connection = Connection(self._server.url)
        first = int((await connection.check())["used_memory"])
        while not self._stopped.is_set():
            self.peak_bytes = max(self.peak_bytes, int((await connection.check())["used_memory"]) - first)
            await anyio.sleep(_LOOK_EVERY_S)
        await connection.aclose()


def full_shards(count: int, *, dataset: str = _MEMORY_DATASET) -> list[Task]:
    """Tasks of full shards of one dataset, as admission makes them."""
    dataset_id, fingerprint = uuid.uuid4().hex, uuid.uuid4().hex
    return [
        Task(dataset, dataset_id, shard, "main", SHARD_ROWS, _TEXT_BYTES, "bulk", fingerprint) for shard in range(count)
    ]


def measure_cycles(server: Server, *, tasks: int, processes: int, in_flight: int) -> dict[str, float]:
    """Tasks a second through lease, extend and finish, in all; CPU of workers and server per task."""
    namespace = _fresh_name()
    anyio.run(_enqueue, server.url, namespace, full_shards(tasks))
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child(_MODULE, _role("cycle", server, namespace, owner=f"w{n}", in_flight=in_flight)))
            for n in range(processes)
        ]
        for child in children:
            child.wait_until_ready()
        server_cpu_s = server.used_cpu_s()
        for child in children:
            child.go()
        results = [child.result() for child in children]
        server_cpu_s = server.used_cpu_s() - server_cpu_s
    if sum(result["done"] for result in results) != tasks:
        raise EmbedmillError("the workers did not finish every task")
    wall_s = max(r["ended_at"] for r in results) - min(r["started_at"] for r in results)
    return {
        "tasks_per_s": tasks / wall_s,
        "worker_cpu_ms_per_task": 1000 * sum(r["used_s"] for r in results) / tasks,
        "server_cpu_ms_per_task": 1000 * server_cpu_s / tasks,
    }


def measure_memory(server: Server, *, shards: Sequence[int]) -> list[dict[str, float]]:
    """What tasks of full shards take in Redis: used_memory before and after enqueueing, and with all of them leased."""
    return [anyio.run(_memory, server, count) for count in shards]


def measure_wake(server: Server, *, samples: int, seed: int) -> dict[str, float]:
    """From the call of `enqueue` to the return of the `lease` of a worker in another process that had nothing to do."""
    namespace = _fresh_name()
    with Child(_MODULE, _role("wake", server, namespace, samples=samples)) as child:
        child.wait_until_ready()
        child.go()
        pushed_at = anyio.run(_push_now_and_then, server.url, namespace, samples, seed)
        leased_at = {int(shard): at for shard, at in child.result()["leased_at"]}
    latencies_ms = sorted(1000 * (leased_at[shard] - at) for shard, at in pushed_at.items())
    cuts = statistics.quantiles(latencies_ms, n=100)
    return {"samples": samples, "p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": latencies_ms[-1]}


def measure_push_command(server: Server, corpus: Path, folder: Path) -> Cost:
    """`embedmill push` of a file, start-up included."""
    arguments = ["push", str(corpus), "--to", str(folder / _fresh_name()), "--model", MODEL, "--redis", server.url]
    return run_embedmill([*arguments, "--namespace", _fresh_name()])[1]


def measure_through_log(server: Server, corpus: Path, folder: Path, *, count: int) -> dict[str, float]:
    """From documents in memory to the last acknowledgement: document log, task, lease, reading them back, finish."""
    namespace, dataset = _fresh_name(), make_dataset(str(folder / _fresh_name()))
    taking = _role("take", server, namespace, rows=count, read=True)
    pushing = _role("push", server, namespace, dataset=dataset.url, documents=str(corpus))
    with Child(_MODULE, taking) as taker, Child(_MODULE, pushing) as pusher:
        for child in (taker, pusher):
            child.wait_until_ready()
            child.go()
        pushed, taken = pusher.result(), taker.result()
    wall_s = taken["ended_at"] - pushed["started_at"]
    return {
        "documents_per_s": count / wall_s,
        "pushed_per_s": count / (pushed["ended_at"] - pushed["started_at"]),
        "cpu_s": pushed["used_s"] + taken["used_s"],
    }


def measure_through_inbox(server: Server, corpus: Path, folder: Path, *, count: int) -> dict[str, float]:
    """The same by way of `Producer`, the inbox, a scheduler and receipts; and the most that Redis held meanwhile."""
    namespace, dataset = _fresh_name(), make_dataset(str(folder / _fresh_name()))
    producing = _role("produce", server, namespace, documents=str(corpus), inbox="bench")
    admitting = _role("admit", server, namespace, dataset=dataset.url, inbox="bench", linger_s=_LINGER_S)
    taking = _role("take", server, namespace, rows=count, read=True)
    with (
        Child(_MODULE, taking) as taker,
        Child(_MODULE, admitting) as admitter,
        Child(_MODULE, producing) as producer,
        MemoryWatch(server) as memory,
    ):
        for child in (taker, admitter, producer):
            child.wait_until_ready()
            child.go()
        produced, taken = producer.result(), taker.result()
    wall_s = max(taken["ended_at"], produced["ended_at"]) - produced["started_at"]
    return {
        "documents_per_s": count / wall_s,
        "receipts_per_s": count / (produced["ended_at"] - produced["started_at"]),
        "redis_peak_mib": memory.peak_bytes / 2**20,
    }


def measure_references(server: Server, *, tasks: int) -> dict[str, float]:
    """Documents that the queue alone moves, as references: enqueue in blocks of 64 tasks here, lease and finish there."""
    namespace = _fresh_name()
    with Child(_MODULE, _role("take", server, namespace, rows=tasks * SHARD_ROWS, read=False)) as taker:
        taker.wait_until_ready()
        taker.go()
        started_at = anyio.run(_enqueue, server.url, namespace, full_shards(tasks), 64)
        wall_s = taker.result()["ended_at"] - started_at
    return {"documents_per_s": tasks * SHARD_ROWS / wall_s, "tasks_per_s": tasks / wall_s}


def measure_share(corpus: Path, folder: Path, *, documents: int) -> dict[str, Any]:
    """What the queue takes of `embedmill run` with the null embedder, counted call by call inside it."""
    out = folder / "share.json"
    arguments = ["run", str(corpus), "--to", str(folder / _fresh_name()), "--model", MODEL, "--no-milvus"]
    record, cost = run_embedmill(arguments, python=("-m", "benchmarks.queue_share", str(out)))
    if record["passages"]["embedded"] != documents:
        raise EmbedmillError(f"{record['passages']['embedded']:,} of {documents:,} documents were embedded")
    calls = json.loads(out.read_text(encoding="utf-8"))["calls"]
    counted = [calls[name] for name in ("lease", "extend", "finish")]
    client_cpu_s = sum(call["cpu_s"] for call in counted)
    server_cpu_s = cost.children_cpu_s or 0.0
    return {
        "documents": documents,
        "wall_s": cost.wall_s,
        "cpu_s": cost.cpu_s,
        "calls": calls,
        "client_cpu_s": client_cpu_s,
        "server_cpu_s": server_cpu_s,
        "cpu_share": client_cpu_s / cost.cpu_s,
        "cpu_share_with_server": (client_cpu_s + server_cpu_s) / cost.cpu_s,
        "wall_in_calls_s": sum(call["wall_s"] for call in counted),
    }


async def _enqueue(url: str, namespace: str, tasks: Sequence[Task], block: int = 200) -> float:
    connection = Connection(url)
    queue = Queue(connection, namespace=namespace)
    await queue.depth()
    started_at = time.monotonic()
    for start in range(0, len(tasks), block):
        await queue.enqueue(tasks[start : start + block])
    await connection.aclose()
    return started_at


async def _memory(server: Server, shards: int) -> dict[str, float]:
    connection = Connection(server.url)
    queue = Queue(connection, namespace=_fresh_name())
    # Scripts and the keys that every namespace has are there before the count begins.
    await queue.enqueue(full_shards(1))
    for lease in await queue.lease("owner"):
        await queue.finish(lease.task)
    empty = int((await connection.check())["used_memory"])
    await queue.enqueue(full_shards(shards))
    queued = int((await connection.check())["used_memory"])
    while await queue.lease("owner", count=200):
        pass
    leased = int((await connection.check())["used_memory"])
    await queue.clear()
    await connection.aclose()
    millions = shards * SHARD_ROWS / 1e6
    return {
        "shards": shards,
        "documents": shards * SHARD_ROWS,
        "queued_bytes": queued - empty,
        "mib_per_million": (queued - empty) / 2**20 / millions,
        "mib_per_million_all_leased": (leased - empty) / 2**20 / millions,
    }


async def _push_now_and_then(url: str, namespace: str, samples: int, seed: int) -> dict[int, float]:
    connection = Connection(url)
    queue = Queue(connection, namespace=namespace)
    await queue.depth()
    source = random.Random(seed)
    pushed_at: dict[int, float] = {}
    for task in full_shards(samples):
        await anyio.sleep(source.uniform(0.005, 0.025))
        pushed_at[task.shard] = time.monotonic()
        await queue.enqueue([task])
    await connection.aclose()
    return pushed_at


def _role(role: str, server: Server, namespace: str, **options: Any) -> dict[str, Any]:
    return {"role": role, "url": server.url, "namespace": namespace, **options}


def _fresh_name() -> str:
    return f"bench-{uuid.uuid4().hex[:12]}"
