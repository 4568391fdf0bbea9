"""`embedmill run`: sources to vectors to Milvus in one process, resumable by running it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import click
from anyio import to_thread

from embedmill.connection import Connection
from loader.description import default_collection
from scheduler.admission import Admitter
from scheduler.housekeeping import Housekeeping
from scheduler.intake import Intake
from scheduler.queue import Queue
from worker.service import Worker

from ..dataset.dataset import Dataset
from ..dataset.index import DatasetIndex
from ..dataset.layout import Job, TooLong
from ..dataset.spending import spent_recently
from ..dataset.summary import summarize
from ..dataset.work_lock import dataset_folder, work_alone
from ..embedder import Embedder, is_local
from ..errors import CapReached, ConfigurationError
from ..objects import parse_object_url
from ..sources import Chunking, FieldRules, Source, open_source
from ..token_estimates import LearnsTokens
from .batches import check_batch, with_mode
from .billing import Bill, quoted_tokens
from .capping import at_cap, with_cap
from .embedders import ModelChoice, make_budget, make_embedder
from .long_passages import make_splitting, settle_too_long
from .options import check_job_name, output_options, shared, split_names
from .pipeline import Pipeline, open_connection
from .probing import check_disk, probe_provider
from .progress import telling
from .report import RunEnded, report
from .standard_input import StoppableInput, make_standard_input_stoppable

if TYPE_CHECKING:
    from loader.service import Loader

_LITE_NAME = "milvus.db"
_EPILOG = """\b
Examples:
  embedmill run corpus.jsonl.gz --to ./wiki
  embedmill run handbook/ --to ./handbook --milvus http://localhost:19530
  zcat dump.jsonl.gz | embedmill run - --to ./dump --text-field title,body --no-milvus
  JINA_API_KEY=... embedmill run corpus.jsonl --model jina/jina-embeddings-v3 --tier paid
  embedmill run pydoc: --to ./demo

Sources: JSON Lines, CSV, TSV (each also .gz or .zst), Parquet, folders of text and Markdown, the same by s3://,
gs://, az:// or https://, `-` for JSON Lines on standard input, `pydoc:` for the documentation that Python carries.

Exit status: 0 all done; 1 done, but some documents were rejected or failed; 2 usage or configuration;
3 stopped before the end: run it again to go on, after what the last line asks for.
"""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Everything that was asked for."""

    sources: tuple[str, ...]
    to: str
    rules: FieldRules
    chunking: Chunking | None
    too_long: TooLong
    strict: bool
    choice: ModelChoice
    redis: str | None
    namespace: str
    milvus: str | None
    collection: str | None
    job: str
    limit: int | None
    dtype: str
    as_json: bool
    rehearse: bool = False
    batch: bool | None = None
    max_tokens: int | None = None


@click.command(epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@shared("to", "model", "dimensions", "task", "api_base", "tier", "rpm", "tpm", "concurrency", "text_field", "id_field")
@shared("chunk", "chunk_overlap", "late_chunking", "too_long", "tokenizer", "strict", "milvus")
@click.option("--no-milvus", is_flag=True, help="Build the dataset only.")
@shared("collection", "redis", "namespace", "job", "max_tokens", "batch")
@click.option("--limit", type=click.IntRange(min=1), help="Admit so many new or changed documents only: a first bite.")
@click.option("--rehearse", is_flag=True, help="Against a stand-in for the provider, here: nothing is sent or paid.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="As stored."
)
@output_options
def run(sources: tuple[str, ...], **options: Any) -> int:
    """Read SOURCE..., embed every passage, store the vectors as a dataset, load them into Milvus.

    Killed or stopped, the same command goes on where it was. Without --milvus, a Milvus Lite database is made inside
    the dataset's folder, or as ./NAME.db for s3://BUCKET/NAME.
    """
    request = _request(sources, options)
    return anyio.run(_rehearse if request.rehearse else _run, request)


def _request(sources: tuple[str, ...], options: dict[str, Any]) -> RunRequest:
    rehearse = options["rehearse"]
    if rehearse and (options["api_base"] or is_local(options["model"])):
        raise ConfigurationError(
            "--rehearse is for a provider's model, such as jina/jina-embeddings-v3, without --api-base"
        )
    to = options["to"] or _default_target(sources[0], kind="rehearsal" if rehearse else "vectors")
    if options["no_milvus"] and options["milvus"]:
        raise ConfigurationError("--milvus and --no-milvus exclude each other")
    check_job_name(options["job"])
    milvus = None if options["no_milvus"] else options["milvus"] or _default_milvus(to)
    names = (
        "model",
        "dimensions",
        "task",
        "api_base",
        "tier",
        "rpm",
        "tpm",
        "concurrency",
        "late_chunking",
        "tokenizer",
    )
    model, late = options["model"], options["late_chunking"]
    too_long = settle_too_long(options["too_long"], to=to, job=options["job"], late_chunking=late)
    return RunRequest(
        sources=sources,
        to=to,
        rules=FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"]),
        chunking=make_splitting(options, too_long, model=model, late_chunking=late),
        too_long=too_long,
        strict=options["strict"],
        choice=ModelChoice(**{name: options[name] for name in names}, rehearsed=rehearse),
        redis=options["redis"],
        namespace=options["namespace"],
        milvus=milvus,
        collection=options["collection"],
        job=options["job"],
        limit=options["limit"],
        dtype=options["dtype"],
        as_json=options["as_json"],
        rehearse=rehearse,
        batch=options["batch"],
        max_tokens=options["max_tokens"],
    )


def _default_target(source: str, *, kind: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).absolute().name if source != "-" else "stdin")
    return f"./{name.split('.')[0].strip('-') or 'dataset'}-{kind}"


