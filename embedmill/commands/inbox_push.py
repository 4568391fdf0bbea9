"""`embedmill push --inbox`: sources through Redis into an inbox, as any other producer does, with the sources' own keys.

Batches have the key PUSH-KEY/NUMBER and hold the same documents whenever the same source is read, so an interrupted push is
run again without doubling anything.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import click
from anyio import to_thread

from embedmill.connection import Connection
from scheduler.queue import Queue

from ..documents import Reject, SourceDocument
from ..errors import ConfigurationError, EmbedmillError, StorageError
from ..producer import Producer
from ..sources import FieldRules, Source, open_source
from ..sources.rejects import RejectFile
from .options import make_chunking, split_names
from .services import Stop, open_service, until_signal
from .standard_input import make_standard_input_stoppable

_BATCH_DOCUMENTS = 64
_BATCH_BYTES = 256 * 1024
_REJECTS = Path("embedmill-rejects")


async def push_to_inbox(sources: tuple[str, ...], redis: str, options: dict[str, Any], as_json: bool) -> int:
    """Push everything and wait for the receipts. The exit status."""
    rules = FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"])
    standard_input = make_standard_input_stoppable() if "-" in sources else None
    opened = [
        await to_thread.run_sync(partial(open_source, argument, rules=rules, chunking=make_chunking(options)))
        for argument in sources
    ]
    stop = Stop()
    if standard_input is not None:
        stop.then(standard_input.stop)
    rejected: dict[Path, int] = {}
    producer: Producer
    async with open_service(redis) as connection, until_signal(stop):
        producer = Producer(
            connection,
            inbox=options["inbox"],
            namespace=options["namespace"],
            job=options["job"],
            lane=options["lane"] or "bulk",
        )
        await _say_if_unserved(connection, options)
        with suppress(_Stopped):
            async with producer:
                await _push_all(opened, producer, stop.asked, options, rejected)
                if not as_json:
                    click.echo(f"all is in the inbox {options['inbox']}; waiting until it is admitted", err=True)
                await _until_stopped(producer.flush, stop.asked)
    finished = not stop.asked.is_set()
    totals = producer.receipts
    names = ("admitted", "updated", "unchanged", "deleted", "repeated")
    counts = {name: getattr(totals, name) for name in names}
    refused = totals.rejected + sum(rejected.values())
    if as_json:
        click.echo(json.dumps({"inbox": options["inbox"], **counts, "rejected": refused, "finished": finished}))
    else:
        click.echo(f"{options['inbox']}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        for path, count in rejected.items():
            click.echo(f"  rejected    {count:,}, listed with their lines in {path}")
        for id_, reason in totals.rejects[:10]:
            click.echo(f"  rejected    {id_ or 'a document'}: {reason}")
        if not finished:
            click.echo("stopped before the end: run the same command again to go on", err=True)
    return 3 if not finished else int(refused > 0)


async def _say_if_unserved(connection: Connection, options: dict[str, Any]) -> None:
    """The wait may be for ever when the name is wrong. A user who may only push cannot know."""
    try:
        inboxes = await Queue(connection, namespace=options["namespace"]).inboxes()
    except EmbedmillError:
        return
    served = sorted(inbox.name for inbox in inboxes if inbox.is_served)
    if options["inbox"] not in served:
        others = f"there are: {', '.join(served)}" if served else "there is none at all"
        click.echo(
            f"embedmill: no scheduler admits an inbox {options['inbox']} on this Redis now ({others}); waiting for one",
            err=True,
        )


class _Stopped(Exception):
    """By a signal: what is in the inbox is admitted all the same, without us."""


async def _push_all(
    sources: list[Source],
    producer: Producer,
    stopping: anyio.Event,
    options: dict[str, Any],
    rejected: dict[Path, int],
) -> None:
    left: int | None = options["limit"]
    for source in sources:
        rejects = RejectFile(_REJECTS / f"{source.push_key[:8]}.jsonl")
        await to_thread.run_sync(rejects.resume, None)
        records = source.read()
        number = 0
        with closing(rejects):
            while left != 0:
                lines, found, taken = await to_thread.run_sync(_take_batch, records, left)
                if not lines and not found:
                    break
                if found and options["strict"]:
                    raise ConfigurationError(f"{found[0].place}: {found[0].reason}; --strict stops here")
                await to_thread.run_sync(_keep, rejects, found)
                if rejects.count:
                    rejected[rejects.path] = rejects.count
                if lines:
                    number += 1
                    await _until_stopped(
                        partial(producer.add_batch, lines, key=f"{source.push_key}/{number}"), stopping
                    )
                left = None if left is None else left - taken


def _take_batch(
    records: Iterator[SourceDocument | Reject], limit: int | None
) -> tuple[list[dict[str, Any]], list[Reject], int]:
    """The next batch, always the same for the same source: its documents, what is none, and how many documents end in it."""
    documents: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    size = taken = 0
    for record in records:
        if isinstance(record, Reject):
            rejects.append(record)
        else:
            document = {"id": record.id, "text": record.text, "metadata": json.loads(record.metadata)}
            if record.group is not None:
                document |= {"group": record.group, "last": record.last}
            documents.append(document)
            size += len(record.text.encode())
            taken += record.last
        if len(documents) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES or taken == limit or len(rejects) >= 1000:
            break
    return documents, rejects, taken


def _keep(file: RejectFile, rejects: list[Reject]) -> None:
    try:
        for reject in rejects:
            file.add(reject)
        file.flush()
    except OSError as error:
        raise StorageError(f"cannot write {file.path}: {error.strerror}") from error


async def _until_stopped(act: Callable[[], Awaitable[None]], stopping: anyio.Event) -> None:
    """Raises _Stopped when the signal comes first."""
    trouble: EmbedmillError | None = None
    async with anyio.create_task_group() as group:

        async def end() -> None:
            await stopping.wait()
            group.cancel_scope.cancel()

        group.start_soon(end)
        try:
            await act()
        except EmbedmillError as error:
            trouble = error
        group.cancel_scope.cancel()
    if trouble is not None:
        raise trouble
    if stopping.is_set():
        raise _Stopped
