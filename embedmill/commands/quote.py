"""`embedmill quote`: what a corpus would cost, in money, time and space, without sending anything."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio
import click

from worker.packing import pack

from ..dataset.dataset import Dataset
from ..dataset.index import DatasetIndex
from ..dataset.layout import DATASET_KEY
from ..dataset.store import open_store
from ..embedder import Embedder, is_local
from ..errors import ConfigurationError
from ..exact_tokens import ExactTokens
from ..models import TIERS, Tier, find_model, find_tier
from ..prices import Price, price_of
from ..sources import FieldRules, open_source
from ..survey import Counts, CountTokens, Survey, survey
from ..token_estimates import TokenEstimator, read_estimates
from .embedders import ModelChoice, make_embedder, request_limits
from .long_passages import make_splitting, settle_too_long
from .options import output_options, shared, split_names
from .progress import duration, size_words

_BEFORE_ANY_BILL, _LEAST_ERROR = 0.25, 0.02
_ENOUGH_BILLS = 20
# Of the key's tokens per minute; see the budget's margin.
_USED_SHARE = 0.97
_MEASURE_S = 3.0
# An HNSW graph with M = 16 has up to 2 * 16 neighbours of 4 bytes on its lowest level, and a sixteenth of that above.
_GRAPH_BYTES = 2 * 16 * 4 * 17 / 16
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(min|m|h|d)", re.IGNORECASE)
_SECONDS = {"min": 60, "m": 60, "h": 3600, "d": 86400}
_EPILOG = """\b
Examples:
  embedmill quote corpus.jsonl.gz --model jina/jina-embeddings-v3
  embedmill quote corpus.jsonl.gz --model jina/jina-embeddings-v3 --by 12h
  embedmill quote corpus.jsonl.gz --to ./wiki            # only what ./wiki does not have yet
"""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long it takes. name: of a tier, or of this machine; seconds: without the time of the first answers."""

    name: str
    requests: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Quote:
    """error: half-width of the tokens, and so of the price and of the times, as a fraction."""

    model: str
    dimensions: int
    survey: Survey
    error: float
    bills: int | None
    price: Price | None
    paces: list[Pace]
    vector_bytes: int

    @property
    def vectors(self) -> float:
        return self.survey.total.passages

    @property
    def dataset_bytes(self) -> float:
        return self.vectors * (self.vector_bytes * self.dimensions + self.survey.document_bytes)

    @property
    def milvus_bytes(self) -> float:
        """Of memory, for float32 vectors in an HNSW index."""
        return self.vectors * (4 * self.dimensions + _GRAPH_BYTES)


