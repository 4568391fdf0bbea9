"""`embedmill verify`: accepted = embedded + failed + deleted = stored = loaded, with an exit status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import click
from anyio import to_thread

from scheduler.queue import Queue
from scheduler.reconcile import reconcile

from ..dataset.dataset import Dataset
from ..dataset.layout import ZARR_ARRAY_KEY
from ..dataset.verification import DatasetReport, verify_dataset
from ..dataset.work_lock import work_alone
from ..errors import CorruptStore, StorageError
from .options import output_options, shared
from .services import open_service

if TYPE_CHECKING:
    from loader.verification import TargetReport

_SHOWN_PROBLEMS = 20
_EPILOG = """\b
Exit status: 0 everything holds; 1 it holds, and some documents failed; 3 some are not embedded yet;
4 a difference was found.
"""


@click.command(epilog=_EPILOG)
@click.argument("dataset", metavar="DATASET")
@shared("milvus", "collection")
@shared("redis", "namespace")
@click.option(
    "--repair",
    is_flag=True,
    help="Put damaged vectors aside; with --milvus, load again what differs there; with --redis, queue what is owed.",
)
@output_options
def verify(
    dataset: str, milvus: str | None, collection: str | None, redis: str | None, namespace: str,
    repair: bool, as_json: bool,
) -> int:  # fmt: skip
    """Read DATASET back and hold documents, markers and vectors against each other; with --milvus, what it serves too.

    With --repair and --redis, a queue that was lost is rebuilt: the tasks of what is owed, and which jobs are paused.
    """
    queue = (redis, namespace) if repair and redis else None
    return anyio.run(_verify, Dataset.open(dataset), milvus, collection, queue, repair, as_json)


async def _verify(
    dataset: Dataset,
    milvus: str | None,
    collection: str | None,
    queue: tuple[str, str] | None,
    repair: bool,
    as_json: bool,
) -> int:
    with suppress(StorageError, CorruptStore):
        # Whoever looks may raise the shape: between two passes of a scheduler it lags behind what is committed.
        await to_thread.run_sync(dataset.publish_shape)
    report = await to_thread.run_sync(verify_dataset, dataset)
    if repair:
        report.set_aside = await to_thread.run_sync(_put_aside, dataset, report)
    queued = await _rebuild(dataset, *queue) if queue is not None else None
    target = await _verify_target(dataset, milvus, collection, repair=repair) if milvus and report.passed else None
    status = _status(report, target)
    if as_json:
        milvus_record = target.as_dict() if target else None
        click.echo(json.dumps({"status": status, **report.as_dict(), "queued": queued, "milvus": milvus_record}))
        return status
    _print_dataset(dataset, report)
    if queued is not None:
        click.echo(f"queue: {queued:,} shards were owed and not queued; they are now")
    if target is not None:
        for line in _target_lines(milvus or "", target):
            click.echo(line)
    return status


async def _rebuild(dataset: Dataset, redis: str, namespace: str) -> int:
    """Queue what is owed and has no task; how many tasks."""
    async with open_service(redis) as connection:
        return await reconcile(dataset, Queue(connection, namespace=namespace))


async def _verify_target(dataset: Dataset, milvus: str, collection: str | None, *, repair: bool) -> TargetReport:
    from loader.service import Loader
    from loader.target import MilvusTarget
    from loader.verification import verify_target

    target = MilvusTarget(milvus, collection=collection)
    try:
        report = await verify_target(dataset, target)
        if report.ok or not repair:
            return report
        async with Loader(dataset, target) as loader:
            await loader.repair(report)
            return await verify_target(dataset, target)
    finally:
        await target.aclose()


def _put_aside(dataset: Dataset, report: DatasetReport) -> list[int]:
    """Damaged shards that embedding again mends; nobody may be at work on the dataset meanwhile. The metadata for other
    readers is written anew, unless the shards do not fit `dataset.json` either: then that may be what is wrong."""
    shards = sorted({problem.shard for problem in report.problems if problem.shard is not None})
    if any(problem.object == ZARR_ARRAY_KEY for problem in report.problems):
        if shards:
            return []
        with work_alone(dataset):
            dataset.mend_array()
            report.mended.append(ZARR_ARRAY_KEY)
    if shards:
        with work_alone(dataset):
            for shard in shards:
                dataset.put_aside(shard)
    return shards


def _status(report: DatasetReport, target: TargetReport | None) -> int:
    if not report.passed or report.summary is None or (target is not None and not target.ok):
        return 4
    if report.summary.owed:
        return 3
    return int(report.summary.open_failures > 0)


def _target_lines(milvus: str, target: TargetReport) -> Iterator[str]:
    yield (
        f"{milvus}, collection {target.collection}: {target.expected:,} expected, {target.found:,} found;"
        f" {len(target.missing):,} missing, {len(target.extra_ids):,} that should not be there, {len(target.stale):,} stale"
    )
    yield f"{target.sampled:,} vectors read back, {len(target.different):,} of them different"
    if not target.ok:
        yield f"  for example: {json.dumps(target.as_dict()['examples'], ensure_ascii=False)}"


def _print_dataset(dataset: Dataset, report: DatasetReport) -> None:
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        click.echo(f"  {problem.object}: {problem.text}")
    if len(report.problems) > _SHOWN_PROBLEMS:
        click.echo(f"  ... and {len(report.problems) - _SHOWN_PROBLEMS:,} more; --json gives all")
    summary = report.summary
    if summary is None:
        click.echo(f"{dataset.url}: differences found: {len(report.problems):,}")
        for key in report.mended:
            click.echo(f"written anew: {dataset.url}/{key}; verify again")
        if report.set_aside:
            click.echo(f"put aside into {dataset.url}/damaged: shards {', '.join(map(str, report.set_aside))}; run the")
            click.echo("same `embedmill run` again, which embeds them anew, and verify again")
        elif any(problem.shard is not None for problem in report.problems):
            click.echo("`embedmill verify --repair` puts damaged vectors aside, to be embedded again by the next run")
        return
    click.echo(
        f"{dataset.url}: {summary.admitted:,} accepted = {summary.embedded:,} embedded + {summary.failed_words}"
        f" + {summary.deleted:,} deleted + {summary.cancelled:,} cancelled + {summary.owed:,} owed"
        + (f" + {summary.removed:,} removed" if summary.removed else "")
    )
    click.echo(f"every checksum holds ({report.bytes_read / 1e6:,.1f} MB read back in {summary.shards:,} shards)")
