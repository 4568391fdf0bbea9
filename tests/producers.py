"""A producer and an inbox in this process: what tests see of its messages, and receipts as admission would write them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from embedmill.connection import Connection
from embedmill.inbox import Receipt, inbox_key, receipts_key
from embedmill.producer import Producer

STREAM = inbox_key("default", "wiki")


async def messages(connection: Connection) -> list[dict[str, str]]:
    return [fields for _, fields in await connection.command("XRANGE", STREAM, "-", "+")]


def documents(message: dict[str, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in message["documents"].split("\n")]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(10):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def has(connection: Connection, count: int) -> bool:
    return len(await messages(connection)) == count


async def confirm(connection: Connection, *, which: slice = slice(None), **counts: int) -> int:
    """What admission does, in short: take these messages away and write their receipts."""
    entries = (await connection.command("XRANGE", STREAM, "-", "+"))[which]
    for id_, fields in entries:
        receipt = Receipt(fields["key"], **counts).to_json()
        await connection.command("XADD", receipts_key("default", fields["reply"]), "*", "receipt", receipt)
        await connection.command("XDEL", STREAM, id_)
        await connection.command("HDEL", f"{STREAM}:keys", fields["key"])
    return len(entries)


def producer_on(connection: Connection, **options: Any) -> Producer:
    return Producer(connection, inbox="wiki", **{"linger_s": 60.0, **options})
