"""`embedmill run`: sources to vectors to Milvus in one process, resumable by running it again."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import click
from anyio import to_thread

from scheduler.admission import Admitter
from scheduler.budget import RequestBudget
from scheduler.intake import Intake
from worker.attempts import RetryPolicy, embed_batch

from ..dataset.dataset import Dataset, now_iso
from ..dataset.layout import Job
from ..dataset.store import LocalStore
from ..dataset.summary import DatasetSummary, summarize
from ..embedder import Embedder
from ..errors import ConfigurationError
from ..sources import FieldRules, Source, open_source
from .embedders import ModelChoice, make_budget, make_embedder
from .options import output_options, shared, split_names
from .pipeline import Outcome, Pipeline, open_queue
from .progress import duration

if TYPE_CHECKING:
    from loader.service import Loader

_LITE_NAME = "milvus.db"
_PROBE = RetryPolicy(max_attempts=3)
_EPILOG = """\b
Examples:
  embedmill run corpus.jsonl.gz --to ./wiki
  embedmill run handbook/ --to ./handbook --milvus http://localhost:19530
  zcat dump.jsonl.gz | embedmill run - --to ./dump --text-field title,body --no-milvus
  JINA_API_KEY=... embedmill run corpus.jsonl --model jina/jina-embeddings-v3 --tier paid
  embedmill run pydoc: --to ./demo

Sources: JSON Lines, CSV, TSV (each also .gz or .zst), Parquet, folders of text and Markdown, `-` for JSON Lines
on standard input, `pydoc:` for the documentation that Python carries.

Exit status: 0 all done; 1 done, but some documents were rejected or failed; 2 usage or configuration;
3 stopped before the end, run it again to go on.
"""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Everything that was asked for."""

    sources: tuple[str, ...]
    to: str
    rules: FieldRules
    choice: ModelChoice
    redis: str | None
    namespace: str
    milvus: str | None
    collection: str | None
    job: str
    limit: int | None
    dtype: str
    as_json: bool


@click.command(epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@shared("to", "model", "dimensions", "task", "api_base", "tier", "rpm", "tpm", "concurrency", "text_field", "id_field")
@shared("milvus")
@click.option("--no-milvus", is_flag=True, help="Build the dataset only.")
@shared("collection", "redis", "namespace", "job")
@click.option("--limit", type=click.IntRange(min=1), help="Take so many documents only: a first bite.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="As stored."
)
@output_options
def run(sources: tuple[str, ...], **options: Any) -> int:
    """Read SOURCE..., embed every passage, store the vectors as a dataset, load them into Milvus.

    Killed or stopped, the same command goes on where it was. Without --milvus, a Milvus Lite database is made inside
    the dataset's folder.
    """
    request = _request(sources, options)
    return anyio.run(_run, request)


def _request(sources: tuple[str, ...], options: dict[str, Any]) -> RunRequest:
    to = options["to"] or _default_target(sources[0])
    if options["no_milvus"] and options["milvus"]:
        raise ConfigurationError("--milvus and --no-milvus exclude each other")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", options["job"]) or options["job"].startswith("."):
        raise ConfigurationError(f"--job {options['job']!r}: use letters, digits, dots, dashes and underscores")
    milvus = None if options["no_milvus"] else options["milvus"] or str(Path(to) / _LITE_NAME)
    names = ("model", "dimensions", "task", "api_base", "tier", "rpm", "tpm", "concurrency")
    return RunRequest(
        sources=sources,
        to=to,
        rules=FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"]),
        choice=ModelChoice(**{name: options[name] for name in names}),
        redis=options["redis"],
        namespace=options["namespace"],
        milvus=milvus,
        collection=options["collection"],
        job=options["job"],
        limit=options["limit"],
        dtype=options["dtype"],
        as_json=options["as_json"],
    )


def _default_target(source: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).absolute().name if source != "-" else "stdin")
    return f"./{name.split('.')[0].strip('-') or 'dataset'}-vectors"


async def _run(request: RunRequest) -> int:
    sources = [open_source(argument, rules=request.rules) for argument in request.sources]
    embedder = await to_thread.run_sync(make_embedder, request.choice)
    try:
        dataset = await to_thread.run_sync(_open_dataset, request, embedder)
        with _exclusively(dataset):
            async with open_queue(request.redis, namespace=request.namespace) as (connection, queue):
                budget = make_budget(request.choice, connection, namespace=request.namespace)
                await _probe(embedder, budget)
                loader = await _open_loader(dataset, request)
                index = await to_thread.run_sync(dataset.open_index)
                admitter = Admitter(dataset, index, job=request.job)
                intake = Intake(admitter, queue, rejects=_folder(dataset) / "rejects", limit=request.limit)
                pipeline = Pipeline(
                    dataset, index, queue,
                    embedder=embedder, budget=budget, intake=intake, admitter=admitter, loader=loader,
                )  # fmt: skip
                _set_job(dataset, request, state="running")
                outcome = await pipeline.run(sources, quiet=request.as_json)
    finally:
        await embedder.aclose()
    return _report(request, dataset, sources, pipeline, intake, outcome, loader)


