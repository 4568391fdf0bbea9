"""An inbox on trial: messages by hand, schedulers that come and go, and what the log then holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import anyio

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.inbox import Receipt, inbox_key, receipts_key
from scheduler.budget import Unlimited
from scheduler.inbox import InboxAdmission
from scheduler.queue import Queue
from worker.embedders.null import NullEmbedder
from worker.service import Worker

Row = tuple[str, int, str, bool]


def admission_of(dataset: Dataset, connection: Connection, *, linger_s: float = 0.05) -> InboxAdmission:
    dataset = Dataset.open(dataset.url)
    return InboxAdmission(dataset, Queue(connection), connection, name="wiki", linger_s=linger_s)


async def admit_all(dataset: Dataset, connection: Connection) -> InboxAdmission:
    """One scheduler's life: everything that waits is admitted."""
    admission = admission_of(dataset, connection)
    with closing(dataset.open_index()) as index:
        await admission.admit_waiting(index)
    return admission


@asynccontextmanager
async def scheduler(dataset: Dataset, connection: Connection, *, linger_s: float = 0.05) -> AsyncIterator[None]:
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(admission_of(dataset, connection, linger_s=linger_s).run, stopping)
        yield
        stopping.set()


async def put(connection: Connection, *documents: Any, **fields: str) -> str:
    """A message by hand."""
    lines = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in documents)
    parts = [part for pair in {"v": "1", "documents": lines, "reply": "me", **fields}.items() for part in pair]
    return str(await connection.command("XADD", inbox_key("default", "wiki"), "*", *parts))


def doc(id_: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "text": text, **more}


async def receipts(connection: Connection, reply: str = "me") -> list[Receipt]:
    entries = await connection.command("XRANGE", receipts_key("default", reply), "-", "+")
    return [Receipt.from_json(fields["receipt"]) for _, fields in entries]


async def waiting(connection: Connection) -> int:
    return int(await connection.command("XLEN", inbox_key("default", "wiki")))


def log_of(dataset: Dataset) -> list[Row]:
    rows: list[Row] = []
    for shard in dataset.admitted():
        records = dataset.documents(shard)[0].to_pylist()
        rows += [(r["id"], r["version"], r["text"], r["deleted"]) for r in records]
    return rows


def living(dataset: Dataset) -> dict[str, str]:
    newest: dict[str, Row] = {}
    for row in log_of(dataset):
        assert row[0] not in newest or row[1] > newest[row[0]][1]
        newest[row[0]] = row
    return {id_: text for id_, (_, _, text, deleted) in newest.items() if not deleted}


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 20) -> None:
    with anyio.fail_after(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def is_empty(connection: Connection) -> bool:
    return await waiting(connection) == 0


async def work_off(dataset: Dataset, queue: Queue) -> None:
    worker = Worker(queue, NullEmbedder(3), budget=Unlimited())
    async with anyio.create_task_group() as group:

        async def stop_when_done() -> None:
            await until(lambda: _none_open(queue))
            worker.stop()

        group.start_soon(stop_when_done)
        await worker.run()
    dataset.publish_shape()


async def _none_open(queue: Queue) -> bool:
    return (await queue.depth()).open == 0


def passages(group: str, *texts: str) -> list[dict[str, Any]]:
    return [doc(f"{group}#{n}", text, group=group) for n, text in enumerate(texts)]


async def has_messages(connection: Connection, messages: int) -> bool:
    return await waiting(connection) == messages
