"""`embedmill load`: a dataset into Milvus, without Redis; run it again and it goes on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import anyio
import click

from .options import output_options, shared

if TYPE_CHECKING:
    from loader.service import Loader

_SHOW_EVERY_S = 2.0


@click.command()
@click.argument("dataset")
@shared("milvus", "collection")
@output_options
def load(dataset: str, milvus: str | None, collection: str | None, as_json: bool) -> None:
    """Load what is committed in DATASET and not yet in the collection.

    Stopped or killed, the same command goes on where it was.
    """
    if not milvus:
        raise click.UsageError("--milvus URI is missing: a path like ./wiki/milvus.db, or http://HOST:19530")
    anyio.run(_load, dataset, milvus, collection, as_json)


async def _load(url: str, milvus: str, collection: str | None, as_json: bool) -> None:
    from loader.service import Loader
    from loader.target import MilvusTarget

    from ..dataset.dataset import Dataset

    dataset = Dataset.open(url)
    started = time.monotonic()
    async with Loader(dataset, MilvusTarget(milvus, collection=collection)) as loader:
        async with anyio.create_task_group() as group:
            if not as_json:
                group.start_soon(_show, loader, started)
            await loader.sweep()
            group.cancel_scope.cancel()
        await loader.finish()
        rows = await loader.target.count()
        record: dict[str, Any] = {
            "dataset": dataset.url,
            "milvus": loader.target.address.shown,
            "collection": loader.collection,
            "rows": rows,
            **asdict(loader.counts),
            "seconds": round(time.monotonic() - started, 3),
        }
    owed = len(dataset.owed())
    click.echo(json.dumps({**record, "shards_owed": owed}) if as_json else "\n".join(_summary(record, owed=owed)))


async def _show(loader: Loader, started: float) -> None:
    while True:
        await anyio.sleep(_SHOW_EVERY_S)
        rows = loader.counts.rows_upserted
        click.echo(f"{rows:,} rows sent, {rows / (time.monotonic() - started):,.0f} a second", err=True)


def _summary(record: dict[str, Any], *, owed: int) -> list[str]:
    done = (
        f"Loaded {record['shards_loaded']} shards in {record['seconds']:.1f} s: {record['rows_upserted']:,} rows upserted,"
        f" {record['rows_deleted']:,} deleted, {record['rows_superseded']:,} superseded,"
        f" {record['rows_skipped']:,} without a vector."
    )
    holds = f"Collection {record['collection']} of {record['milvus']} holds {record['rows']:,} rows."
    lines = [done if record["shards_loaded"] else "Nothing to load: everything committed was there already.", holds]
    if record["rows_cut"]:
        lines.append(
            f"{record['rows_cut']:,} rows are longer than Milvus takes and were cut there; the dataset has them whole."
        )
    if owed:
        lines.append(f"{owed} shards are not embedded yet: run the same command again when they are.")
    return lines