def _open_dataset(request: RunRequest, embedder: Embedder) -> Dataset:
    dataset = Dataset.open_or_create(request.to, embedder=embedder.spec, dtype=request.dtype)
    if dataset.info.dtype != request.dtype and request.dtype != "float32":
        raise ConfigurationError(f"{request.to} stores {dataset.info.dtype}: leave --dtype out, or write a new dataset")
    if isinstance(dataset.store, LocalStore):
        dataset.store.sweep(older_than_s=3600)
    return dataset


async def _probe(embedder: Embedder, budget: RequestBudget) -> None:
    """One small request, so that a bad key or a wrong address is found before anything is queued."""
    if embedder.spec.model.startswith(("local/", "null/")):
        return
    await embed_batch(embedder, ["embedmill"], budget=budget, role="query", policy=_PROBE)


async def _open_loader(dataset: Dataset, request: RunRequest) -> Loader | None:
    if request.milvus is None:
        return None
    from loader.service import Loader
    from loader.target import MilvusTarget

    loader = Loader(dataset, MilvusTarget(request.milvus, collection=request.collection))
    await loader.prepare()
    return loader


def _set_job(dataset: Dataset, request: RunRequest, *, state: Any, reason: str = "") -> None:
    known = dataset.job(request.job)
    sources = known.sources if known else ()
    added = tuple(source for source in request.sources if source not in sources)
    created_at = known.created_at if known else now_iso()
    dataset.write_job(Job(request.job, state=state, reason=reason, sources=sources + added, created_at=created_at))


@contextmanager
def _exclusively(dataset: Dataset) -> Iterator[None]:
    """One `run` per dataset: a second one would pay for the same passages again."""
    path = _folder(dataset) / ".run.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"another run is at work on {dataset.url}: wait for it, or stop it first"
            ) from error
        yield


def _folder(dataset: Dataset) -> Path:
    if not isinstance(dataset.store, LocalStore):
        raise ConfigurationError(f"{dataset.url}: run writes to a folder")
    return dataset.store.root


def _report(
    request: RunRequest,
    dataset: Dataset,
    sources: Sequence[Source],
    pipeline: Pipeline,
    intake: Intake,
    outcome: Outcome,
    loader: Loader | None,
) -> int:
    summary = summarize(dataset)
    status = 3 if outcome.stopped else int(summary.failed > 0 or intake.rejected > 0)
    if request.as_json:
        click.echo(json.dumps(_as_record(request, summary, pipeline, intake, outcome, loader, status)))
    else:
        for line in _lines(request, summary, pipeline, intake, outcome, loader):
            click.echo(line)
    return status


def _lines(
    request: RunRequest,
    summary: DatasetSummary,
    pipeline: Pipeline,
    intake: Intake,
    outcome: Outcome,
    loader: Loader | None,
) -> Iterator[str]:
    counts, admitted = pipeline.worker.counts, outcome.admitted
    yield "Stopped before the end; nothing is lost." if outcome.stopped else "Done."
    yield f"  documents   {admitted.new:,} new, {admitted.updated:,} changed, {admitted.unchanged:,} unchanged"
    yield f"  passages    {summary.embedded:,} embedded of {summary.admitted:,} ({counts.embedded:,} now)"
    yield f"  tokens      {counts.tokens:,} in {counts.requests:,} requests; {counts.truncated:,} passages were cut to the model's limit"
    if counts.rate_limited or counts.failed_requests:
        yield f"  retried     {counts.rate_limited:,} rate-limited, {counts.failed_requests:,} failed requests"
    if summary.failed:
        yield f"  failed      {summary.failed:,}; see: embedmill status {shlex.quote(request.to)} --failed"
    for path, count in intake.reject_files.items():
        yield f"  rejected    {count:,} records, listed with their lines in {path}"
    yield f"  time        {duration(outcome.seconds)}"
    yield f"  dataset     {request.to}"
    if loader is not None:
        yield f"  milvus      {request.milvus}, collection {loader.collection} ({loader.counts.rows_upserted:,} rows now)"
    yield f"Next: {_next_command(request, outcome, loader)}"


def _next_command(request: RunRequest, outcome: Outcome, loader: Loader | None) -> str:
    if outcome.stopped:
        return "run the same command again to go on"
    if loader is not None:
        return f'embedmill search "your question" --milvus {shlex.quote(str(request.milvus))}'
    return f"embedmill verify {shlex.quote(request.to)}"


def _as_record(
    request: RunRequest,
    summary: DatasetSummary,
    pipeline: Pipeline,
    intake: Intake,
    outcome: Outcome,
    loader: Loader | None,
    status: int,
) -> dict[str, Any]:
    counts = pipeline.worker.counts
    return {
        "status": status,
        "stopped": outcome.stopped,
        "dataset": request.to,
        "milvus": request.milvus,
        "collection": loader.collection if loader else None,
        "documents": {
            "new": outcome.admitted.new,
            "changed": outcome.admitted.updated,
            "unchanged": outcome.admitted.unchanged,
            "rejected": intake.rejected,
        },
        "passages": summary.as_dict(),
        "now": {
            "embedded": counts.embedded,
            "adopted": counts.adopted,
            "failed": counts.failed,
            "tokens": counts.tokens,
            "requests": counts.requests,
            "truncated": counts.truncated,
            "rate_limited": counts.rate_limited,
            "failed_requests": counts.failed_requests,
        },
        "rejects": [str(path) for path in intake.reject_files],
        "loaded": loader.counts.rows_upserted if loader else None,
        "seconds": round(outcome.seconds, 3),
    }
