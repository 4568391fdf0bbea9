"""A spend cap over a fleet on a real server, against the simulator of the provider, which counts what it bills."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.embedder import BatchLimits, EmbedderSpec
from embedmill.rehearsal import ProviderSimulator, Rehearsal, serve_rehearsal
from scheduler.budget import Budget
from scheduler.caps import Caps, JobCap
from scheduler.housekeeping import Housekeeping
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.conftest import Corpus
from tests.datasets import admit_texts, small_dataset
from tests.invariants import check_dataset
from tests.servers import Server, running
from tests.worker_bench import until
from worker.embedders.jina import JinaEmbedder
from worker.service import Worker

pytestmark = pytest.mark.server
MODEL = "jina/jina-embeddings-v3"
_HOLD_S = 2.0
_CONCURRENCY, _REQUEST_TOKENS = 4, 500


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(Server(tmp_path / "server", on_socket=True)) as server:
        yield server


class Fleet:
    """Workers of one job, each with a connection of its own, and the provider that they pay."""

    def __init__(self, server: Server, dataset: Dataset, api_base: str, simulator: ProviderSimulator) -> None:
        self.server = server
        self.dataset = dataset
        self.api_base = api_base
        self.simulator = simulator

    @property
    def billed(self) -> int:
        return int(str(self.simulator.stats()["tokens_billed"]))

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        connection = Connection(self.server.url)
        embedder = make_embedder(self.api_base)
        queue = Queue(connection, namespace="t", lease_s=8.0)
        # One that is lost is closed for a window.
        budget = Budget(connection, namespace="t", key_id="k", window_s=0.5)
        worker = Worker(queue, embedder, budget=budget, grace_s=2, patient=True)
        worker._caps = Caps(connection, namespace="t", alone=False, hold_s=_HOLD_S)
        try:
            yield worker
        finally:
            await embedder.aclose()
            await connection.aclose()

    async def work(self, *, task_status: anyio.abc.TaskStatus[anyio.CancelScope] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        with anyio.CancelScope() as scope:
            async with self.worker() as worker:
                task_status.started(scope)
                await worker.run()

    async def queue_all(self) -> None:
        connection = Connection(self.server.url)
        await reconcile(self.dataset, Queue(connection, namespace="t"))
        await connection.aclose()

    async def stopped(self) -> bool:
        record = self.dataset.job("main")
        return record is not None and record.state == "paused"


class SmallRequests(JinaEmbedder):
    """So that what is charged twice, or on doubt, for a request or two is little of a cap."""

    @property
    def limits(self) -> BatchLimits:
        return replace(super().limits, max_inputs=16, max_tokens=_REQUEST_TOKENS, least_tokens=0, most_inputs=0)


def make_embedder(api_base: str) -> JinaEmbedder:
    return SmallRequests(
        MODEL, key="jina_x", api_base=api_base, dimensions=16, concurrency=_CONCURRENCY, tokens_per_minute=120_000
    )


@asynccontextmanager
async def a_fleet(
    server: Server, folder: Path, corpus: Corpus, *, cap: int, **behaviour: float
) -> AsyncIterator[Fleet]:
    spec: EmbedderSpec = make_embedder("http://127.0.0.1:1/v1").spec
    dataset = small_dataset(folder / "set", embedder=spec, shard_rows=256, chunk_rows=64)
    # Short ones: a job stops when the most that one of them may count does not fit.
    texts = [f"{id_}: {text}"[:500] for id_, text in corpus.texts.items()]
    for shard in range(5):
        admit_texts(dataset, shard, texts[256 * shard : 256 * (shard + 1)])
    dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": cap}))
    async with serve_rehearsal(Rehearsal(latency_ms=60, jitter_ms=20, **behaviour)) as (api_base, simulator):
        fleet = Fleet(server, dataset, api_base, simulator)
        await fleet.queue_all()
        yield fleet


async def test_three_workers_stop_just_below_the_cap_and_go_on_when_it_is_raised(
    server: Server, tmp_path: Path, python_docs: Corpus
) -> None:
    async with a_fleet(server, tmp_path, python_docs, cap=30_000, error_503=0.05) as fleet:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                await group.start(fleet.work)
            await until(fleet.stopped, within_s=60)
            assert 0.97 * 30_000 < fleet.billed <= 30_000
            record = fleet.dataset.job("main")
            assert record is not None
            assert record.has_reached_cap
            assert "cap" in record.reason
            assert "--max-tokens" in record.reason
            fleet.dataset.change_job("main", lambda job: replace(job, state="running", caps={"max_tokens": 10**6}))

            async def all_committed() -> bool:
                # As a scheduler does: a worker may still be at telling the queue that the job stands still.
                await fleet.queue_all()
                return not fleet.dataset.owed()

            await until(all_committed, within_s=60)
            group.cancel_scope.cancel()
        assert fleet.simulator.stats()["max_per_text"] == 1
    fleet.dataset.publish_shape()
    # A worker was cancelled between a marker and what it sweeps after it; a scheduler does it then.
    Housekeeping(fleet.dataset).sweep()
    check_dataset(fleet.dataset.url)


async def test_a_server_that_loses_everything_does_not_reset_the_cap(
    server: Server, tmp_path: Path, python_docs: Corpus
) -> None:
    async with a_fleet(server, tmp_path, python_docs, cap=40_000) as fleet:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                await group.start(fleet.work)
            for tokens in (10_000, 20_000):

                async def so_far(tokens: int = tokens) -> bool:
                    return fleet.billed > tokens

                await until(so_far, within_s=60)
                server.do("FLUSHALL")
                await fleet.queue_all()
            await until(fleet.stopped, within_s=60)
            group.cancel_scope.cancel()
        # What is under way when everything is lost may be charged twice: nobody can tell whether the logs had it already.
        under_way = 3 * _CONCURRENCY * _REQUEST_TOKENS
        assert 40_000 - 2 * under_way < fleet.billed <= 40_000


async def test_what_a_killed_worker_held_comes_back_and_its_requests_count(
    server: Server, tmp_path: Path, python_docs: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_fleet(server, tmp_path, python_docs, cap=30_000, drop_after=0.05) as fleet:
        settle = JobCap._settle
        killed = False

        async def settle_while_alive(cap: JobCap, hold: object) -> None:
            if not killed:
                await settle(cap, hold)  # type: ignore[arg-type]

        async with anyio.create_task_group() as group:
            victim = await group.start(fleet.work)

            async def at_work() -> bool:
                return fleet.billed > 5_000

            await until(at_work, within_s=60)
            monkeypatch.setattr(JobCap, "_settle", settle_while_alive)
            killed = True
            victim.cancel()
            await anyio.sleep(0.2)
            killed = False
            await fleet.queue_all()
            for _ in range(2):
                await group.start(fleet.work)
            await until(fleet.stopped, within_s=60)
            group.cancel_scope.cancel()
        assert 0.85 * 30_000 < fleet.billed <= 30_000


async def test_a_cap_that_is_lowered_stops_workers_that_are_at_it(
    server: Server, tmp_path: Path, python_docs: Corpus
) -> None:
    async with a_fleet(server, tmp_path, python_docs, cap=0, ms_per_1k_tokens=200) as fleet:
        async with anyio.create_task_group() as group:
            for _ in range(2):
                await group.start(fleet.work)

            async def at_work() -> bool:
                return fleet.billed > 2_000

            await until(at_work, within_s=60)
            fleet.dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": 100}))
            await until(fleet.stopped, within_s=60)
            group.cancel_scope.cancel()
        assert fleet.dataset.owed()
