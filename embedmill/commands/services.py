"""`embedmill scheduler`, `worker` and `loader`: the services that operators run, on a Redis that they share."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import click
from anyio import to_thread

from embedmill.connection import Connection, Unreachable
from scheduler.queue import LEASE_S, Queue
from scheduler.retention import KEEP_DAYS, drop_regularly
from scheduler.service import check_durability, serve_dataset
from worker.service import Worker

from ..dataset.dataset import Dataset
from ..dataset.layout import ZARR_ARRAY_KEY
from ..dataset.store import open_store
from ..dataset.work_lock import work_together
from ..errors import ConfigurationError, EmbedmillError
from ..inbox import check_inbox_name
from .embedders import ModelChoice, make_budget, make_embedder
from .options import shared
from .pipeline import open_connection

_log = logging.getLogger("embedmill")
_DATASET_POLL_S = 2.0
_DATASET_RETRY_S = 5.0
_REDIS_POLL_S = 1.0
# A call that is under way when a service is stopped waits at most so long for a Redis that is gone.
_STOPPING_S = 3.0


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="[NAME=]DATASET...")
@shared("redis", "namespace")
@click.option(
    "--linger", "linger_s", type=click.FloatRange(min=0), default=2.0, show_default=True, metavar="SECONDS",
    help="How long a document of an inbox may wait for its shard to become full.",
)  # fmt: skip
@click.option(
    "--keep", "keep_days", type=click.FloatRange(min=0), default=KEEP_DAYS, show_default=True, metavar="DAYS",
    help="How long Redis keeps the record of a job that has nothing to do.",
)  # fmt: skip
def scheduler(datasets: tuple[str, ...], redis: str | None, namespace: str, linger_s: float, keep_days: float) -> int:
    """Admit the inbox of each DATASET, and keep the queue in Redis true to it.

    The inbox has the name of the dataset's folder, unless NAME says otherwise. Whatever is admitted and not committed gets a
    task.
    """
    _log_to_stderr()
    return anyio.run(_scheduler, name_inboxes(datasets), require_redis(redis), namespace, linger_s, keep_days)


@click.command()
@shared("redis", "namespace", "model", "dimensions", "task", "late_chunking", "tokenizer")
@shared("api_base", "tier", "rpm", "tpm", "concurrency")
@click.option(
    "--lease", "lease_s", type=click.FloatRange(min=2, max=3600), default=LEASE_S, show_default=True, metavar="SECONDS",
    help="How long a dead worker's shards wait for the next one; extended four times as often.",
)  # fmt: skip
def worker(redis: str | None, namespace: str, lease_s: float, **options: Any) -> int:
    """Take tasks from Redis and embed them, until SIGTERM. Start as many as you like, anywhere that sees the datasets."""
    _log_to_stderr()
    return anyio.run(_worker, require_redis(redis), namespace, lease_s, ModelChoice(**options))


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


def name_inboxes(datasets: tuple[str, ...]) -> dict[str, str]:
    """Datasets by the name of their inbox. Raises ConfigurationError for a name that two have, or that none can have."""
    named: dict[str, str] = {}
    for argument in datasets:
        name, mark, url = argument.partition("=")
        if not mark or "/" in name:
            name, url = Path(argument).absolute().name, argument
        try:
            check_inbox_name(name)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; name it as in NAME={url}") from None
        if name in named:
            raise ConfigurationError(f"two datasets would share the inbox {name}: name one as in OTHER={url}")
        named[name] = url
    return named


async def _scheduler(inboxes: Mapping[str, str], redis: str, namespace: str, linger_s: float, keep_days: float) -> int:
    stop = Stop()
    async with (
        until_signal(stop),
        open_service_when_there(redis, stop) as connection,
        anyio.create_task_group() as group,
    ):
        if connection is not None:
            queue = Queue(connection, namespace=namespace)
            group.start_soon(partial(drop_regularly, queue, stop.asked, keep_days=keep_days))
            for name, url in inboxes.items():
                serve = partial(_serve, url, connection, inbox=name, namespace=namespace, linger_s=linger_s)
                group.start_soon(serve, stop.asked)
    return 0


async def _serve(
    url: str, connection: Connection, stopping: anyio.Event, *, inbox: str, namespace: str, linger_s: float
) -> None:
    dataset = None
    while dataset is None and not stopping.is_set():
        try:
            dataset = await open_when_there(url, stopping)
        except EmbedmillError as error:
            # The other datasets have no part in it.
            _log.warning("%s: %s; trying again", url, error)
            with anyio.move_on_after(_DATASET_RETRY_S):
                await stopping.wait()
    if dataset is not None:
        _log.info("keeping the queue true to %s; inbox %s", dataset.url, inbox)
        await serve_dataset(dataset, connection, inbox=inbox, namespace=namespace, stopping=stopping, linger_s=linger_s)


async def _worker(redis: str, namespace: str, lease_s: float, choice: ModelChoice) -> int:
    embedder = await to_thread.run_sync(make_embedder, choice)
    try:
        stop = Stop()
        async with until_signal(stop), open_service_when_there(redis, stop) as connection, AsyncExitStack() as locks:
            if connection is None:
                return 0

            def claim(dataset: Dataset) -> None:
                locks.enter_context(work_together(dataset))

            queue = Queue(connection, namespace=namespace, lease_s=lease_s)
            budget = make_budget(choice, connection, namespace=namespace)
            service = Worker(queue, embedder, budget=budget, grace_s=25, on_open=claim, patient=True)
            _log.info("worker for %s on %s", choice.model, connection.shown)
            stop.then(service.stop)
            await service.run(on_commit=lambda shard: _log.info("shard %d committed", shard))
    finally:
        await embedder.aclose()
    return 0


async def _loader(to: str, milvus: str, collection: str | None, redis: str, namespace: str) -> int:
    from loader.service import Loader
    from loader.target import MilvusTarget

    stop = Stop()
    async with until_signal(stop), open_service_when_there(redis, stop) as connection:
        dataset = await open_when_there(to, stop.asked)
        if dataset is None or connection is None:
            return 0
        async with Loader(dataset, MilvusTarget(milvus, collection=collection)) as service:
            _log.info("loading %s into collection %s of %s", to, service.collection, service.target.address.shown)
            await service.follow(Queue(connection, namespace=namespace), stop.asked)
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


class Stop:
    """The first signal: `asked` is set, and what was given to `then` is called."""

    def __init__(self) -> None:
        self.asked = anyio.Event()
        self._then: list[Callable[[], object]] = []

    def then(self, act: Callable[[], object]) -> None:
        """Call `act` at the first signal, or now, when that was before."""
        self._then.append(act)
        if self.asked.is_set():
            act()

    def __call__(self) -> None:
        self.asked.set()
        for act in self._then:
            act()


@asynccontextmanager
async def open_service(redis: str) -> AsyncIterator[Connection]:
    """A server that may be trusted with a queue."""
    async with open_connection(redis) as connection:
        check_durability(await connection.check(), url=connection.shown)
        yield connection


@asynccontextmanager
async def open_service_when_there(redis: str, stop: Stop) -> AsyncIterator[Connection | None]:
    """The same for what operators run, in any order: waits while no server answers; None when stopped before that."""
    connection = Connection(redis)
    try:
        server = await _server_when_there(connection, stop.asked)
        if server is None:
            yield None
            return
        check_durability(server, url=connection.shown)
        # Whoever must end soon cannot wait for a server that is gone.
        stop.then(lambda: connection.give_up_after(_STOPPING_S))
        yield connection
    finally:
        await connection.aclose()


async def _server_when_there(connection: Connection, stopping: anyio.Event) -> dict[str, str] | None:
    said = False
    while not stopping.is_set():
        try:
            server = await connection.check()
        except Unreachable as error:
            if not said:
                _log.warning("waiting for Redis at %s: %s", connection.shown, error.reason)
                said = True
        else:
            if said:
                _log.info("Redis at %s is there", connection.shown)
            return server
        with anyio.move_on_after(_REDIS_POLL_S):
            await stopping.wait()
    return None


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
