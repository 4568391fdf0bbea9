"""Clients of an embeddings API, one in each process: the same requests, from texts to vectors in memory.

Ours runs where Embedmill is installed; the others in an environment of their own, so nothing of this project is imported
before a contestant is chosen. Each answers how many vectors it got, in how many wall and CPU seconds of its process.
"""

from __future__ import annotations

import asyncio
import base64
import math
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from .processes import options_of_child, say_result, wait_for_go

MODEL = "jina-embeddings-v3"
_KEY = "jina_canned"
# Encodes the texts of one request, and returns vectors.
_Encode = Callable[[], Awaitable[Any]]


def make_texts(inputs: int) -> list[str]:
    """Sentences of some 90 characters."""
    return [
        f"Passage {number}: the canary in this mine sings of seven blue whales and of {number * 7919 % 10007} more"
        for number in range(inputs)
    ]


async def client(texts: list[str], url: str, dimensions: int, stack: AsyncExitStack) -> _Encode:
    """Our client, as the worker calls it."""
    from worker.embedders.jina import JinaEmbedder

    embedder = JinaEmbedder(f"jina/{MODEL}", key=_KEY, api_base=f"{url}/base64/{len(texts)}", dimensions=dimensions)
    stack.push_async_callback(embedder.aclose)

    async def encode() -> Any:
        return (await embedder.embed(texts)).vectors

    return encode


async def face(texts: list[str], url: str, dimensions: int, stack: AsyncExitStack) -> _Encode:
    """Our Python face, without a tier: with packing, estimates, retries and the gate."""
    import embedmill

    jina = embedmill.AsyncJinaEmbedding(
        MODEL, api_key=_KEY, api_base=f"{url}/base64/{len(texts)}", dimensions=dimensions
    )
    stack.push_async_callback(jina.aclose)
    return lambda: jina.encode_documents(texts)


def sdk(encoding: str | None) -> Callable[..., Awaitable[_Encode]]:
    """The `openai` package; its own default is base64, decoded into lists of Python's floats."""

    async def make(texts: list[str], url: str, dimensions: int, stack: AsyncExitStack) -> _Encode:
        from openai import AsyncOpenAI

        kind = "float" if encoding == "float" else "base64"
        made = AsyncOpenAI(api_key=_KEY, base_url=f"{url}/{kind}/{len(texts)}", max_retries=0)
        await stack.enter_async_context(made)
        asked: dict[str, Any] = {"model": MODEL, "input": texts, "dimensions": dimensions}
        if encoding is not None:
            asked["encoding_format"] = encoding

        async def encode() -> Any:
            answer = await made.embeddings.create(**asked)
            if encoding != "base64":
                return [item.embedding for item in answer.data]
            import numpy as np

            return np.stack([np.frombuffer(base64.b64decode(item.embedding), np.float32) for item in answer.data])

        return encode

    return make


async def jina_function(texts: list[str], url: str, dimensions: int, _stack: AsyncExitStack) -> _Encode:
    """pymilvus' JinaEmbeddingFunction: one request at a time, blocking, numbers instead of base64."""
    from pymilvus.model.dense import jinaai

    jinaai.API_URL = f"{url}/float/{len(texts)}/embeddings"
    function = jinaai.JinaEmbeddingFunction(MODEL, api_key=_KEY, dimensions=dimensions)

    async def encode() -> Any:
        return function.encode_documents(texts)

    return encode


async def floor(texts: list[str], url: str, dimensions: int, stack: AsyncExitStack) -> _Encode:
    """The bytes over loopback into one buffer, and base64 decoded from where it is known to be. No HTTP, no JSON."""
    import numpy as np
    from pybase64 import b64decode

    inputs, address = len(texts), urlsplit(url)
    connection = stack.enter_context(socket.create_connection((address.hostname, address.port)))
    request = f"POST /base64/{inputs}/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    connection.sendall(request)
    head = connection.recv(65536)
    size = head.index(b"\r\n\r\n") + 4 + int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    buffer = memoryview(bytearray(size))
    buffer[: len(head)] = head
    _fill(connection, buffer, len(head))
    starts = [at + len(b'"embedding":"') for at in _places(bytes(buffer), b'"embedding":"')]
    encoded = 4 * math.ceil(4 * dimensions / 3)
    row_bytes = 4 * dimensions

    async def encode() -> Any:
        connection.sendall(request)
        _fill(connection, buffer, 0)
        vectors = np.empty((inputs, dimensions), np.float32)
        into = vectors.data.cast("B")
        for row, start in enumerate(starts):
            into[row * row_bytes : (row + 1) * row_bytes] = b64decode(buffer[start : start + encoded], validate=True)
        return vectors

    return encode


CONTESTANTS: dict[str, Callable[..., Awaitable[_Encode]]] = {
    "client": client,
    "face": face,
    "sdk": sdk(None),
    "sdk-base64": sdk("base64"),
    "sdk-float": sdk("float"),
    "jina-function": jina_function,
    "floor": floor,
}


def _fill(connection: socket.socket, buffer: memoryview, at: int) -> None:
    while at < len(buffer):
        at += connection.recv_into(buffer[at:])


def _places(body: bytes, sought: bytes) -> list[int]:
    found, at = [], body.find(sought)
    while at >= 0:
        found.append(at)
        at = body.find(sought, at + 1)
    return found


async def measure(options: dict[str, Any]) -> dict[str, float]:
    inputs, seconds = options["inputs"], options["seconds"]
    async with AsyncExitStack() as stack:
        make = CONTESTANTS[options["who"]]
        encode = await make(make_texts(inputs), options["url"], options["dimensions"], stack)
        first = await encode()
        total = math.fsum(math.fsum(row) for row in first)
        shape = len(first), len(first[0])
        if shape != (inputs, options["dimensions"]) or not math.isclose(total, options["sum"], abs_tol=0.01):
            raise SystemExit(f"{options['who']} made of the answer what it does not say: {shape}, sum {total}")
        encoded = 0

        async def keep_encoding() -> None:
            nonlocal encoded
            while time.monotonic() < until:
                await encode()
                encoded += inputs

        began = wait_for_go()
        cpu_s, until = time.process_time(), began + seconds
        await asyncio.gather(*(keep_encoding() for _ in range(options["in_flight"])))
        return {"vectors": encoded, "wall_s": time.monotonic() - began, "client_cpu_s": time.process_time() - cpu_s}


if __name__ == "__main__":
    say_result(asyncio.run(measure(options_of_child())))
