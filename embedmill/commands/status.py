"""`embedmill status`: where a dataset stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

import anyio
import click

from embedmill.connection import Connection
from scheduler.queue import Depth, Queue
from worker.checkpoints import count_kept

from ..dataset.dataset import Dataset
from ..dataset.layout import Failure
from ..dataset.summary import DatasetSummary, summarize
from .options import output_options, shared

_SHOWN_FAILURES = 20


@click.command()
@click.argument("dataset", metavar="DATASET")
@shared("redis", "namespace")
@click.option("--failed", is_flag=True, help="List the documents that failed, and why.")
@output_options
def status(dataset: str, redis: str | None, namespace: str, failed: bool, as_json: bool) -> int:
    """How many passages of DATASET are embedded, failed and owed; with --redis, what its queue holds."""
    opened = Dataset.open(dataset)
    summary = summarize(opened)
    depth = anyio.run(_depth, redis, namespace) if redis else None
    if as_json:
        click.echo(json.dumps(_as_record(opened, summary, depth)))
        return 0
    for line in _lines(opened, summary, depth):
        click.echo(line)
    if failed:
        for line in _failure_lines(opened):
            click.echo(line)
    return 0


async def _depth(redis: str, namespace: str) -> Depth:
    connection = Connection(redis, retry_for_s=5)
    try:
        await connection.check()
        return await Queue(connection, namespace=namespace).depth()
    finally:
        await connection.aclose()


def _lines(dataset: Dataset, summary: DatasetSummary, depth: Depth | None) -> Iterator[str]:
    kept = count_kept(dataset, dataset.owed())
    done = summary.admitted - summary.owed + kept
    percent = 100 * done / summary.admitted if summary.admitted else 100
    yield f"{dataset.url}: {done:,} of {summary.admitted:,} passages done ({percent:.0f} %)"
    yield f"  embedded    {summary.embedded:,} ({summary.truncated:,} cut to the model's limit)"
    yield f"  failed      {summary.failed:,}"
    in_checkpoints = f", of which {kept:,} are in checkpoints" if kept else ""
    yield f"  owed        {summary.owed:,}{in_checkpoints}"
    yield f"  tokens      {summary.billed_tokens:,} billed"
    yield f"  shards      {summary.committed_shards:,} committed of {summary.shards:,}"
    for job in dataset.jobs():
        if job.state != "running":
            yield f"  job         {job.id} is {job.state}: {job.reason}"
    if depth is not None:
        ready = depth.ready_live + depth.ready_bulk
        yield f"  queue       {ready:,} ready, {depth.leased:,} leased, {depth.delayed:,} delayed"


def _failures(dataset: Dataset) -> Iterator[Failure]:
    for shard in dataset.committed():
        marker = dataset.marker(shard)
        if marker is not None:
            yield from marker.failures


def _failure_lines(dataset: Dataset) -> Iterator[str]:
    failures = _failures(dataset)
    for failure in islice(failures, _SHOWN_FAILURES):
        yield f"  {failure.id} (version {failure.version}): {failure.code}: {failure.cause}"
    more = sum(1 for _ in failures)
    if more:
        yield f"  ... and {more:,} more; --json gives all"


def _as_record(dataset: Dataset, summary: DatasetSummary, depth: Depth | None) -> dict[str, object]:
    return {
        "dataset": dataset.url,
        "passages": summary.as_dict(),
        "in_checkpoints": count_kept(dataset, dataset.owed()),
        "failures": [failure.as_dict() for failure in _failures(dataset)],
        "jobs": [{"id": job.id, "state": job.state, "reason": job.reason} for job in dataset.jobs()],
        "queue": None if depth is None else {
            "ready": depth.ready_live + depth.ready_bulk,
            "leased": depth.leased,
            "delayed": depth.delayed,
            "dead": depth.dead,
        },
    }  # fmt: skip
