"""`embedmill loader`: the service that keeps a collection up with a dataset."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import asdict
from functools import partial

import anyio
import click

from .options import output_options, shared


@click.command()
@shared("milvus", "collection", "to", "redis", "namespace")
@output_options
def loader(
    *, milvus: str | None, collection: str | None, to: str | None, redis: str | None, namespace: str, as_json: bool
) -> None:
    """Load shards as they are committed, until SIGTERM or Ctrl-C."""
    if not milvus or not to or not redis:
        missing = [name for name, value in (("--milvus", milvus), ("--to", to), ("--redis", redis)) if not value]
        raise click.UsageError(f"{', '.join(missing)} missing: the loader follows a dataset by a Redis into a Milvus")
    follow = partial(_follow, milvus=milvus, collection=collection, redis=redis, namespace=namespace, as_json=as_json)
    anyio.run(follow, to)


async def _follow(url: str, *, milvus: str, collection: str | None, redis: str, namespace: str, as_json: bool) -> None:
    from loader.service import Loader
    from loader.target import MilvusTarget
    from scheduler.connection import Connection
    from scheduler.queue import Queue

    from ..dataset.dataset import Dataset

    stop = anyio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    connection = Connection(redis)
    try:
        await connection.check()
        async with Loader(Dataset.open(url), MilvusTarget(milvus, collection=collection)) as service:
            click.echo(
                f"loading {url} into collection {service.collection} of {service.target.address.shown}", err=True
            )
            await service.follow(Queue(connection, namespace=namespace), stop)
            counts = asdict(service.counts)
    finally:
        await connection.aclose()
    click.echo(json.dumps(counts) if as_json else f"stopped: {counts['rows_upserted']:,} rows loaded")
