"""A worker whose job goes by batches, beside the simulator: what the tests of the batch lane stand on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Submissions
from embedmill.errors import EmbedmillError
from embedmill.rehearsal import ProviderSimulator, Rehearsal, serve_rehearsal
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts, small_dataset
from tests.invariants import check_dataset
from worker import batch_lane, batch_matching, batch_pace, batch_results, batch_sending
from worker.embedders.jina import JinaEmbedder
from worker.service import Worker

MODEL = "jina/jina-embeddings-v5-text-nano"
KEY = "jina_test"


class Bench:
    """A dataset whose job goes by batches, a queue that forgets everything at the end, and a simulator."""

    def __init__(self, folder: Path, simulator: ProviderSimulator, api_base: str, *, shard_rows: int) -> None:
        self.simulator = simulator
        self.api_base = api_base
        self.dataset = small_dataset(folder, embedder=self.embedder().spec, shard_rows=shard_rows)
        self.submissions = Submissions(self.dataset)
        self.set_mode("batch")

    def embedder(self, key: str = KEY) -> JinaEmbedder:
        return JinaEmbedder(MODEL, key=key, api_base=self.api_base, dimensions=8)

    def set_mode(self, mode: Any) -> None:
        self.dataset.change_job("main", lambda job: replace(job, mode=mode))

    def admit(self, *contents: list[str]) -> None:
        for shard, texts in enumerate(contents, start=len(self.dataset.admitted())):
            admit_texts(self.dataset, shard, texts)

    async def work(
        self,
        *,
        key: str = KEY,
        until: Any = None,
        within_s: float = 50,
        patient: bool = True,
        namespace: str = "n",
        budget: Unlimited | None = None,
        on_start: Callable[[Worker], None] = lambda _: None,
    ) -> Worker:
        """A new worker on an empty Redis, until nothing is owed, until `until`, or until it gives up. on_start: gets it
        before it runs."""
        connection, embedder = Connection(FAKE_URL), self.embedder(key)
        dataset = Dataset.open(self.dataset.url)
        queue = Queue(connection, namespace=namespace)
        worker = Worker(queue, embedder, budget=budget or Unlimited(), grace_s=1, patient=patient)
        on_start(worker)

        async def watch() -> None:
            while not (until() if until else not dataset.owed()):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            worker.stop()

        error: EmbedmillError | None = None
        try:
            await reconcile(dataset, queue)
            with anyio.fail_after(within_s):
                async with anyio.create_task_group() as group:
                    group.start_soon(watch)
                    try:
                        await worker.run()
                    except EmbedmillError as raised:
                        error = raised
                    group.cancel_scope.cancel()
        finally:
            await embedder.aclose()
            await queue.clear()
            await connection.aclose()
        if error is not None:
            raise error
        return worker

    def is_paused(self) -> bool:
        job = self.dataset.job("main")
        return job is not None and job.state == "paused"

    def go_on(self) -> None:
        self.dataset.change_job("main", lambda job: replace(job, state="running", reason="", stopped_by=""))

    def rehearse(self, **behaviour: float) -> None:
        """From now on the simulator behaves so."""
        for name, value in behaviour.items():
            object.__setattr__(self.simulator._rehearsal, name, value)

    def check(self) -> None:
        dataset = Dataset.open(self.dataset.url)
        dataset.publish_shape()
        check_dataset(dataset.url)

    @property
    def states(self) -> dict[str, int]:
        return dict(self.simulator.stats()["batches"])  # type: ignore[call-overload]

    @property
    def billed_again(self) -> int:
        again = self.simulator.stats()["tokens_billed_again"]
        assert isinstance(again, int)
        return again

    def spent(self) -> list[dict[str, Any]]:
        """Lines of the spend logs that are about batches."""
        logs = sorted((Path(self.dataset.url) / "spend").glob("batch-*.log"))
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@asynccontextmanager
async def bench(folder: Path, *, shard_rows: int = 40, **behaviour: Any) -> AsyncIterator[Bench]:
    """Looks follow each other at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_lane, "_FIRST_LOOK_S", 0.05)
        for module in (batch_lane, batch_matching, batch_pace, batch_results, batch_sending):
            patch.setattr(module, "LOOK_AGAIN_S", 0.05)
        patch.setattr(batch_pace, "_FIRST_WAIT_S", 0.05)
        patch.setattr(batch_matching, "SETTLED_S", 0.3)
        patch.setattr(batch_matching, "_OUTPUT_LATE_S", 0.3)
        patch.setattr("worker.service._FIRST_RETRY_S", 0.05)
        patch.setattr("worker.service._OTHERS_AGAIN_S", 0.05)
        async with serve_rehearsal(Rehearsal(**{"batch_s": 0, **behaviour})) as (api_base, simulator):
            yield Bench(folder / "dataset", simulator, api_base, shard_rows=shard_rows)


def texts_of(shard: int, rows: int = 40) -> list[str]:
    return [f"text {row} of shard {shard}" for row in range(rows)]


def tokens_of_one() -> int:
    """More than one passage counts, less than two."""
    return 8
