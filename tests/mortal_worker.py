"""A worker that dies and is started again, as under a supervisor: `python -m tests.mortal_worker URL NAMESPACE ...`.

Each life is a process of its own, forked so that it is there at once. It ends the supervisor's work when nothing is open.
The last line of stdout is the number of lives that ended otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Sequence

import anyio
import numpy as np

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.embedder import BatchLimits, Embedding, Role
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from worker import service
from worker.embedders.null import NullEmbedder, hash_vectors
from worker.service import Worker

POISON = "POISON"


class DeadlyEmbedder(NullEmbedder):
    """null/3 that takes its time, and ends its process at a text with `POISON` in it."""

    def __init__(self, request_s: float, busy: int) -> None:
        super().__init__(3)
        self._request_s = request_s
        self._busy = busy

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(max_inputs=32, max_tokens=100_000, padded=False, concurrency=2)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        os.write(self._busy, b".")
        await anyio.sleep(self._request_s)
        if any(POISON in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return Embedding(np.asarray(hash_vectors(texts, 3)), len(texts))


async def live(settings: argparse.Namespace, busy: int) -> None:
    connection = Connection(settings.url)
    queue = Queue(connection, namespace=settings.namespace, lease_s=settings.lease_s)
    if settings.own:
        await queue.clear()
        await reconcile(Dataset.open(settings.own), queue)
    embedder = DeadlyEmbedder(settings.request_s, busy)
    worker = Worker(queue, embedder, budget=Unlimited(), patient=not settings.own)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        while (await queue.depth()).open:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        worker.stop()
    await connection.aclose()


def life(settings: argparse.Namespace, chance: random.Random) -> bool:
    """One process, from its start to its end; whether it had nothing left to do.

    kill_s: it is killed so long, on average, after it began its first request.
    """
    watched, busy = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(watched)
        anyio.run(live, settings, busy)
        os._exit(0)
    os.close(busy)
    if os.read(watched, 1) and settings.kill_s:
        time.sleep(chance.uniform(0.0, 2.0) * settings.kill_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(watched)
    return os.waitstatus_to_exitcode(status) == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("namespace")
    parser.add_argument("--own", metavar="DATASET", help="as `run`: with a queue that forgets everything at each start")
    parser.add_argument("--lease-s", type=float, default=1.0)
    parser.add_argument("--request-s", type=float, default=0.0)
    parser.add_argument("--kill-s", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    chance = random.Random(settings.seed)
    service._IDLE_S = 0.05
    deaths = 0
    while not life(settings, chance):
        deaths += 1
    print(deaths)


if __name__ == "__main__":
    main()
