"""`embedmill scheduler`, `worker` and `loader`: the services that operators run, on a Redis that they share."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import click
from anyio import to_thread

from embedmill.connection import Connection
from scheduler.queue import Queue
from scheduler.service import check_durability, run_scheduler
from worker.service import Worker

from ..dataset.dataset import Dataset
from ..dataset.layout import ZARR_ARRAY_KEY
from ..dataset.store import open_store
from ..dataset.work_lock import dataset_folder, work_together
from ..errors import ConfigurationError
from .embedders import ModelChoice, make_budget, make_embedder
from .options import shared
from .pipeline import open_connection

_log = logging.getLogger("embedmill")
_DATASET_POLL_S = 2.0


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...")
@shared("redis", "namespace")
def scheduler(datasets: tuple[str, ...], redis: str | None, namespace: str) -> int:
    """Keep the queue in Redis true to DATASET...: whatever is admitted and not committed gets a task."""
    _log_to_stderr()
    return anyio.run(_scheduler, datasets, require_redis(redis), namespace)


@click.command()
@shared("redis", "namespace", "model", "dimensions", "task", "api_base", "tier", "rpm", "tpm", "concurrency")
def worker(redis: str | None, namespace: str, **options: Any) -> int:
    """Take tasks from Redis and embed them, until SIGTERM. Start as many as you like, anywhere that sees the datasets."""
    _log_to_stderr()
    return anyio.run(_worker, require_redis(redis), namespace, ModelChoice(**options))


@click.command()
@shared("to", "milvus", "collection", "redis", "namespace")
def loader(to: str | None, milvus: str | None, collection: str | None, redis: str | None, namespace: str) -> int:
    """Load the shards of a dataset into Milvus as they are committed, until SIGTERM."""
    _log_to_stderr()
    if to is None or milvus is None:
        raise ConfigurationError("name the dataset with --to DATASET and its target with --milvus URI")
    return anyio.run(_loader, to, milvus, collection, require_redis(redis), namespace)


def require_redis(redis: str | None) -> str:
    if redis is None:
        raise ConfigurationError(
            "name a server with --redis URL or EMBEDMILL_REDIS, for example redis://localhost:6379/0"
        )
    return redis


async def _scheduler(datasets: tuple[str, ...], redis: str, namespace: str) -> int:
    stopping = anyio.Event()
    async with open_service(redis) as connection, until_signal(stopping.set), anyio.create_task_group() as group:
        for url in datasets:
            group.start_soon(_schedule, url, Queue(connection, namespace=namespace), stopping)
    return 0


async def _schedule(url: str, queue: Queue, stopping: anyio.Event) -> None:
    dataset = await open_when_there(url, stopping)
    if dataset is not None:
        _log.info("keeping the queue true to %s", dataset.url)
        await run_scheduler([dataset], queue, stopping=stopping)


async def _worker(redis: str, namespace: str, choice: ModelChoice) -> int:
    embedder = await to_thread.run_sync(make_embedder, choice)
    try:
        async with open_service(redis) as connection, AsyncExitStack() as locks:

            def claim(dataset: Dataset) -> None:
                locks.enter_context(work_together(dataset_folder(dataset)))

            queue = Queue(connection, namespace=namespace)
            budget = make_budget(choice, connection, namespace=namespace)
            service = Worker(queue, embedder, budget=budget, grace_s=25, on_open=claim)
            _log.info("worker for %s on %s", choice.model, connection.shown)
            async with until_signal(service.stop):
                await service.run(on_commit=lambda shard: _log.info("shard %d committed", shard))
    finally:
        await embedder.aclose()
    return 0


async def _loader(to: str, milvus: str, collection: str | None, redis: str, namespace: str) -> int:
    from loader.service import Loader
    from loader.target import MilvusTarget

    stopping = anyio.Event()
    async with open_service(redis) as connection, until_signal(stopping.set):
        dataset = await open_when_there(to, stopping)
        if dataset is None:
            return 0
        async with Loader(dataset, MilvusTarget(milvus, collection=collection)) as service:
            _log.info("loading %s into collection %s of %s", to, service.collection, service.target.address.shown)
            await service.follow(Queue(connection, namespace=namespace), stopping)
            _log.info("stopped; %d rows loaded", service.counts.rows_upserted)
    return 0


async def open_when_there(url: str, stopping: anyio.Event) -> Dataset | None:
    """The dataset, waited for while nobody has pushed to it yet; None when stopped before that.

    Services start in any order, often before the first push.
    """
    store, said = open_store(url), False
    # The array's metadata is the last object of a new dataset.
    while not await to_thread.run_sync(store.exists, ZARR_ARRAY_KEY):
        if not said:
            _log.info("waiting for %s: the first `embedmill push` or `run` --to %s makes it", store.url, url)
            said = True
        with anyio.move_on_after(_DATASET_POLL_S):
            await stopping.wait()
        if stopping.is_set():
            return None
    return await to_thread.run_sync(Dataset.open, url)


@asynccontextmanager
async def open_service(redis: str) -> AsyncIterator[Connection]:
    """A server that may be trusted with a queue."""
    async with open_connection(redis) as connection:
        check_durability(await connection.check(), url=connection.shown)
        yield connection


@asynccontextmanager
async def until_signal(stop: Callable[[], object]) -> AsyncIterator[None]:
    """Call `stop` at the first SIGTERM or SIGINT; cancel the body at the second."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                first = True
                async for _ in signals:
                    if not first:
                        group.cancel_scope.cancel()
                        return
                    first = False
                    stop()

        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    _log.setLevel(logging.INFO)
    # Milvus Lite's own server logs a traceback for every call that it does not know, and pymilvus tries such calls.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
