"""`embedmill purge`: documents erased from everything that holds them, with proof."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import click
from anyio import to_thread

from scheduler.queue import Queue

from ..dataset.dataset import Dataset
from ..dataset.purging import Purge, PurgeReport
from ..documents import MAX_ID_BYTES
from ..errors import ConfigurationError
from .options import output_options, shared
from .purge_collections import Collections
from .services import open_service

_SHOWN_IDS = 5
_EPILOG = """\b
Exit status: 0 gone, and looked for everywhere; 2 nothing was erased; 3 some are in shards that are not committed
yet: run it again when they are; 4 something still holds them. It is always right to run it again.
"""


class _Several(click.Option):
    """Given several times on the command line; once in the environment or in `embedmill.toml`."""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        return self.resolve_envvar_value(ctx)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return super().type_cast_value(ctx, (value,) if isinstance(value, str) else value)


@dataclass(frozen=True, slots=True)
class _Reach:
    """What is purged beside the dataset. redis: the server and the namespace; only_these: leave other collections alone."""

    milvus: Sequence[str]
    collection: str | None
    only_these: bool
    redis: tuple[str, str] | None


@click.command(epilog=_EPILOG)
@click.argument("dataset", metavar="DATASET")
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option(
    "--ids-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Ids, one a line, beside those on the command line.",
)
@click.option(
    "--milvus",
    cls=_Several,
    multiple=True,
    envvar="EMBEDMILL_MILVUS",
    show_envvar=True,
    metavar="URI",
    help="A Milvus that the dataset was loaded into, with all its collections of the dataset; may be given again.",
)
@click.option("--no-milvus", is_flag=True, help="Leave alone the collections that --milvus does not name.")
@shared("collection")
@shared("redis", "namespace")
@output_options
def purge(
    dataset: str, ids: Sequence[str], ids_file: Path | None, milvus: Sequence[str], no_milvus: bool,
    collection: str | None, redis: str | None, namespace: str, as_json: bool,
) -> int:  # fmt: skip
    """Erase documents from DATASET: texts, vectors, every version, failures and rejects; with --milvus from the collections
    there, with --redis from the queue's dead letters. What cannot be reached is said before anything is erased.

    The ID of a document that was split stands for all of its passages. Take it out of the source, too, or the next push
    brings it back. What the provider keeps, and backups, are not reached from here.
    """
    wanted = [*ids, *(_read_ids(ids_file) if ids_file else ())]
    if not wanted:
        raise ConfigurationError("nothing to purge: name ids, or a file of them with --ids-file FILE")
    for id_ in wanted:
        _require_id(id_)
    reach = _Reach(milvus, collection, no_milvus, (redis, namespace) if redis else None)
    return anyio.run(_purge, Dataset.open(dataset), sorted(set(wanted)), reach, as_json)


def _read_ids(path: Path) -> list[str]:
    try:
        # Windows' editors begin a file with a mark that is no part of the first id.
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}") from error


def _require_id(id_: str) -> None:
    """Raises ConfigurationError for what can be no document's id, as from a variable that is not set."""
    try:
        size = len(id_.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{id_!r} is not UTF-8: put the ids into a file, and name it with --ids-file"
        ) from None
    if not 0 < size <= MAX_ID_BYTES or any(ord(character) < 32 for character in id_):
        raise ConfigurationError(
            f"{id_!r:.80} can be no document's id: these have 1 to {MAX_ID_BYTES} bytes, and no control characters"
        )


async def _purge(dataset: Dataset, ids: Sequence[str], reach: _Reach, as_json: bool) -> int:
    async with AsyncExitStack() as stack:
        collections = Collections(dataset)
        for uri in dict.fromkeys(reach.milvus):
            await collections.open(stack, uri, reach.collection)
        if collections.missed and not reach.only_these:
            raise ConfigurationError(
                f"nothing was erased: {dataset.url} was loaded into {', '.join(map(str, collections.missed))}; "
                "name each with --milvus URI, or say --no-milvus to leave it as it is"
            )
        queue = None
        if reach.redis is not None:
            connection = await stack.enter_async_context(open_service(reach.redis[0]))
            queue = Queue(connection, namespace=reach.redis[1])
        work = Purge(dataset, ids)
        report = await to_thread.run_sync(work.run)
        in_milvus = await collections.erase(work, ids)
        if queue is not None:
            await _purge_queue(dataset, work, queue)
    status = 4 if report.left or in_milvus else 3 if report.owed else 0
    if as_json:
        missed = [str(loaded) for loaded in collections.missed]
        counts = {**report.as_dict(), "left_in_milvus": in_milvus, "not_reached": missed}
        click.echo(json.dumps({"dataset": dataset.url, "status": status, **counts}, ensure_ascii=False))
    else:
        for line in _lines(dataset, report, collections, in_milvus):
            click.echo(line)
    return status


async def _purge_queue(dataset: Dataset, work: Purge, queue: Queue) -> None:
    for job in dataset.jobs():
        letters = await queue.dead_letters(dataset.info.id, job.id)
        purged = await to_thread.run_sync(work.matching, {id_ for id_, _ in letters.values()})
        await queue.forget_dead(dataset.info.id, job.id, [key for key, (id_, _) in letters.items() if id_ in purged])


def _lines(dataset: Dataset, report: PurgeReport, collections: Collections, in_milvus: int | None) -> Iterator[str]:
    places = ", ".join(collections.places)
    yield f"{dataset.url}: {report.found:,} rows held them; {report.rewritten:,} shards were written anew without them"
    if report.unknown:
        shown = ", ".join(report.unknown[:_SHOWN_IDS]) + (", ..." if len(report.unknown) > _SHOWN_IDS else "")
        yield f"nothing held {len(report.unknown):,} of the ids: {shown}"
    if report.owed:
        yield f"{len(report.owed):,} shards that hold some are not committed yet: run it again when they are"
    for key in report.left:
        yield f"  still there: {key}"
    if in_milvus:
        yield f"  still there: {in_milvus:,} of them in {places}"
    if not (report.left or report.owed or in_milvus):
        yield (
            "looked for in every document, marker, reject and index"
            + (f" and in {places}" if places else "")
            + ": gone"
        )
    for loaded in collections.missed:
        yield f"not reached: {loaded}"
