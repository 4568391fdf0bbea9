"""`embedmill create`, `pause`, `resume` and `cancel`: what a dataset's jobs are, and whether they go on.

The record in the dataset is the truth and is changed first; Redis is told so that it works at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, get_args

import anyio
import click
from anyio import to_thread

from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from worker.cancelling import cancel_shard
from worker.service import worker_name

from ..dataset.dataset import Dataset
from ..dataset.layout import CANCELLED, EMBEDDED, Job, TooLong
from ..dataset.submissions import Submissions
from ..errors import CapReached, ConfigurationError
from ..messages import Lane
from .batches import cancel_batches, check_batch, open_named, with_mode
from .capping import at_cap, with_cap
from .embedders import ModelChoice, make_spec
from .long_passages import settle_too_long
from .options import check_job_name, output_options, shared
from .services import open_service

_TELL_LATER = "Without --redis, workers notice when they take their next task."


@click.command()
@click.argument("dataset", metavar="DATASET")
@shared("model", "dimensions", "task", "late_chunking", "job", "max_tokens", "too_long", "batch")
@click.option("--lane", type=click.Choice(get_args(Lane)), help="Live goes before bulk.  [default: bulk]")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="As stored.  [default: float32]")
@output_options
def create(
    dataset: str,
    job: str,
    max_tokens: int | None,
    too_long: TooLong | None,
    batch: bool | None,
    lane: Lane | None,
    dtype: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Make DATASET and a job in it, without documents: for services that should find it before the first push.

    What is there already stays as it is, but for the cap, `--too-long` and `--batch`; a different model, lane or dtype is
    refused.
    """
    check_job_name(job)
    embedder = make_spec(ModelChoice(**options))
    check_batch(embedder, batch)
    if too_long == "split":
        raise ConfigurationError(
            "--too-long split is what `run` and `push` do with texts as they read them: say it there"
        )
    too_long = settle_too_long(too_long, to=dataset, job=job, late_chunking=embedder.late_chunking)
    made = Dataset.open_or_create(dataset, embedder=embedder, dtype=dtype or "float32")
    if dtype not in (None, made.info.dtype):
        raise ConfigurationError(f"{dataset} stores {made.info.dtype}: leave --dtype out, or make a new dataset")
    record = made.job(job) or made.change_job(job, lambda new: replace(new, lane=lane or "bulk"))
    if lane not in (None, record.lane):
        raise ConfigurationError(
            f"job {job} of {dataset} is in the lane {record.lane}: leave --lane out, or name a new job"
        )
    record = made.change_job(
        job, lambda known: replace(with_mode(with_cap(known, max_tokens), batch), too_long=too_long)
    )
    if as_json:
        shown = {"dataset": made.url, "id": made.info.id, "fingerprint": made.info.embedder.fingerprint}
        capped = {"max_tokens": record.max_tokens or None}
        click.echo(json.dumps({**shown, "job": job, "lane": record.lane, "state": record.state, **capped}))
    else:
        cap = f", at most {record.max_tokens:,} tokens" if record.max_tokens else ""
        click.echo(f"{made.url}: {made.info.embedder.model}, job {job} ({record.lane}, {record.state}{cap})")
    return 0


@click.command()
@click.argument("job", metavar="JOB")
@shared("to", "redis", "namespace")
@output_options
def pause(job: str, to: str | None, redis: str | None, namespace: str, as_json: bool) -> int:
    """Let JOB stand still: nothing of it is taken, and what is in flight is kept and handed back."""
    return anyio.run(_pause, open_with_job(to, job), job, redis, namespace, as_json)


@click.command()
@click.argument("job", metavar="JOB")
@shared("to", "redis", "namespace", "max_tokens")
@output_options
def resume(job: str, to: str | None, redis: str | None, namespace: str, max_tokens: int | None, as_json: bool) -> int:
    """Let JOB go on, whoever paused or cancelled it. What was cancelled stays so until it is pushed again.

    A job that has reached its cap needs a larger one.
    """
    return anyio.run(_resume, open_with_job(to, job), job, redis, namespace, max_tokens, as_json)


@click.command()
@click.argument("job", metavar="JOB")
@shared("to", "redis", "namespace", "api_base")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def cancel(
    job: str, to: str | None, redis: str | None, namespace: str, api_base: str | None, yes: bool, as_json: bool
) -> int:
    """Give up what JOB still owes: results so far are stored, the other passages count as cancelled.

    What it has at the provider's batch endpoint is cancelled there, where the key is at hand.

    Pushing the same documents again, once the job is resumed or under another one, embeds them anew.
    """
    dataset = open_with_job(to, job)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError(f"cancelling job {job} cannot be undone: add --yes to do it without being asked")
        click.confirm(f"Cancel job {job} of {dataset.url}? This cannot be undone", abort=True, err=True)
    return anyio.run(_cancel, dataset, job, redis, namespace, api_base, as_json)


