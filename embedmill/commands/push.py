"""`embedmill push`: sources into the dataset's document log and onto the queue, for workers elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import click
from anyio import to_thread
from click.core import ParameterSource

from embedmill.connection import Connection
from scheduler.admission import Admitter
from scheduler.caps import Caps
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from worker.service import worker_name
from worker.spend import LoggedCap, SpendLog

from ..dataset.dataset import Dataset
from ..dataset.layout import DATASET_KEY
from ..dataset.store import open_store
from ..dataset.work_lock import dataset_folder
from ..embedder import EmbedderSpec, is_local
from ..errors import ConfigurationError
from ..messages import Lane
from ..sources import FieldRules, open_source
from .batches import check_batch
from .embedders import LARGEST_TIER, REHEARSAL, ModelChoice, make_budget, make_embedder, make_spec
from .inbox_push import push_to_inbox
from .long_passages import make_splitting, settle_too_long
from .options import check_job_name, output_options, shared, split_names
from .probing import check_disk, probe_provider
from .report import say_remarks
from .run import remember_job
from .services import open_service, require_redis, until_signal
from .standard_input import make_standard_input_stoppable


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@shared("to", "redis", "namespace", "model", "dimensions", "task", "api_base", "text_field", "id_field", "job")
@shared("max_tokens", "batch")
@shared("chunk", "chunk_overlap", "late_chunking", "too_long", "strict")
@click.option(
    "--inbox", metavar="NAME", help="Push through Redis, for a scheduler to admit: needs no dataset and no model."
)
@click.option("--lane", type=click.Choice(["live", "bulk"]), help="Lane of a new job; else bulk.")
@click.option("--limit", type=click.IntRange(min=1), help="Admit so many new or changed documents only: a first bite.")
@output_options
def push(sources: tuple[str, ...], to: str | None, redis: str | None, as_json: bool, **options: Any) -> int:
    """Admit SOURCE... into a dataset and queue what has to be embedded, for workers on the same Redis.

    Interrupted, the same command goes on where it was.
    """
    check_job_name(options["job"])
    context = click.get_current_context()
    options["model_named"] = any(
        context.get_parameter_source(name) is not ParameterSource.DEFAULT
        for name in ("model", "dimensions", "task", "late_chunking")
    )
    if options["inbox"] is not None:
        if options["too_long"] is not None:
            raise ConfigurationError("--too-long belongs to a job of a dataset: say it with `embedmill create`")
        if options["batch"] is not None:
            raise ConfigurationError("--batch belongs to a job of a dataset: say it with `embedmill create`")
        if options["max_tokens"] is not None:
            raise ConfigurationError("--max-tokens belongs to a job of a dataset: say it with `embedmill create`")
        if to is not None:
            raise ConfigurationError("--inbox and --to exclude each other: the scheduler knows the dataset of an inbox")
        return anyio.run(push_to_inbox, sources, require_redis(redis), options, as_json)
    if to is None:
        raise ConfigurationError("name the dataset with --to DATASET, or an inbox with --inbox NAME")
    return anyio.run(_push, sources, to, require_redis(redis), options, as_json)


async def _push(sources: tuple[str, ...], to: str, redis: str, options: dict[str, Any], as_json: bool) -> int:
    rules = FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"])
    standard_input = make_standard_input_stoppable() if "-" in sources else None
    spec = await to_thread.run_sync(_spec, to, options)
    check_batch(spec, options["batch"])
    too_long = settle_too_long(options["too_long"], to=to, job=options["job"], late_chunking=spec.late_chunking)
    chunking = make_splitting(options, too_long, model=spec.model, late_chunking=spec.late_chunking)
    opened = [
        await to_thread.run_sync(partial(open_source, argument, rules=rules, chunking=chunking)) for argument in sources
    ]
    dataset = await to_thread.run_sync(partial(Dataset.open_or_create, to, embedder=spec))
    async with open_service(redis) as connection:
        queue = Queue(connection, namespace=options["namespace"])
        index = await to_thread.run_sync(dataset.open_index)
        _begin_job(dataset, options["job"], options["lane"])
        job = remember_job(
            dataset, options["job"], sources,
            batch=options["batch"], max_tokens=options["max_tokens"], too_long=too_long,
        )  # fmt: skip
        await _probe(dataset, connection, options)
        warning = await to_thread.run_sync(
            partial(check_disk, dataset, sources, rules=rules, chunking=chunking, index=index, limit=options["limit"])
        )
        if warning:
            click.echo(f"embedmill: {warning}", err=True)
        admitter = Admitter(dataset, index, job=job.id, lane=job.lane)
        rejects = dataset_folder(dataset) / "rejects"
        intake = Intake(admitter, queue, rejects=rejects, limit=options["limit"], strict=options["strict"])
        # Shards that an interrupted push wrote and did not queue.
        await reconcile(dataset, queue)

        def stop() -> None:
            intake.stop()
            if standard_input is not None:
                standard_input.stop()

        async with until_signal(stop):
            try:
                await intake.run(opened)
            except ConfigurationError:
                # With --strict: of the block that ended it, shards may have been closed and not queued.
                await reconcile(dataset, queue)
                raise
    # Interrupted, what waited for its shard is read again by whoever goes on.
    counts, dropped = admitter.counts, admitter.waiting
    new, changed = counts.new - dropped["new"], counts.updated - dropped["updated"]
    if as_json:
        record = {"new": new, "changed": changed, "unchanged": counts.unchanged, "finished": intake.finished}
        click.echo(json.dumps({"dataset": to, **record, "rejected": intake.rejected, "remarks": intake.remarks}))
    else:
        click.echo(f"{to}: {new:,} new, {changed:,} changed, {counts.unchanged:,} unchanged documents queued")
        for path, count in intake.reject_files.items():
            click.echo(f"  rejected    {count:,}, listed with their lines in {path}")
    say_remarks(intake.remarks)
    if not intake.finished:
        click.echo("stopped before the end: run the same command again to go on", err=True)
        return 3
    return int(intake.rejected > 0)


def _spec(to: str, options: dict[str, Any]) -> EmbedderSpec:
    """A dataset that is there already says itself what embeds it; the model is asked only when it was named, too."""
    if not options["model_named"] and open_store(to).exists(DATASET_KEY):
        return Dataset.open(to).info.embedder
    names = ("model", "dimensions", "task", "late_chunking")
    return make_spec(ModelChoice(**{name: options[name] for name in names}))


async def _probe(dataset: Dataset, connection: Connection, options: dict[str, Any]) -> None:
    """Where the provider's key is at hand: a machine that only produces may have none."""
    spec = dataset.info.embedder
    if is_local(spec.model) or spec.revision == REHEARSAL:
        return
    # The workers know the key's limits, and one small request is within any: it waits for a gate, and for no pace.
    choice = ModelChoice(spec.model, spec.dimensions, api_base=options["api_base"], tier=LARGEST_TIER)
    try:
        embedder = await to_thread.run_sync(make_embedder, choice)
    except ConfigurationError as error:
        click.echo(f"embedmill: the provider was not asked whether it answers: {error}", err=True)
        return
    try:
        budget = make_budget(choice, connection, namespace=options["namespace"])
        caps = Caps(connection, namespace=options["namespace"], alone=False)
        log = SpendLog(dataset, worker=worker_name(), job=options["job"])
        await probe_provider(embedder, budget, cap=LoggedCap(caps.of(dataset, options["job"]), log, shard=None))
    finally:
        await embedder.aclose()


def _begin_job(dataset: Dataset, job: str, lane: Lane | None) -> None:
    """Give a new job its lane. Raises ConfigurationError for a job that has another one."""
    known = dataset.job(job)
    if lane is None or (known is not None and known.lane == lane):
        return
    if known is not None:
        raise ConfigurationError(f"the job {job} is in the lane {known.lane}, for good: name another with --job")
    dataset.change_job(job, lambda new: replace(new, lane=lane))