@click.command(epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@shared("to", "model", "dimensions", "task", "tier", "rpm", "tpm", "text_field", "id_field", "chunk", "chunk_overlap")
@shared("late_chunking", "too_long", "tokenizer")
@click.option("--price", type=click.FloatRange(min=0), metavar="USD", help="For a million tokens.")
@click.option("--by", "deadline", metavar="WHEN", help="A span (90min, 12h, 3d) or a time (2026-11-23T09:00).")
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=100_000,
    show_default=True,
    help="Read so many documents and go by bytes from there; 0 reads everything.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="As stored."
)
@output_options
def quote(sources: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Say what embedding SOURCE... would take: tokens, price, time at each tier, space. Nothing is sent, no key is needed.

    With --to, what that dataset has already is not counted again, and its token counts are the better known.
    """
    deadline_s = None if options["deadline"] is None else _seconds_until(options["deadline"])
    rules = FieldRules(text_fields=split_names(options["text_field"]), id_field=options["id_field"])
    dataset = _dataset(options)
    late = options["late_chunking"]
    if late:
        find_model(options["model"]).check_late_chunking(late)
    too_long = settle_too_long(options["too_long"], to=None, job="", late_chunking=late)
    chunking = make_splitting(options, too_long, model=options["model"], late_chunking=late)
    opened = [open_source(argument, rules=rules, chunking=chunking) for argument in sources]
    say = _say_nothing if as_json else _say_progress
    sample = options["sample"] or None
    if dataset is None:
        made = _quote(opened, None, None, options, sample, say)
    else:
        with closing(dataset.open_index()) as index:
            made = _quote(opened, dataset, index, options, sample, say)
    if as_json:
        click.echo(json.dumps(_as_record(made, deadline_s)))
    else:
        for line in _lines(made, deadline_s):
            click.echo(line)
    return 0


def _dataset(options: dict[str, Any]) -> Dataset | None:
    """The dataset that is there, which says itself what embeds it."""
    if options["to"] is None or not open_store(options["to"]).exists(DATASET_KEY):
        return None
    dataset = Dataset.open(options["to"])
    spec = dataset.info.embedder
    options["model"], options["dimensions"], options["dtype"] = spec.model, spec.dimensions, dataset.info.dtype
    options["late_chunking"] = spec.late_chunking
    return dataset


def _quote(
    sources: Sequence[Any],
    dataset: Dataset | None,
    index: DatasetIndex | None,
    options: dict[str, Any],
    sample: int | None,
    say: Callable[[Counts], None],
) -> Quote:
    model = options["model"]
    hosted = not is_local(model)
    embedder: Embedder | None = None
    estimator = (read_estimates(dataset.store) if dataset is not None else None) or TokenEstimator()
    if hosted:
        known = find_model(model)
        dimensions, limit = known.check_dimensions(options["dimensions"]), known.max_input_tokens
        exact = ExactTokens(options["tokenizer"]) if options["tokenizer"] else None
        count: CountTokens = exact.count if exact else estimator.estimate
    else:
        exact = None
        embedder = make_embedder(
            ModelChoice(model, options["dimensions"], options["task"], tokenizer=options["tokenizer"])
        )
        dimensions, limit, count = embedder.spec.dimensions, 0, embedder.estimate_tokens
    found = survey(sources, count_tokens=count, max_input_tokens=limit, index=index, sample=sample, on_progress=say)
    if embedder is not None:
        paces, counting, bills = anyio.run(_measure, embedder, found), 0.0, None
    else:
        paces = [_pace(tier, found, options, count) for tier in _tiers(options)]
        bills = estimator.bills
        counting = max(_LEAST_ERROR, estimator.error) if bills >= _ENOUGH_BILLS else _BEFORE_ANY_BILL
        if exact:
            counting, bills = 0.0, None
    price = price_of(model, usd=options["price"])
    error = math.hypot(counting, found.spread)
    return Quote(model, dimensions, found, error, bills, price, paces, 2 if options["dtype"] == "float16" else 4)


def _tiers(options: dict[str, Any]) -> list[Tier]:
    """Those to show: one when it was named, or limits of its own, else all."""
    if options["tier"] is None and options["rpm"] is None and options["tpm"] is None:
        return list(TIERS.values())
    base = find_tier(options["tier"] or "free")
    return [
        Tier(
            options["tier"] or "yours", options["rpm"] or base.requests, options["tpm"] or base.tokens, base.concurrency
        )
    ]


def _pace(tier: Tier, found: Survey, options: dict[str, Any], count: CountTokens) -> Pace:
    """Tokens or requests, whichever takes longer; the first passages say how many of them share a request.

    With late chunking, a document has a request of its own, and a long one several.
    """
    tokens, total = [math.ceil(n) for n in count(found.texts)] if found.texts else [], found.total
    limits = request_limits(options["model"], tier, late_chunking=options["late_chunking"])
    if options["late_chunking"]:
        owed = 1 - total.unchanged / total.passages if total.passages else 0.0
        requests = max(total.documents * owed, total.tokens / limits.max_tokens)
    else:
        batches = len(pack(tokens, limits=limits))
        requests = max(batches / len(tokens) * (total.passages - total.unchanged) if tokens else 0.0, 0.0)
    minutes = max(total.tokens / tier.tokens, requests / tier.requests) / _USED_SHARE
    return Pace(tier.name, requests, minutes * 60)


async def _measure(embedder: Embedder, found: Survey) -> list[Pace]:
    """A local model has no tier: the first passages, for a few seconds, say how fast it is here."""
    try:
        if not found.texts:
            return []
        tokens = embedder.estimate_tokens(found.texts)
        done, began = 0, time.monotonic()
        for batch in pack(tokens, limits=embedder.limits):
            await embedder.embed([found.texts[position] for position in batch])
            done += sum(tokens[position] for position in batch)
            if time.monotonic() - began > _MEASURE_S:
                break
        seconds = time.monotonic() - began
        return [Pace("this machine", None, found.total.tokens * seconds / max(done, 1))]
    finally:
        await embedder.aclose()


def _seconds_until(when: str) -> float:
    """Seconds from now. Raises ConfigurationError with good examples."""
    span = _SPAN.fullmatch(when.strip())
    if span:
        return float(span[1]) * _SECONDS[span[2].lower()]
    try:
        at = datetime.fromisoformat(when.strip())
    except ValueError:
        raise ConfigurationError(
            f"--by {when!r} is no span and no time: say for example 90min, 12h, 3d or 2026-11-23T09:00"
        ) from None
    seconds = (at.astimezone() - datetime.now().astimezone()).total_seconds()
    if seconds <= 0:
        raise ConfigurationError(f"--by {when} is over")
    return seconds


def _lines(made: Quote, deadline_s: float | None) -> Iterator[str]:
    total, read = made.survey.total, made.survey.read
    about = "" if made.survey.whole else "about "
    yield f"  documents   {about}{total.documents:,.0f}"
    unchanged = f", {total.unchanged:,.0f} of them there already" if total.unchanged else ""
    yield f"  passages    {about}{total.passages:,.0f}{unchanged}"
    if not made.survey.whole:
        yield f"              from the first {read.documents:,.0f} documents and the size of the rest; --sample 0 reads all"
    if total.rejected:
        yield f"  rejected    {about}{total.rejected:,.0f} records cannot be documents"
    if total.cut:
        yield f"  cut         {about}{total.cut:,.0f} passages are longer than the model takes: see --too-long"
    yield f"  tokens      {total.tokens:,.0f}{_error_words(made)}"
    yield f"  price       {_price_words(made)}"
    for pace in made.paces:
        verdict = ""
        if deadline_s is not None:
            verdict = "   in time" if pace.seconds * (1 + made.error) <= deadline_s else "   too late"
        requests = f" in {pace.requests:,.0f} requests" if pace.requests is not None else ""
        yield f"  time        {duration(pace.seconds)}{requests}, {pace.name}{verdict}"
    yield f"  dataset     {size_words(made.dataset_bytes)}"
    yield f"  milvus      {size_words(made.milvus_bytes)} of memory, as float32 in an HNSW index, beside the texts"
    if deadline_s is not None and made.paces and not _in_time(made, deadline_s):
        yield f"Nothing here is done in {duration(deadline_s)}: several keys are several budgets"


def _in_time(made: Quote, deadline_s: float) -> list[str]:
    return [pace.name for pace in made.paces if pace.seconds * (1 + made.error) <= deadline_s]


def _error_words(made: Quote) -> str:
    if not made.error:
        return ""
    if made.bills is None:
        reason = "from a part of it"
    else:
        reason = f"learned from {made.bills:,} bills" if made.bills else "no bill is known yet"
    return f", give or take {100 * made.error:.0f} % ({reason})"


def _price_words(made: Quote) -> str:
    price = made.price
    if price is None:
        return f"not published for {made.model}: say it with --price USD, for a million tokens"
    if not price.usd:
        return f"none, {price.source}"
    at, error = price.of(made.survey.total.tokens), made.error
    span = f", {at * (1 - error):,.2f} to {at * (1 + error):,.2f}" if error else ""
    since = f" on {price.as_of}" if price.as_of else ""
    return f"{at:,.2f} USD{span} (at {price.usd:g} for a million tokens; {price.source}{since})"


def _as_record(made: Quote, deadline_s: float | None) -> dict[str, Any]:
    total, price = made.survey.total, made.price
    return {
        "model": made.model,
        "dimensions": made.dimensions,
        "whole": made.survey.whole,
        **{name: round(getattr(total, name)) for name in Counts.__slots__},
        "error": round(made.error, 4),
        "price": price and {"usd": round(price.of(total.tokens), 4), "per_million": price.usd, "as_of": price.as_of},
        "times": [
            {"tier": pace.name, "requests": pace.requests and round(pace.requests), "seconds": round(pace.seconds, 1)}
            for pace in made.paces
        ],
        "in_time": None if deadline_s is None else _in_time(made, deadline_s),
        "dataset_bytes": round(made.dataset_bytes),
        "milvus_bytes": round(made.milvus_bytes),
    }


def _say_nothing(_counts: Counts) -> None:
    pass


def _say_progress(counts: Counts) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{counts.documents:,.0f} documents read", nl=False, err=True)
