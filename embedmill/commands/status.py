"""`embedmill status`: where a dataset stands, and what the queue and its workers are doing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

import anyio
import click

from embedmill.connection import Connection
from scheduler.queue import Queue
from worker.checkpoints import count_kept

from ..dataset.dataset import Dataset
from ..dataset.dead_letters import FailedRow, failed_rows
from ..dataset.layout import Job
from ..dataset.summary import DatasetSummary, shards_of, summarize
from ..errors import ConfigurationError
from .billing import price_lines
from .capping import spent_of
from .fleet import Fleet, Rates, fleet_lines, fleet_record, look_at, rates_of, time_left
from .jobs import require_job
from .options import check_job_name, output_options, shared
from .watch import place_words, watch

_SHOWN_FAILURES = 20
_RETRY_S = 5.0


@click.command()
@click.argument("dataset", metavar="[DATASET]", required=False)
@click.argument("job", metavar="[JOB]", required=False)
@shared("redis", "namespace")
@click.option("--failed", is_flag=True, help="List the documents that failed, and why.")
@click.option("--watch", "watching", is_flag=True, help="Go on showing it, until Ctrl-C.")
@click.option("--every", "every_s", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds.")
@output_options
def status(
    dataset: str | None, job: str | None, redis: str | None, namespace: str,
    failed: bool, watching: bool, every_s: float, as_json: bool,
) -> int:  # fmt: skip
    """How many passages of DATASET are embedded, failed and owed; with --redis, the backlog, the workers and their pace.

    With JOB: of that job alone. Without DATASET: everything in the namespace of --redis.
    """
    opened = Dataset.open(dataset) if dataset is not None else None
    if opened is None and redis is None:
        raise ConfigurationError("name a DATASET, or a queue with --redis URL")
    if opened is not None and job is not None:
        check_job_name(job)
        require_job(opened, job)
    if watching:
        if as_json:
            raise ConfigurationError("--watch is for people: ask for --json again and again instead")
        return anyio.run(_watch, opened, job, redis, namespace, every_s)
    fleet, rates = anyio.run(_look_once, opened, job, redis, namespace) if redis else (None, Rates())
    if as_json:
        click.echo(json.dumps(_as_record(opened, job, fleet, rates), ensure_ascii=False))
        return 0
    for line in _lines(opened, job, fleet, rates):
        click.echo(line)
    if failed and opened is not None:
        for line in _failure_lines(opened, job):
            click.echo(line)
    return 0


@asynccontextmanager
async def _open_queue(redis: str, namespace: str) -> AsyncIterator[Queue]:
    connection = Connection(redis, retry_for_s=_RETRY_S)
    try:
        await connection.check()
        yield Queue(connection, namespace=namespace)
    finally:
        await connection.aclose()


async def _look_once(dataset: Dataset | None, job: str | None, redis: str, namespace: str) -> tuple[Fleet, Rates]:
    async with _open_queue(redis, namespace) as queue:
        dataset_id = dataset.info.id if dataset else None
        fleet = await look_at(queue, dataset_id=dataset_id, job=job)
    return fleet, rates_of(fleet, dataset_id=dataset_id, job=job)


async def _watch(dataset: Dataset | None, job: str | None, redis: str | None, namespace: str, every_s: float) -> int:
    if redis is None:
        await watch(dataset, None, job=job, every_s=every_s)
    else:
        async with _open_queue(redis, namespace) as queue:
            await watch(dataset, queue, job=job, every_s=every_s)
    return 0


def _lines(dataset: Dataset | None, job: str | None, fleet: Fleet | None, rates: Rates) -> Iterator[str]:
    owed = fleet.backlog()["passages"] if fleet else 0
    if dataset is not None:
        summary, kept = _counted(dataset, job)
        owed = summary.owed - kept
        yield from _dataset_lines(place_words(dataset, job), summary, kept)
        yield from price_lines(dataset.info.embedder.model, summary.billed_tokens)
        jobs = _jobs(dataset, job)
        spent = spent_of(dataset, jobs)
        for known in jobs:
            if known.max_tokens:
                yield f"  cap         {spent[known.id]:,} of {known.max_tokens:,} tokens of job {known.id}"
            if known.state != "running":
                yield f"  job         {known.id} is {known.state}: {known.reason}"
    if fleet is not None:
        yield from fleet_lines(fleet, rates)
        left = time_left(int(owed), rates)
        if left:
            yield f"  time left   about {left}"


def _counted(dataset: Dataset, job: str | None) -> tuple[DatasetSummary, int]:
    """What a dataset or a job of it holds, and how many owed rows are in checkpoints."""
    return summarize(dataset, job=job), count_kept(dataset, shards_of(dataset, dataset.owed(), job=job))


def _dataset_lines(place: str, summary: DatasetSummary, kept: int) -> Iterator[str]:
    done = summary.admitted - summary.owed + kept
    percent = 100 * done / summary.admitted if summary.admitted else 100
    yield f"{place}: {done:,} of {summary.admitted:,} passages done ({percent:.0f} %)"
    yield f"  embedded    {summary.embedded:,} ({summary.truncated:,} cut to the model's limit)"
    yield f"  failed      {summary.failed_words.replace(' failed', '', 1)}"
    if summary.cancelled:
        yield f"  cancelled   {summary.cancelled:,}"
    in_checkpoints = f", of which {kept:,} are in checkpoints" if kept else ""
    yield f"  owed        {summary.owed:,}{in_checkpoints}"
    yield f"  tokens      {summary.billed_tokens:,} billed"
    yield f"  shards      {summary.committed_shards:,} committed of {summary.shards:,}"


def _jobs(dataset: Dataset, job: str | None) -> Sequence[Job]:
    return [known for known in dataset.jobs() if job in (None, known.id)]


def _letters(dataset: Dataset, job: str | None) -> list[FailedRow]:
    return [letter for letter in failed_rows(dataset) if job in (None, dataset.admission(letter.shard).job)]


def _failure_lines(dataset: Dataset, job: str | None) -> Iterator[str]:
    letters = [letter for letter in _letters(dataset, job) if letter.state == "open"]
    for letter in islice(letters, _SHOWN_FAILURES):
        failure = letter.failure
        yield f"  {failure.id} (version {failure.version}): {failure.code}: {failure.cause}"
    if len(letters) > _SHOWN_FAILURES:
        yield f"  ... and {len(letters) - _SHOWN_FAILURES:,} more; --json gives all"


def _as_record(dataset: Dataset | None, job: str | None, fleet: Fleet | None, rates: Rates) -> dict[str, Any]:
    record: dict[str, Any] = {}
    owed = fleet.backlog()["passages"] if fleet else 0
    if dataset is not None:
        summary, kept = _counted(dataset, job)
        owed = summary.owed - kept
        jobs = _jobs(dataset, job)
        spent = spent_of(dataset, jobs)
        record = {
            "dataset": dataset.url,
            "passages": summary.as_dict(),
            "in_checkpoints": kept,
            "failures": [{**letter.failure.as_dict(), "state": letter.state} for letter in _letters(dataset, job)],
            "jobs": [
                {
                    "id": known.id,
                    "lane": known.lane,
                    "state": known.state,
                    "reason": known.reason,
                    "max_tokens": known.max_tokens or None,
                    "capped_tokens": spent.get(known.id),
                }
                for known in jobs
            ],
        }
    if fleet is None:
        return {**record, "queue": None, "backlog": None}
    queue = {
        "ready": sum(depth.ready for depth in fleet.jobs),
        "leased": fleet.leased,
        "delayed": sum(depth.delayed for depth in fleet.jobs),
        "dead": sum(depth.dead for depth in fleet.jobs),
    }
    seconds = round(owed / rates.passages_s) if owed and rates.passages_s > 0 else None
    return {**record, "queue": queue, **fleet_record(fleet, rates), "seconds_left": seconds}
