"""`embedmill push`: sources into the dataset's document log and onto the queue, for workers elsewhere."""

from __future__ import annotations

import json
from typing import Any

import anyio
import click
from anyio import to_thread

from scheduler.admission import Admitter
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.reconcile import reconcile

from ..dataset.dataset import Dataset
from ..dataset.work_lock import dataset_folder
from ..errors import ConfigurationError
from ..sources import FieldRules, open_source
from .embedders import ModelChoice, make_embedder
from .options import check_job_name, output_options, shared, split_names
from .run import remember_job
from .services import open_service, require_redis, until_signal
from .standard_input import make_standard_input_stoppable


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@shared("to", "redis", "namespace", "model", "dimensions", "task", "text_field", "id_field", "job")
@click.option("--limit", type=click.IntRange(min=1), help="Take so many documents only: a first bite.")
@output_options
def push(sources: tuple[str, ...], to: str | None, redis: str | None, as_json: bool, **options: Any) -> int:
    """Admit SOURCE... into a dataset and queue what has to be embedded, for workers on the same Redis.

    Interrupted, the same command goes on where it was.
    """
    if to is None:
        raise ConfigurationError("name the dataset with --to DATASET")
    check_job_name(options["job"])
    return anyio.run(_push, sources, to, require_redis(redis), options, as_json)


async def _push(sources: tuple[str, ...], to: str, redis: str, options: dict[str, Any], as_json: bool) -> int:
    rules = FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"])
    standard_input = make_standard_input_stoppable() if "-" in sources else None
    opened = [open_source(argument, rules=rules) for argument in sources]
    dataset = await to_thread.run_sync(_open_dataset, to, options)
    async with open_service(redis) as connection:
        queue = Queue(connection, namespace=options["namespace"])
        index = await to_thread.run_sync(dataset.open_index)
        remember_job(dataset, options["job"], sources)
        admitter = Admitter(dataset, index, job=options["job"])
        intake = Intake(admitter, queue, rejects=dataset_folder(dataset) / "rejects", limit=options["limit"])
        # Shards that an interrupted push wrote and did not queue.
        await reconcile(dataset, queue)

        def stop() -> None:
            intake.stop()
            if standard_input is not None:
                standard_input.stop()

        async with until_signal(stop):
            await intake.run(opened)
    counts = admitter.counts
    if as_json:
        record = {"new": counts.new, "changed": counts.updated, "unchanged": counts.unchanged}
        click.echo(json.dumps({"dataset": to, **record, "rejected": intake.rejected}))
    else:
        click.echo(
            f"{to}: {counts.new:,} new, {counts.updated:,} changed, {counts.unchanged:,} unchanged documents queued"
        )
        for path, count in intake.reject_files.items():
            click.echo(f"  rejected    {count:,}, listed with their lines in {path}")
    if not intake.finished:
        return 3
    return int(intake.rejected > 0)


def _open_dataset(to: str, options: dict[str, Any]) -> Dataset:
    choice = ModelChoice(options["model"], options["dimensions"], options["task"])
    return Dataset.open_or_create(to, embedder=make_embedder(choice).spec)
