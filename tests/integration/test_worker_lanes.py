"""The lane of a job reaches the budget with each of its requests, and with the canary that is asked for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import numpy as np
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.errors import InputRejected
from embedmill.messages import Lane
from scheduler.budget import Grant, Unlimited
from scheduler.queue import Queue
from tests.datasets import admit_texts
from tests.worker_bench import TestedEmbedder, task, texts_of
from worker.requesting import CANARY
from worker.service import Worker


class WatchedBudget(Unlimited):
    """Unlimited, and remembers in which lane it was asked."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        self.lanes.append(lane)
        yield Grant(est_tokens)


async def refuse_the_first(request: list[str]) -> None:
    if texts_of(0)[0] in request:
        raise InputRejected("this text is not allowed")


def one_for_all(texts: list[str], vectors: np.ndarray) -> np.ndarray:
    return vectors if len(texts) == 1 else np.ones_like(vectors)


@pytest.mark.parametrize("lane", ["live", "bulk"])
@pytest.mark.parametrize(
    ("embedder", "canaries"),
    [
        pytest.param(TestedEmbedder, 0, id="all is well"),
        pytest.param(lambda: TestedEmbedder(before=refuse_the_first, max_inputs=8), 1, id="refused"),
        pytest.param(lambda: TestedEmbedder(change=one_for_all), 4, id="one vector"),
    ],
)
async def test_the_lane_of_a_task_is_that_of_its_requests_and_of_the_canary(
    dataset: Dataset, lane: Lane, embedder: Callable[[], TestedEmbedder], canaries: int
) -> None:
    tested = embedder()
    admit_texts(dataset, 0, texts_of(0))
    connection, budget = Connection(FAKE_URL), WatchedBudget()
    queue = Queue(connection)
    await queue.enqueue([replace(task(dataset.url, dataset.info.id, 0, rows=8), lane=lane)])
    worker = Worker(queue, tested, budget=budget, grace_s=1)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: worker.run(on_commit=lambda _: worker.stop()))
    await connection.aclose()
    assert tested.times[CANARY] == canaries
    assert set(budget.lanes) == {lane}
