"""`embedmill info`: what a dataset is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from ..dataset.dataset import Dataset
from ..dataset.layout import FORMAT_VERSION
from ..dataset.summary import summarize
from .billing import usd_words
from .options import output_options


@click.command()
@click.argument("dataset", metavar="DATASET")
@output_options
def info(dataset: str, as_json: bool) -> int:
    """The embedder, shape and size of DATASET, and how to open it with other tools."""
    opened = Dataset.open(dataset)
    if as_json:
        click.echo(json.dumps(_as_record(opened)))
    else:
        for line in _lines(opened):
            click.echo(line)
    return 0


def _as_record(dataset: Dataset) -> dict[str, object]:
    shape = summarize(dataset)
    stored = [marker.objects.values() for shard in dataset.committed() if (marker := dataset.marker(shard))]
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
        "committed_bytes": sum(item.bytes for objects in stored for item in objects),
        "passages": shape.as_dict(),
    }


def _lines(dataset: Dataset) -> Iterator[str]:
    record = _as_record(dataset)
    embedder, summary = dataset.info.embedder, summarize(dataset)
    yield f"{dataset.url}: embedmill dataset, format {FORMAT_VERSION}, made {dataset.info.created_at}"
    cut = f", cut at {embedder.max_input_tokens:,} tokens" if embedder.max_input_tokens else ""
    yield f"  embedder    {embedder.model}{cut} (fingerprint {embedder.fingerprint})"
    yield f"  vectors     {summary.embedded:,} of {dataset.info.dimensions:,} x {dataset.info.dtype}"
    if summary.windows:
        yield f"  windows     {summary.windows_words}"
    yield f"  stored      {float(str(record['committed_bytes'])) / 1e6:,.1f} MB in {summary.committed_shards:,} shards"
    yield f"  billed      {summary.billed_tokens:,} tokens{usd_words(embedder.model, summary.billed_tokens)}"
    yield f"  sharding    {dataset.info.shard_rows:,} rows a shard, {dataset.info.chunk_rows:,} a chunk"
    yield "Open it elsewhere:"
    yield f"  zarr.open({dataset.url + '/vectors.zarr'!r}, mode='r')['vectors']"
    yield f"  pyarrow.parquet.read_table({dataset.url + '/documents/00000000.parquet'!r})"
    yield f"Row i of documents file K is row K * {dataset.info.shard_rows} + i of the vectors."