def _default_milvus(to: str) -> str:
    """In the dataset's folder; of a dataset in an object store in the current one, under its name: wiki.db."""
    if parse_object_url(to) is None:
        return str(Path(to) / _LITE_NAME)
    return f"./{default_collection(to)}.db"


async def _rehearse(request: RunRequest) -> int:
    """The same against a simulator of the provider that has the tier's limits, takes its time and is a little unwell."""
    from ..rehearsal import Rehearsal, serve_rehearsal

    limits = request.choice.limits
    behaviour = Rehearsal(
        rpm=limits.requests, tpm=limits.tokens, concurrency=limits.concurrency,
        latency_ms=400, jitter_ms=100, ms_per_1k_tokens=40, error_503=0.005, drop_after=0.001,
    )  # fmt: skip
    async with serve_rehearsal(behaviour) as (api_base, simulator):
        try:
            return await _run(replace(request, choice=replace(request.choice, api_base=api_base)))
        finally:
            _say_rehearsed(simulator.stats())


def _say_rehearsed(seen: Mapping[str, Any]) -> None:
    words = ", ".join(f"{count:,} times {kind}" for kind, count in sorted(seen["statuses"].items())) or "nothing"
    click.echo(
        f"embedmill: a rehearsal: the vectors mean nothing. The stand-in answered {words}, and would have billed"
        f" {seen['tokens_billed']:,} tokens, {seen['tokens_billed_again']:,} of them for texts that it had billed before",
        err=True,
    )


async def _run(request: RunRequest) -> int:
    standard_input = make_standard_input_stoppable() if "-" in request.sources else None
    sources = [
        await to_thread.run_sync(partial(open_source, argument, rules=request.rules, chunking=request.chunking))
        for argument in request.sources
    ]
    embedder = await to_thread.run_sync(make_embedder, request.choice)
    try:
        check_batch(embedder.spec, request.batch)
        dataset = await to_thread.run_sync(_open_dataset, request, embedder)
        with work_alone(dataset):
            ended = await _run_on(dataset, sources, embedder, request, standard_input)
    finally:
        await embedder.aclose()
    status = report(ended, summarize(dataset), as_json=request.as_json)
    if ended.outcome.capped is not None:
        raise ended.outcome.capped
    return status


