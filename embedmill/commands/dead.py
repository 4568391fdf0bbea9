"""`embedmill dead`: the passages of a job that failed, tried again or put out of sight.

What is listed stands in the dataset: markers say what failed and why, documents have the text. Redis is told of retries.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import anyio
import click
from anyio import to_thread
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scheduler.queue import Queue
from scheduler.reconcile import make_tasks
from scheduler.retries import Retried, retry_letters

from ..dataset.dataset import Dataset
from ..dataset.dead_letters import FailedRow, Place, drop_letters, failed_rows
from ..dataset.layout import Failure, Marker
from ..errors import ConfigurationError, CorruptStore
from .jobs import open_queue, open_with_job, require_job
from .options import output_options, shared
from .run import require_not_stopped

_WIDEST_TABLE = 200
_job = click.argument("job", metavar="JOB")
_code = click.option("--code", metavar="CODE", help="Only failures of this kind, e.g. input_rejected, gate, poison.")


def _choosing(function: Callable[..., int]) -> Callable[..., int]:
    """The arguments of what is done to chosen dead letters of a job."""
    chosen = click.option("--all", "take_all", is_flag=True, help="All that are open.")(output_options(function))
    return _job(click.argument("ids", nargs=-1, metavar="[ID]...")(shared("to", "redis", "namespace")(_code(chosen))))


@click.group()
@click.pass_context
def dead(context: click.Context) -> None:
    """Look at the passages of a job that failed, try them again, or drop them."""
    context.default_map = dict.fromkeys(dead.commands, context.default_map or {})


@dead.command("list")
@_job
@shared("to")
@_code
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Show so many.")
@click.option("--all", "show_all", is_flag=True, help="Also those that were dropped, or have a newer version.")
@output_options
def list_(job: str, to: str | None, code: str | None, limit: int, show_all: bool, as_json: bool) -> int:
    """The dead letters of JOB: id, version, code and cause."""
    letters = _letters(open_with_job(to, job), job, code=code)
    shown = letters if show_all else [letter for letter in letters if letter.state == "open"]
    if as_json:
        records = [_as_record(letter) for letter in shown[:limit]]
        click.echo(json.dumps({"job": job, "total": len(shown), "letters": records}, ensure_ascii=False))
        return 0
    _print_table(shown[:limit], with_state=show_all)
    if len(shown) > limit:
        click.echo(f"... and {len(shown) - limit:,} more; --limit shows them")
    hidden = len(letters) - len(shown)
    note = f" ({hidden:,} dropped or superseded; --all shows them)" if hidden else ""
    click.echo(f"{len(shown):,} dead letters of job {job}{note}", err=bool(shown))
    return 0


@dead.command()
@_job
@click.argument("id_", metavar="ID")
@shared("to")
@output_options
def show(job: str, id_: str, to: str | None, as_json: bool) -> int:
    """The whole document of a dead letter, with its cause and every attempt at it."""
    dataset = open_with_job(to, job)
    letters = _choose(_letters(dataset, job), (id_,), job=job)
    records = [_whole(dataset, letter) for letter in letters]
    if as_json:
        click.echo(json.dumps({"job": job, "letters": records}, ensure_ascii=False))
        return 0
    for record in records:
        for line in _whole_lines(record):
            click.echo(line)
    return 0


@dead.command()
@_choosing
def retry(
    job: str, ids: tuple[str, ...], to: str | None, redis: str | None, namespace: str,
    code: str | None, take_all: bool, as_json: bool,
) -> int:  # fmt: skip
    """Admit dead letters once more, under the same id and version.

    What is being tried again already, or has a newer version, is passed over.
    """
    dataset = open_with_job(to, job)
    require_not_stopped(dataset, require_job(dataset, job))
    letters = _select(dataset, job, ids, code=code, take_all=take_all)
    return anyio.run(_retry, dataset, job, letters, redis, namespace, as_json)


@dead.command()
@_choosing
def drop(
    job: str, ids: tuple[str, ...], to: str | None, redis: str | None, namespace: str,
    code: str | None, take_all: bool, as_json: bool,
) -> int:  # fmt: skip
    """Say that dead letters were seen: they stay failed in the dataset, and no longer count as open."""
    dataset = open_with_job(to, job)
    letters = _select(dataset, job, ids, code=code, take_all=take_all)
    dropped = anyio.run(_drop, dataset, job, letters, redis, namespace)
    click.echo(json.dumps({"job": job, "dropped": dropped}) if as_json else f"{dropped:,} dead letters dropped")
    return 0


def _letters(dataset: Dataset, job: str, *, code: str | None = None) -> list[FailedRow]:
    return [
        letter
        for letter in failed_rows(dataset)
        if code in (None, letter.failure.code) and dataset.admission(letter.shard).job == job
    ]


def _select(dataset: Dataset, job: str, ids: tuple[str, ...], *, code: str | None, take_all: bool) -> list[FailedRow]:
    """The letters that were named, or all open ones."""
    if bool(ids) == (take_all or code is not None):
        raise ConfigurationError("name the dead letters by their ids, or take --all or --code CODE")
    letters = _letters(dataset, job, code=code)
    return _choose(letters, ids, job=job) if ids else [letter for letter in letters if letter.state == "open"]


def _choose(letters: list[FailedRow], ids: tuple[str, ...], *, job: str) -> list[FailedRow]:
    unknown = set(ids).difference(letter.failure.id for letter in letters)
    if unknown:
        raise ConfigurationError(
            f"job {job} has no dead letter {min(unknown)!r}: `embedmill dead list` shows what it has"
        )
    return [letter for letter in letters if letter.failure.id in ids]


async def _retry(
    dataset: Dataset, job: str, letters: list[FailedRow], redis: str | None, namespace: str, as_json: bool
) -> int:
    async with open_queue(redis, namespace) as queue:
        result = await to_thread.run_sync(_admit, dataset, letters, job)
        if queue is not None:
            await queue.enqueue(await to_thread.run_sync(make_tasks, dataset, result.shards))
            await _forget(queue, dataset, job, letters)
    if as_json:
        record = {"job": job, "retried": result.passages, "passed_over": result.passed_over, "shards": result.shards}
        click.echo(json.dumps({**record, "redis_told": queue is not None}))
        return 0
    click.echo(f"{result.passages:,} passages of job {job} are tried again")
    if result.passed_over:
        click.echo(f"{result.passed_over:,} passed over: tried again already, or a newer version was pushed")
    if queue is None and result.passages:
        click.echo("Without --redis, the scheduler or the next run queues them.")
    return 0


async def _drop(dataset: Dataset, job: str, letters: list[FailedRow], redis: str | None, namespace: str) -> int:
    async with open_queue(redis, namespace) as queue:
        dropped = await to_thread.run_sync(drop_letters, dataset, letters)
        if queue is not None:
            await _forget(queue, dataset, job, letters)
    return dropped


async def _forget(queue: Queue, dataset: Dataset, job: str, letters: list[FailedRow]) -> None:
    """What Redis still counts of them, at whatever place they failed."""
    wanted = {(letter.failure.id, letter.failure.version) for letter in letters}
    known = await queue.dead_letters(dataset.info.id, job)
    await queue.forget_dead(dataset.info.id, job, [key for key, letter in known.items() if letter in wanted])


def _admit(dataset: Dataset, letters: list[FailedRow], job: str) -> Retried:
    with closing(dataset.open_index()) as index:
        return retry_letters(dataset, index, letters, job=job)


def _as_record(letter: FailedRow) -> dict[str, Any]:
    return {**letter.failure.as_dict(), "shard": letter.shard, "state": letter.state}


def _whole(dataset: Dataset, letter: FailedRow) -> dict[str, Any]:
    """Everything that is known of one letter."""
    row = dataset.documents(letter.shard)[0].slice(letter.failure.row, 1).to_pylist()[0]
    document = {name: row[name] for name in ("text", "group", "job")}
    attempts = [
        {"shard": marker.shard, "committed_at": marker.committed_at, "worker": marker.worker, **failure.as_dict()}
        for marker, failure in _attempts(dataset, letter.place)
    ]
    return {**_as_record(letter), **document, "metadata": json.loads(row["metadata"] or "{}"), "attempts": attempts}


def _attempts(dataset: Dataset, place: Place | None) -> Iterator[tuple[Marker, Failure]]:
    """The failure at this place, and before it those that it tried again; the newest first."""
    while place is not None:
        shard, row = place
        marker = dataset.marker(shard)
        failure = next((f for f in marker.failures if f.row == row), None) if marker else None
        if marker is None or failure is None:
            raise CorruptStore(f"{dataset.url}: row {row} of shard {shard} was tried again, and did not fail")
        yield marker, failure
        place = marker.retries.get(row)


def _whole_lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"{record['id']} (version {record['version']}), {record['state']}"
    for attempt in record["attempts"]:
        yield f"  {attempt['committed_at']}  {attempt['code']}: {attempt['cause']}"
        yield f"    shard {attempt['shard']}, row {attempt['row']}, worker {attempt['worker']}"
    if record["metadata"]:
        yield f"  metadata {json.dumps(record['metadata'], ensure_ascii=False)}"
    yield f"  text ({len(record['text'] or ''):,} characters)"
    yield record["text"] or ""


def _print_table(letters: list[FailedRow], *, with_state: bool) -> None:
    if not letters:
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDEST_TABLE, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "version", "code", *(["state"] if with_state else []), "cause"):
        table.add_column(name, overflow="fold" if name in ("id", "cause") else "ellipsis", no_wrap=name == "code")
    for letter in letters:
        f = letter.failure
        state = [letter.state] if with_state else []
        # Ids and causes are other people's text: never markup.
        table.add_row(*map(_plain, (f.id, str(f.version), f.code, *state, f.cause)))
    console.print(table)


def _plain(text: str) -> Text:
    return Text(" ".join(text.split()))
