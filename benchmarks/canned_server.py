"""An embeddings endpoint that computes nothing: every answer was made before the clock runs. A process of its own.

`POST /KIND/INPUTS/embeddings` is answered with INPUTS vectors, whatever was asked; KIND is `base64` or `float`. Rows come in
order. It says its port, and the sum of all vectors of each size, so that clients can be checked.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .processes import options_of_child, say_line, say_ready


def make_vectors(inputs: int, *, dimensions: int) -> NDArray[np.float32]:
    """(inputs, dimensions), unit length, the same ones each time."""
    vectors = np.random.default_rng(inputs).standard_normal((inputs, dimensions))
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def answer(kind: str, vectors: NDArray[np.float32]) -> bytes:
    """A whole response, as FastAPI's default encoder would write it."""
    rows: list[Any] = (
        [base64.b64encode(row.tobytes()).decode() for row in vectors] if kind == "base64" else vectors.tolist()
    )
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"total_tokens": 20 * len(vectors), "prompt_tokens": 20 * len(vectors)}
    content = {"model": "jina-embeddings-v3", "object": "list", "usage": usage, "data": data}
    body = json.dumps(content, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class CannedConnection(asyncio.Protocol):
    """One connection; requests need a Content-Length."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self._answers = answers
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            request, *headers = bytes(self._received[:end]).split(b"\r\n")
            lengths = [int(line[15:]) for line in headers if line.lower().startswith(b"content-length:")]
            whole = end + 4 + sum(lengths)
            if len(self._received) < whole:
                return
            del self._received[:whole]
            self._transport.write(self._answers[request.split(b" ")[1]])


async def serve(options: dict[str, Any]) -> None:
    answers: dict[bytes, bytes] = {}
    sums: dict[str, float] = {}
    for inputs in options["inputs"]:
        vectors = make_vectors(inputs, dimensions=options["dimensions"])
        sums[str(inputs)] = float(vectors.sum(dtype=np.float64))
        answers |= {f"/{kind}/{inputs}/embeddings".encode(): answer(kind, vectors) for kind in ("base64", "float")}
    server = await asyncio.get_running_loop().create_server(lambda: CannedConnection(answers), "127.0.0.1", 0)
    say_ready()
    say_line({"port": server.sockets[0].getsockname()[1], "sums": sums})
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(options_of_child()))