async def _run_on(
    dataset: Dataset,
    sources: Sequence[Source],
    embedder: Embedder,
    request: RunRequest,
    standard_input: StoppableInput | None,
) -> RunEnded:
    job = remember_job(
        dataset, request.job, request.sources,
        batch=request.batch, max_tokens=request.max_tokens, too_long=request.too_long,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(open_connection(request.redis))
        # A queue of its own, since this worker knows one model only; the budget of the key is everybody's.
        queue = await stack.enter_async_context(_own_queue(connection, f"{request.namespace}:run:{dataset.info.id}"))
        budget = make_budget(request.choice, connection, namespace=request.namespace)
        await budget.restore(await to_thread.run_sync(spent_recently, dataset))
        worker = Worker(queue, embedder, budget=budget)
        probed_tokens = 0
        if not is_local(embedder.spec.model):
            probed_tokens = await probe_provider(embedder, budget, cap=worker.cap_of(dataset, job.id))
        loader = _make_loader(dataset, request)
        if loader is not None:
            await stack.enter_async_context(loader)
        index = stack.enter_context(closing(await to_thread.run_sync(dataset.open_index)))
        await to_thread.run_sync(_check_disk, dataset, index, request)
        admitter = Admitter(dataset, index, job=job.id, lane=job.lane)
        rejects = dataset_folder(dataset) / "rejects"
        intake = Intake(admitter, queue, rejects=rejects, limit=request.limit, strict=request.strict)
        pipeline = Pipeline(
            dataset, index, queue,
            worker=worker, intake=intake, admitter=admitter, loader=loader, standard_input=standard_input,
        )  # fmt: skip
        if isinstance(embedder, LearnsTokens):
            worker.compare_with_quote(quoted_tokens(dataset))
        # Not of the probe: what it runs into ends the run, and is said once.
        with telling("embedmill.budget", "embedmill.keys", "embedmill.breaker"):
            outcome = await pipeline.run(sources, quiet=request.as_json)
        bill = Bill.of(embedder.spec.model, worker.counts, probed_tokens=probed_tokens)
        return RunEnded(request.to, request.milvus, request.collection, loader, worker.counts, intake, outcome, bill)


def _open_dataset(request: RunRequest, embedder: Embedder) -> Dataset:
    dataset = Dataset.open_or_create(request.to, embedder=embedder.spec, dtype=request.dtype)
    if dataset.info.dtype != request.dtype and request.dtype != "float32":
        raise ConfigurationError(f"{request.to} stores {dataset.info.dtype}: leave --dtype out, or write a new dataset")
    Housekeeping(dataset).sweep()
    return dataset


def _check_disk(dataset: Dataset, index: DatasetIndex, request: RunRequest) -> None:
    warning = check_disk(
        dataset,
        request.sources,
        rules=request.rules,
        chunking=request.chunking,
        index=index,
        limit=request.limit,
        milvus_here=request.milvus is not None and request.milvus == _default_milvus(request.to),
    )
    if warning:
        click.echo(f"embedmill: {warning}", err=True)


@asynccontextmanager
async def _own_queue(connection: Connection, namespace: str) -> AsyncIterator[Queue]:
    """A queue that is empty before and gone after: an earlier run, killed, may have left leases in it."""
    queue = Queue(connection, namespace=namespace)
    await queue.clear()
    try:
        yield queue
    finally:
        with anyio.move_on_after(2, shield=True):
            await queue.clear()


def _make_loader(dataset: Dataset, request: RunRequest) -> Loader | None:
    if request.milvus is None:
        return None
    from loader.service import Loader
    from loader.target import MilvusTarget

    return Loader(dataset, MilvusTarget(request.milvus, collection=request.collection))


def remember_job(
    dataset: Dataset,
    job: str,
    sources: Sequence[str],
    *,
    too_long: TooLong,
    batch: bool | None = None,
    max_tokens: int | None = None,
) -> Job:
    """Note in the dataset what the job reads, that it goes on, what becomes of passages that are too long, and its cap, and
    whether by batches, where that is said.

    What a worker paused for want of balance goes on. Raises ConfigurationError for what a person stopped, CapReached for a
    job that has reached its cap.
    """
    reached: CapReached | None = None

    def go_on(known: Job) -> Job:
        nonlocal reached
        require_not_stopped(dataset, known)
        known = replace(with_cap(with_mode(known, batch), max_tokens), too_long=too_long)
        reached = at_cap(dataset, known)
        if reached is not None:
            return known
        added = tuple(source for source in sources if source not in known.sources)
        return replace(known, state="running", reason="", stopped_by="", sources=known.sources + added)

    before = dataset.job(job)
    after = dataset.change_job(job, go_on)
    if reached is not None:
        raise reached
    if before is not None and before.state != "running":
        click.echo(f"embedmill: job {job} was {before.state} ({before.reason}); it goes on", err=True)
    return after


def require_not_stopped(dataset: Dataset, job: Job) -> None:
    """Raises ConfigurationError for a job that somebody paused or cancelled on purpose."""
    if job.state != "running" and job.stopped_by == "user":
        raise ConfigurationError(
            f"job {job.id} of {dataset.url} is {job.state}: "
            f"`embedmill resume {job.id} --to {shlex.quote(dataset.url)}` lets it go on, or name another with --job"
        )
