"""The scheduler: admits inboxes, keeps the queue true to the datasets, and the arrays' shapes true to what is committed.

Trouble with one dataset is logged, and the others go on; it is tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import anyio
from anyio import to_thread

from embedmill.connection import Connection
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.errors import ConfigurationError, EmbedmillError

from .housekeeping import Housekeeping
from .inbox import InboxAdmission
from .queue import Queue
from .reconcile import reconcile

_COMPACT_EVERY_S = 60.0
_log = logging.getLogger("embedmill.scheduler")


def check_durability(server: Mapping[str, str], *, url: str) -> None:
    """Refuse a Redis that may drop keys, and warn of one that forgets at its end. `server` is its INFO."""
    policy = server.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(
            f"Redis at {url} may evict keys (maxmemory-policy {policy}): set it to noeviction, or the queue loses tasks"
        )
    if server.get("aof_enabled") == "0":
        _log.warning("Redis at %s has no append-only file: after a crash the queue is rebuilt from the dataset", url)


async def serve_dataset(
    dataset: Dataset,
    connection: Connection,
    *,
    inbox: str,
    namespace: str,
    stopping: anyio.Event,
    linger_s: float = 2.0,
) -> None:
    """Admit the inbox of this name into the dataset and keep the queue true to it, until `stopping` is set.

    Any number of schedulers may serve one dataset.
    """
    queue = Queue(connection, namespace=namespace)
    admission = InboxAdmission(dataset, queue, connection, name=inbox, namespace=namespace, linger_s=linger_s)
    async with anyio.create_task_group() as group:
        group.start_soon(admission.run, stopping)
        await run_scheduler([dataset], queue, stopping=stopping)


async def run_scheduler(
    datasets: Sequence[Dataset], queue: Queue, *, stopping: anyio.Event, every_s: float = 5.0
) -> None:
    """Reconcile the datasets with the queue, again and again, until `stopping` is set; compact them as they need it."""
    async with anyio.create_task_group() as group:
        for dataset in datasets:
            group.start_soon(_keep_compact, dataset, stopping)
        await _keep_true(datasets, queue, stopping, every_s)


async def _keep_compact(dataset: Dataset, stopping: anyio.Event) -> None:
    while not stopping.is_set():
        with anyio.move_on_after(_COMPACT_EVERY_S):
            await stopping.wait()
            return
        try:
            report = await to_thread.run_sync(partial(compact, dataset, thorough=False, stop=stopping.is_set))
        except EmbedmillError as error:
            # Another scheduler is at it, or the dataset is in trouble, which others say louder.
            _log.debug("%s: not compacted: %s", dataset.url, error)
            continue
        except (OSError, RuntimeError, ValueError):
            _log.exception("%s: unforeseen trouble while compacting; trying again", dataset.url)
            continue
        if report.retired:
            _log.info(
                "%s: compacted %d shards into %d, %d rows are gone",
                dataset.url, report.retired, report.written, report.dropped,
            )  # fmt: skip


async def _keep_true(datasets: Sequence[Dataset], queue: Queue, stopping: anyio.Event, every_s: float) -> None:
    housekeeping = {dataset.url: Housekeeping(dataset) for dataset in datasets}
    while not stopping.is_set():
        for dataset in datasets:
            try:
                added = await reconcile(dataset, queue)
                await to_thread.run_sync(dataset.publish_shape)
                await to_thread.run_sync(housekeeping[dataset.url].sweep)
            except EmbedmillError as error:
                # One dataset's trouble is not the others'.
                _log.warning("%s: %s", dataset.url, error)
                continue
            except (OSError, RuntimeError, ValueError):
                _log.exception("%s: unforeseen trouble; trying again", dataset.url)
                continue
            if added:
                _log.info("%s: %d shards were owed and not queued", dataset.url, added)
        with anyio.move_on_after(every_s):
            await stopping.wait()
