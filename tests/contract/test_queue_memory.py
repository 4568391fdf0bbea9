"""A server that is full goes on: what frees memory does not wait for memory. And what an inbox refused is bounded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.errors import Overloaded
from embedmill.inbox import inbox_key
from scheduler.budget import Budget
from scheduler.inbox import InboxAdmission
from scheduler.queue import Extended, Lease
from tests.contract.queue_bench import DATASET_ID, NAMESPACE, PREFIX, Bench, letter, only, task, tasks
from tests.datasets import small_dataset
from tests.servers import Server, running, valkey_binary

_INBOX = "wiki"
_STREAM = inbox_key(NAMESPACE, _INBOX)
_TEXT = "x" * 100_000
_WEEK_MS = 7 * 86_400_000


@dataclass
class FullServer:
    """A server whose memory is used up by messages of an inbox, with tasks from before: four of them leased, two ready."""

    bench: Bench
    messages: int
    leases: list[Lease]

    async def is_full(self) -> bool:
        try:
            await self.bench.queue.enqueue([task(999)])
        except Overloaded as error:
            return "maxmemory" in str(error)
        return False


@pytest.fixture(params=["valkey", "redis"])
async def full(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FullServer]:
    binary = valkey_binary() if request.param == "valkey" else request.getfixturevalue("redis_server")
    with running(Server(tmp_path / "server", binary=binary, on_socket=True)) as server:
        connection = Connection(server.url)
        bench = Bench(connection)
        await bench.queue.enqueue(tasks(6))
        leases = await bench.queue.lease("before", count=4)
        for number in range(60):
            await put(connection, {"id": f"a{number}", "text": _TEXT})
        server.do("CONFIG", "SET", "maxmemory", int(server.do("INFO", "memory")["used_memory"]) - 1_000_000)
        full = FullServer(bench, 60, leases)
        assert await full.is_full()
        yield full
        await connection.aclose()


async def put(connection: Connection, document: dict[str, str], **fields: str) -> None:
    parts = [part for pair in fields.items() for part in pair]
    await connection.command("XADD", _STREAM, "*", "v", "1", *parts, "documents", json.dumps(document))


def new_admission(bench: Bench, dataset: Dataset) -> InboxAdmission:
    return InboxAdmission(dataset, bench.queue, bench.connection, name=_INBOX, namespace=NAMESPACE, linger_s=0.01)


@pytest.mark.server
async def test_a_server_that_is_full_of_its_inbox_drains_and_takes_tasks_again(
    full: FullServer, tmp_path: Path
) -> None:
    connection, stopping = full.bench.connection, anyio.Event()
    admission = new_admission(full.bench, small_dataset(tmp_path / "d"))
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(admission.run, stopping)
            while await connection.command("XLEN", _STREAM):  # noqa: ASYNC110
                await anyio.sleep(0.02)
            stopping.set()
    assert (await full.bench.queue.depth()).ready_bulk > 2
    assert not await full.is_full()


@pytest.mark.server
async def test_on_a_full_server_tasks_are_leased_kept_handed_back_and_finished(full: FullServer) -> None:
    queue, (extended, released, retried, dropped) = full.bench.queue, full.leases
    assert await queue.extend([extended], progressed=[extended.task.id]) == Extended()
    assert await queue.release(released)
    assert await queue.retry(retried, delay_s=5)
    assert await queue.drop(dropped)
    leased = await only(queue.lease("w"))
    assert await queue.finish(leased.task, dead=[letter(leased.task.shard, 0)])
    assert await full.bench.announced() == 1
    await queue.report("w", {"embedded": 1})
    assert [worker.owner for worker in await queue.workers()] == ["w"]
    assert await queue.pause(DATASET_ID, "bulk")
    assert await queue.forget(DATASET_ID, "bulk") == 4
    assert await full.is_full()


@pytest.mark.server
async def test_on_a_full_server_requests_get_their_budget(full: FullServer) -> None:
    budget = Budget(full.bench.connection, namespace=NAMESPACE, key_id="k", rpm=600, tpm=100_000, concurrency=2)
    async with budget.reserve(100) as grant:
        held = await full.bench.connection.script("scheduler/keep", [f"{PREFIX}:rl:k:holders"], [60_000, grant.op])
        assert held == 1
        grant.settle(90)
    assert await full.is_full()


async def refused(connection: Connection) -> list[dict[str, Any]]:
    entries = await connection.command("XRANGE", f"{_STREAM}:refused", "-", "+")
    return [fields for _, fields in entries]


async def test_what_an_inbox_refused_is_cut_to_64_kib_and_kept_for_a_week(bench: Bench, tmp_path: Path) -> None:
    await put(bench.connection, {"id": "small", "text": " "})
    await put(bench.connection, {"id": "large", "text": " " * 300_000})
    await bench.connection.command("XADD", _STREAM, "*", "v", "9", "documents", "y" * 300_000, "z" * 300_000, "")
    dataset = small_dataset(tmp_path / "d")
    with closing(dataset.open_index()) as index:
        await new_admission(bench, dataset).admit_waiting(index)
    kept = {entry["refused_message"]: entry for entry in await refused(bench.connection)}
    small, large, other = (kept[message] for message in sorted(kept))
    assert json.loads(small["documents"]) == {"id": "small", "text": " "}
    assert "refused_bytes" not in small
    for entry in (large, other):
        assert int(entry["refused_bytes"]) > 300_000
        assert entry["refused_reason"]
        assert sum(len(name) + len(value) for name, value in entry.items()) < 66_000
    assert large["documents"].startswith('{"id": "large"')
    assert _WEEK_MS - 60_000 < int(await bench.connection.command("PTTL", f"{_STREAM}:refused")) <= _WEEK_MS
