"""`embedmill batches`: what was handed to the provider's batch endpoint, and a person's word where nobody else can tell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from anyio import to_thread

from worker.batch_endpoint import BatchStatus
from worker.embedders.jina import API_BASE
from worker.embedders.jina_batches import JinaBatches, check_batches
from worker.keys import keys_from_environment

from ..dataset.dataset import Dataset
from ..dataset.layout import Job
from ..dataset.submissions import Intent, Submission, Submissions
from ..embedder import EmbedderSpec
from ..errors import ConfigurationError, EmbedmillError
from .options import output_options, shared

_NAME = re.compile(r"(\d{1,8})-(\d{1,4})")


@click.group()
@click.pass_context
def batches(context: click.Context) -> None:
    """Batches of jobs that can wait: list them, or decide about one that is held."""
    context.default_map = dict.fromkeys(batches.commands, context.default_map or {})


@batches.command("list")
@click.argument("job", metavar="[JOB]", required=False)
@shared("to")
@click.option("--all", "also_ended", is_flag=True, help="Those that have ended, too.")
@output_options
def list_(job: str | None, to: str | None, also_ended: bool, as_json: bool) -> int:
    """Show what is with the provider: the submissions of a dataset, or of JOB, and the batches that they became."""
    dataset = open_named(to)
    shown = [one for one in submissions_of(dataset, job) if also_ended or one.is_open]
    if as_json:
        click.echo(json.dumps({"dataset": dataset.url, "submissions": [_record(dataset, one) for one in shown]}))
        return 0
    for one in shown:
        record = _record(dataset, one)
        click.echo("{name}  {state:<10}  {batch}  {passages:,} passages, job {job}, {at}".format(**record))
        for reason in filter(None, (record["reason"],)):
            click.echo(f"    {reason}")
    if not shown:
        click.echo("none" if also_ended else "none open; --all shows those that have ended, too")
    return 0


@batches.command()
@click.argument("submission", metavar="SUBMISSION")
@click.argument("batch_id", metavar="BATCH_ID")
@shared("to")
@output_options
def adopt(submission: str, batch_id: str, to: str | None, as_json: bool) -> int:
    """Say which batch SUBMISSION became.

    Its output is fetched when the job goes on. An output with other passages than those of the submission is never stored.
    """
    dataset = open_named(to)
    found = _undecided(dataset, submission)
    if batch_id in Submissions(dataset).batch_ids():
        raise ConfigurationError(
            f"{batch_id} is known to be another submission's: see `{_command(dataset, 'list')} --all`"
        )
    Submissions(dataset).accept(found.intent, batch_id, by="person")
    Submissions(dataset).unhold(found.intent)
    return _say(dataset, found, f"Submission {found.intent.name} is {batch_id}", "accepted", as_json=as_json)


@batches.command()
@click.argument("submission", metavar="SUBMISSION")
@shared("to")
@output_options
def discard(submission: str, to: str | None, as_json: bool) -> int:
    """Give SUBMISSION up, whatever became of it.

    What it was to embed is sent again when the job goes on. Should the provider have taken it all the same, it is paid
    twice.
    """
    dataset = open_named(to)
    found = _undecided(dataset, submission, also_accepted=True)
    # It may have been billed, and counts against a cap.
    job, batch_id = dataset.admission(found.intent.shard).job, found.accepted.batch_id if found.accepted else ""
    Submissions(dataset).spend(found.intent, batch_id, job=job, tokens=0, unknown_tokens=found.intent.tokens)
    Submissions(dataset).end(found.intent, "discarded", reason="by embedmill batches discard")
    return _say(dataset, found, f"Submission {found.intent.name} is given up", "discarded", as_json=as_json)


def check_batch(spec: EmbedderSpec, batch: bool | None) -> None:
    """Raises ConfigurationError where batches are asked for and cannot be had."""
    if batch:
        check_batches(spec)


def with_mode(job: Job, batch: bool | None) -> Job:
    """The job in the mode that was asked for, if any."""
    return job if batch is None else replace(job, mode="batch" if batch else "direct")


def submissions_of(dataset: Dataset, job: str | None) -> list[Submission]:
    """Those of one job; all without one. Blocking."""
    shards = [shard for shard in dataset.admitted() if job is None or dataset.admission(shard).job == job]
    return Submissions(dataset).of_shards(shards)


async def cancel_batches(dataset: Dataset, job: str, api_base: str | None) -> list[str]:
    """Cancel what a cancelled job has with the provider, as far as this can be done from here; what cannot, in words."""
    found = await to_thread.run_sync(submissions_of, dataset, job)
    opened = [one for one in found if one.is_open and one.accepted is not None]
    left = [f"submission {one.intent.name} was never answered" for one in found if one.is_open and one.accepted is None]
    if not opened:
        return left
    try:
        keys = await to_thread.run_sync(lambda: keys_from_environment().keys)
        endpoints = [JinaBatches(dataset.info.embedder, key=key, api_base=api_base or API_BASE) for key in keys]
    except ConfigurationError as error:
        return [*left, f"{len(opened)} batches go on at the provider: {error}"]
    try:
        for one in opened:
            left += await _cancel_one(endpoints, dataset, one, job=job)
    finally:
        for endpoint in endpoints:
            await endpoint.aclose()
    return left


async def _cancel_one(
    endpoints: Sequence[JinaBatches], dataset: Dataset, submission: Submission, *, job: str
) -> list[str]:
    submissions, intent, accepted = Submissions(dataset), submission.intent, submission.accepted
    assert accepted is not None
    if intent.api_base != endpoints[0].api_base:
        return [f"{accepted.batch_id} is at {intent.api_base}: say --api-base, and cancel again"]
    discard = f"`{_command(dataset, 'discard', intent.name)}` counts it as billed"
    status = await _cancelled(endpoints, intent, accepted.batch_id, otherwise=discard)
    if isinstance(status, str):
        return [status]
    if status.is_open:
        return [f"{accepted.batch_id} is still {status.state}: cancel again, to have noted what it is billed"]
    tokens = status.tokens

    def end() -> None:
        if tokens:
            submissions.spend(intent, accepted.batch_id, job=job, tokens=tokens)
        submissions.end(intent, "cancelled", tokens=tokens, reason="by embedmill cancel")

    await to_thread.run_sync(end)
    return []


async def _cancelled(
    endpoints: Sequence[JinaBatches], intent: Intent, batch_id: str, *, otherwise: str
) -> BatchStatus | str:
    """Its state after that, or in words why it goes on; otherwise: what helps where nobody knows it."""
    trouble = ""
    # The key that it was sent with; else another one of the same owner's may do.
    for endpoint in sorted(endpoints, key=lambda one: one.key_id != intent.key):
        try:
            status = await endpoint.cancel(batch_id)
        except EmbedmillError as error:
            trouble = trouble or f"{batch_id} was not cancelled: {error}"
            continue
        if status is not None:
            return status
    if trouble:
        return trouble
    if intent.key in {one.key_id for one in endpoints}:
        return f"the provider does not know {batch_id} any more: {otherwise}"
    return (
        f"{batch_id} may go on at the provider: it was sent with another API key ({intent.key}), and those at hand do not"
        f" know it. Set JINA_API_KEY to the one that sent it and cancel again; or {otherwise}"
    )


def _command(dataset: Dataset, *arguments: str) -> str:
    """An `embedmill batches` command as it is to be typed."""
    return shlex.join(["embedmill", "batches", *arguments, "--to", dataset.url])


def open_named(to: str | None) -> Dataset:
    """The dataset of `--to`. Raises ConfigurationError where none was named."""
    if to is None:
        raise ConfigurationError("name the dataset with --to DATASET")
    return Dataset.open(to)


def _undecided(dataset: Dataset, name: str, *, also_accepted: bool = False) -> Submission:
    match = _NAME.fullmatch(name)
    of_shard = Submissions(dataset).of_shard(int(match[1])) if match else []
    found = next((one for one in of_shard if match and one.intent.number == int(match[2])), None)
    if found is None:
        raise ConfigurationError(f"{dataset.url} has no submission {name}: see `{_command(dataset, 'list')}`")
    if not found.is_open or (found.accepted is not None and not also_accepted):
        raise ConfigurationError(f"submission {name} is {found.state}: there is nothing to decide")
    return found


def _record(dataset: Dataset, submission: Submission) -> dict[str, Any]:
    intent, accepted, held, ended = submission.intent, submission.accepted, submission.held, submission.ended
    reason = ended.reason if ended else held.reason if held else ""
    return {
        "name": intent.name,
        "job": dataset.admission(intent.shard).job,
        "shard": intent.shard,
        "state": submission.state,
        "batch": accepted.batch_id if accepted else "-",
        "candidates": list(held.candidates) if held else [],
        "passages": len(intent.row_numbers()),
        "tokens": ended.tokens if ended else None,
        "at": intent.at,
        "reason": reason,
    }


def _say(dataset: Dataset, submission: Submission, words: str, state: str, *, as_json: bool) -> int:
    job = dataset.admission(submission.intent.shard).job
    if as_json:
        click.echo(json.dumps({"submission": submission.intent.name, "state": state, "job": job}))
    else:
        resume = shlex.join(["embedmill", "resume", job, "--to", dataset.url])
        click.echo(f"{words}; run the same command again, or `{resume}`, to go on.")
    return 0