def open_with_job(to: str | None, job: str) -> Dataset:
    """The dataset that was named. Raises ConfigurationError where none was, and for one without this job."""
    check_job_name(job)
    dataset = open_named(to)
    require_job(dataset, job)
    return dataset


def require_job(dataset: Dataset, job: str) -> Job:
    """Raises ConfigurationError for a job that the dataset does not have."""
    known = dataset.job(job)
    if known is None:
        names = ", ".join(other.id for other in dataset.jobs()) or "none"
        raise ConfigurationError(f"{dataset.url} has no job {job}; its jobs: {names}")
    return known


async def _pause(dataset: Dataset, job: str, redis: str | None, namespace: str, as_json: bool) -> int:
    def stop(known: Job) -> Job:
        if known.state == "cancelled":
            raise ConfigurationError(f"job {job} of {dataset.url} is cancelled: there is nothing to pause")
        return replace(known, state="paused", reason="by embedmill pause", stopped_by="user")

    async with open_queue(redis, namespace) as queue:
        await to_thread.run_sync(dataset.change_job, job, stop)
        if queue is not None:
            await queue.pause(dataset.info.id, job)
    again = f"`embedmill resume {job} --to {shlex.quote(dataset.url)}` lets it go on."
    opened = len(await to_thread.run_sync(Submissions(dataset).open_of, job))
    if opened:
        again += (
            f" Its batches at the provider ({opened}) go on, and have to be fetched within the provider's 24 hours."
        )
    record = {"job": job, "state": "paused", "open_batches": opened}
    _say(f"Job {job} is paused; {again}", queue, record, as_json=as_json)
    return 0


async def _resume(
    dataset: Dataset, job: str, redis: str | None, namespace: str, max_tokens: int | None, as_json: bool
) -> int:
    reached: CapReached | None = None

    def go_on(known: Job) -> Job:
        nonlocal reached
        known = with_cap(known, max_tokens)
        reached = at_cap(dataset, known)
        return known if reached is not None else replace(known, state="running", reason="", stopped_by="")

    queued = 0
    async with open_queue(redis, namespace) as queue:
        await to_thread.run_sync(dataset.change_job, job, go_on)
        if reached is not None:
            raise reached
        if queue is not None:
            queued = await reconcile(dataset, queue)
    words = f"; {queued:,} shards queued" if queued else ""
    record = {"job": job, "state": "running", "queued": queued}
    _say(
        f"Job {job} goes on{words}.", queue, record, as_json=as_json, later="Without --redis, the scheduler queues it."
    )
    return 0


async def _cancel(
    dataset: Dataset, job: str, redis: str | None, namespace: str, api_base: str | None, as_json: bool
) -> int:
    def give_up(known: Job) -> Job:
        return replace(known, state="cancelled", reason="by embedmill cancel", stopped_by="user")

    async with open_queue(redis, namespace) as queue:
        await to_thread.run_sync(dataset.change_job, job, give_up)
        if queue is not None:
            await queue.forget(dataset.info.id, job)
        cancelled, kept = await to_thread.run_sync(_cancel_owed, dataset, job)
        if queue is not None:
            # A push that was at work may have queued more meanwhile.
            await queue.forget(dataset.info.id, job)
    for left in await cancel_batches(dataset, job, api_base):
        click.echo(f"embedmill: {left}", err=True)
    done = f"Job {job} is cancelled: {cancelled:,} passages given up, {kept:,} kept that were embedded."
    _say(done, queue, {"job": job, "state": "cancelled", "cancelled": cancelled, "kept": kept}, as_json=as_json)
    return 0


def _cancel_owed(dataset: Dataset, job: str) -> tuple[int, int]:
    """Commit every shard that the job owes; how many of their passages are cancelled, how many embedded."""
    who, cancelled, kept = worker_name(), 0, 0
    for shard in dataset.owed():
        if dataset.admission(shard).job == job:
            marker = cancel_shard(dataset, shard, who=who)
            cancelled += marker.count(CANCELLED)
            kept += marker.count(EMBEDDED)
    dataset.publish_shape()
    return cancelled, kept


@asynccontextmanager
async def open_queue(redis: str | None, namespace: str) -> AsyncIterator[Queue | None]:
    """The queue to be told; None without --redis."""
    if redis is None:
        yield None
        return
    async with open_service(redis) as connection:
        yield Queue(connection, namespace=namespace)


def _say(text: str, queue: Queue | None, record: dict[str, object], *, as_json: bool, later: str = _TELL_LATER) -> None:
    if as_json:
        click.echo(json.dumps({**record, "redis_told": queue is not None}))
        return
    click.echo(text)
    if queue is None:
        click.echo(later)
