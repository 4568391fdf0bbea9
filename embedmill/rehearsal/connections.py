"""What goes wrong with a connection: lost, silent, cut in the middle of an answer."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from aiohttp import web

from .accounts import Account

_LOOK_EVERY_S = 0.05


def reset_connection(http: web.Request, account: Account) -> web.Response:
    account.count("statuses", "dropped")
    if http.transport is not None:
        connection = http.transport.get_extra_info("socket")
        # Zero linger sends a reset instead of a polite end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        http.transport.abort()
    return web.Response()


async def hang(http: web.Request, account: Account) -> web.Response:
    """Until the client has closed the connection."""
    account.count("statuses", "hung")
    while http.transport is not None and not http.transport.is_closing():  # noqa: ASYNC110  # aiohttp tells a handler by cancelling it, or not at all
        await asyncio.sleep(_LOOK_EVERY_S)
    return web.Response()


async def cut(http: web.Request, account: Account, body: bytes) -> web.StreamResponse:
    account.count("statuses", "truncated")
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await response.prepare(http)
    await response.write(body[: len(body) // 2])
    if http.transport is not None:
        http.transport.close()
    return response


async def send_lines(http: web.Request, lines: Iterator[bytes], *, halved: bool) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
    await response.prepare(http)
    # A client may go away when it has seen enough.
    with suppress(ConnectionResetError):
        for line in lines:
            await response.write(line[: len(line) // 2] if halved else line)
            if halved:
                if http.transport is not None:
                    http.transport.close()
                return response
        await response.write_eof()
    return response
