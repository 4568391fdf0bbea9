"""The lane of a job reaches the budget with each of its requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.messages import Lane
from scheduler.budget import Grant, Unlimited
from scheduler.queue import Queue
from tests.datasets import admit_texts
from tests.worker_bench import TestedEmbedder, task, texts_of
from worker.service import Worker


class WatchedBudget(Unlimited):
    """Unlimited, and remembers in which lane it was asked."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        self.lanes.append(lane)
        yield Grant(est_tokens)


@pytest.mark.parametrize("lane", ["live", "bulk"])
async def test_the_lane_of_a_task_is_that_of_its_requests(dataset: Dataset, lane: Lane) -> None:
    admit_texts(dataset, 0, texts_of(0))
    connection, budget = Connection(FAKE_URL), WatchedBudget()
    queue = Queue(connection)
    await queue.enqueue([replace(task(dataset.url, dataset.info.id, 0, rows=8), lane=lane)])
    worker = Worker(queue, TestedEmbedder(), budget=budget, grace_s=1)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: worker.run(on_commit=lambda _: worker.stop()))
    await connection.aclose()
    assert set(budget.lanes) == {lane}
