"""`embedmill purge`: documents erased from everything that holds them, with proof."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import click
from anyio import to_thread

from scheduler.queue import Queue

from ..dataset import layout
from ..dataset.dataset import Dataset
from ..dataset.purging import Purge, PurgeReport
from ..errors import ConfigurationError
from ..messages import dead_letter_key
from .options import output_options, shared
from .services import open_service

_EPILOG = """\b
Exit status: 0 gone, and looked for everywhere; 3 some are in shards that are not committed yet: run it again when
they are; 4 something still holds them.
"""


@click.command(epilog=_EPILOG)
@click.argument("dataset", metavar="DATASET")
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option(
    "--ids-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Ids, one a line, beside those on the command line.",
)
@shared("milvus", "collection")
@shared("redis", "namespace")
@output_options
def purge(
    dataset: str, ids: Sequence[str], ids_file: Path | None, milvus: str | None, collection: str | None,
    redis: str | None, namespace: str, as_json: bool,
) -> int:  # fmt: skip
    """Erase documents from DATASET: texts, vectors, every version, failures and rejects; with --milvus from the collection,
    with --redis from the queue's dead letters.

    The ID of a document that was split stands for all of its passages. Take it out of the source, too, or the next push
    brings it back. What the provider keeps, and backups, are not reached from here.
    """
    wanted = [*ids, *(_read_ids(ids_file) if ids_file else ())]
    if not wanted:
        raise ConfigurationError("nothing to purge: name ids, or a file of them with --ids-file FILE")
    return anyio.run(
        _purge, Dataset.open(dataset), wanted, milvus, collection, (redis, namespace) if redis else None, as_json
    )


def _read_ids(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}") from error


async def _purge(
    dataset: Dataset,
    ids: Sequence[str],
    milvus: str | None,
    collection: str | None,
    queue: tuple[str, str] | None,
    as_json: bool,
) -> int:
    work = Purge(dataset, ids)
    report = await to_thread.run_sync(work.run)
    everything = sorted({*ids, *work.passages})
    in_milvus = await _purge_collection(dataset, everything, milvus, collection) if milvus else None
    if queue is not None:
        await _purge_queue(dataset, report, *queue)
    status = 4 if report.left or in_milvus else 3 if report.owed else 0
    if as_json:
        record = {"dataset": dataset.url, "status": status, **report.as_dict(), "left_in_milvus": in_milvus}
        click.echo(json.dumps(record, ensure_ascii=False))
    else:
        for line in _lines(dataset, report, in_milvus, milvus):
            click.echo(line)
    return status


async def _purge_collection(dataset: Dataset, ids: Sequence[str], milvus: str, collection: str | None) -> int:
    """How many of the ids are there after all."""
    from loader.description import default_collection
    from loader.target import open_target

    name = collection or default_collection(dataset.url)
    async with open_target(milvus, collection=name, must_exist=True) as target:
        if await target.describe(name) is None:
            raise ConfigurationError(f"{milvus} has no collection {name}: name another one with --collection NAME")
        await target.make_searchable()
        await target.delete(ids)
        await target.flush()
        await target.compact()
        return len(await target.vectors(ids))


async def _purge_queue(dataset: Dataset, report: PurgeReport, redis: str, namespace: str) -> None:
    async with open_service(redis) as connection:
        queue = Queue(connection, namespace=namespace)
        for job in dataset.jobs():
            keys = [dead_letter_key(dataset.url, *place) for place in report.failures]
            await queue.forget_dead(dataset.info.id, job.id, keys)


def _lines(dataset: Dataset, report: PurgeReport, in_milvus: int | None, milvus: str | None) -> Iterator[str]:
    yield f"{dataset.url}: {report.found:,} rows held them; {report.rewritten:,} shards were written anew without them"
    if report.owed:
        yield f"{len(report.owed):,} shards that hold some are not committed yet: run it again when they are"
    for key in report.left:
        yield f"  still there: {key}"
    if in_milvus:
        yield f"  still there: {in_milvus:,} of them in {milvus}"
    if not (report.left or report.owed or in_milvus):
        yield (
            "looked for in every document, marker, reject and index"
            + (f" and in {milvus}" if milvus else "")
            + ": gone"
        )
    loaded = dataset.store.names(layout.LOADS_FOLDER)
    if loaded and not milvus:
        yield f"this dataset was loaded into {', '.join(loaded)}: purge there too, with --milvus URI"
