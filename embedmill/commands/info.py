"""`embedmill info`: what a dataset is, and what is inside."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from ..dataset.contents import Contents, Lengths
from ..dataset.dataset import Dataset
from ..dataset.layout import FORMAT_VERSION
from ..dataset.summary import DatasetSummary, summarize
from ..errors import ConfigurationError, CorruptStore, SnapshotOutdated
from ..prices import usd_words
from ..token_estimates import TokenEstimator, read_estimates
from .options import output_options
from .progress import size_words

_PICTURES = (".png", ".svg")


@click.command()
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw it, too: norms, lengths and a projection of a random sample, as .png or .svg.",
)
@output_options
def info(dataset: str, plot: Path | None, as_json: bool) -> int:
    """The embedder, shape and size of DATASET, what is inside, and how to open it with other tools."""
    if plot is not None:
        _check_picture(plot)
    opened = Dataset.open(dataset)
    found = _look(opened)
    if plot is not None:
        _draw(opened, found, plot)
    if as_json:
        click.echo(json.dumps(_as_record(opened, found, plot)))
    else:
        for line in _lines(opened, found, plot):
            click.echo(line)
    return 0


@dataclass(frozen=True, slots=True)
class _Found:
    """unreadable: why there are no lengths, where documents could not be read."""

    summary: DatasetSummary
    contents: Contents
    lengths: Lengths | None = None
    rows: int | None = None
    unreadable: str = ""


def _look(dataset: Dataset) -> _Found:
    summary, contents = summarize(dataset), Contents(dataset)
    try:
        return _Found(summary, contents, contents.lengths(), contents.rows)
    except (CorruptStore, SnapshotOutdated) as error:
        return _Found(summary, contents, unreadable=str(error))


def _check_picture(file: Path) -> None:
    """Raises ConfigurationError for a file that cannot be one, or without matplotlib."""
    if file.suffix.lower() not in _PICTURES:
        raise ConfigurationError(f"--plot {file}: name a file that ends with .png or .svg")
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigurationError(
            "matplotlib is not installed, and --plot needs it: pip install 'embedmill[plot]'"
        ) from None


def _draw(dataset: Dataset, found: _Found, file: Path) -> None:
    from .picture import count_words, draw

    info, contents, summary = dataset.info, found.contents, found.summary
    try:
        estimator = read_estimates(dataset.store)
    except CorruptStore:
        # What was learned may be lost at any time.
        estimator = None
    billed = summary.billed_tokens / summary.embedded if summary.embedded else 0.0
    rows = count_words(contents.rows)
    title = f"{Path(dataset.url).name}: {rows} of {info.embedder.model}, {info.dimensions:,} x {info.dtype}"
    draw(file, contents.sample(estimator or TokenEstimator(), billed=billed), title=title, rows=contents.rows)


def _as_record(dataset: Dataset, found: _Found, plot: Path | None) -> dict[str, object]:
    held = found.contents.stored
    return {
        "dataset": dataset.url,
        "id": dataset.info.id,
        "format_version": FORMAT_VERSION,
        "created_at": dataset.info.created_at,
        "embedder": dataset.info.embedder.as_dict(),
        "fingerprint": dataset.info.embedder.fingerprint,
        "dimensions": dataset.info.dimensions,
        "dtype": dataset.info.dtype,
        "shard_rows": dataset.info.shard_rows,
        "chunk_rows": dataset.info.chunk_rows,
        "committed_bytes": held.documents_bytes + held.vectors_bytes,
        "documents_bytes": held.documents_bytes,
        "vectors_bytes": held.vectors_bytes,
        "rows": {"count": found.rows, "stored": held.rows},
        "retired": {"shards": held.retired_shards, "bytes": held.retired_bytes},
        "characters": asdict(found.lengths) if found.lengths else None,
        "unreadable": found.unreadable or None,
        "passages": found.summary.as_dict(),
        "plot": str(plot) if plot else None,
    }


def _lines(dataset: Dataset, found: _Found, plot: Path | None) -> Iterator[str]:
    embedder, summary, held = dataset.info.embedder, found.summary, found.contents.stored
    yield f"{dataset.url}: embedmill dataset, format {FORMAT_VERSION}, made {dataset.info.created_at}"
    cut = f", cut at {embedder.max_input_tokens:,} tokens" if embedder.max_input_tokens else ""
    yield f"  embedder    {embedder.model}{cut} (fingerprint {embedder.fingerprint})"
    yield f"  vectors     {summary.embedded:,} of {dataset.info.dimensions:,} x {dataset.info.dtype}"
    if summary.windows:
        yield f"  windows     {summary.windows_words}"
    if found.rows is not None:
        yield f"  rows        {found.rows:,} count{_others(held.rows - found.rows)}"
    if found.lengths is not None:
        yield f"  texts       {_length_words(found.lengths, rows=found.rows)}"
    if found.unreadable:
        yield f"  texts       cannot be read, `embedmill verify` says more: {found.unreadable}"
    both = held.documents_bytes + held.vectors_bytes
    sizes = f"{size_words(held.vectors_bytes)} of vectors, {size_words(held.documents_bytes)} of documents"
    yield f"  stored      {size_words(both)} in {summary.committed_shards:,} shards: {sizes}"
    if held.retired_shards:
        yield (
            f"  retired     {held.retired_shards:,} shards with {size_words(held.retired_bytes)}, replaced by compaction;"
            " a scheduler or `embedmill compact` deletes them an hour later"
        )
    yield f"  billed      {summary.billed_tokens:,} tokens{usd_words(embedder.model, summary.billed_tokens)}"
    yield f"  sharding    {dataset.info.shard_rows:,} rows a shard, {dataset.info.chunk_rows:,} a chunk"
    if plot is not None:
        yield f"  picture     {plot}"
    yield "Open it elsewhere:"
    yield f"  embedmill.open_dataset({dataset.url!r})"
    yield f"  zarr.open({dataset.url + '/vectors.zarr'!r}, mode='r')['vectors']"
    yield f"  pyarrow.parquet.read_table({dataset.url + '/documents/00000000.parquet'!r})"
    yield f"Row i of documents file K is row K * {dataset.info.shard_rows} + i of the vectors."


def _others(rows: int) -> str:
    return (
        f", {rows:,} stored beside them do not: older versions, deletions, failures"
        if rows
        else ", all that are stored"
    )


def _length_words(lengths: Lengths, *, rows: int | None) -> str:
    sample = "" if lengths.rows == rows else f" (of a sample of {lengths.rows:,})"
    return f"half have up to {lengths.p50:,} characters, 99 % up to {lengths.p99:,}, the longest {lengths.longest:,}{sample}"
