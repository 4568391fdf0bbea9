"""`embedmill export`: a dataset as files for tools that know no Zarr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click

from ..dataset.dataset import Dataset
from ..dataset.exporting import Choice, Exported, Format, Metric
from ..dataset.exporting import export as export_dataset
from ..dataset.reader import open_dataset
from ..dataset.summary import DatasetSummary, summarize
from ..errors import ConfigurationError
from .options import output_options, split_names
from .progress import size_words

_LIVE_EVERY_S = 0.25
_PLAIN_EVERY_S = 5.0
_NOT_NORMALIZED = 1e-3
_EPILOG = """\b
Formats:
  npy      vectors.npy, an array (rows, dimensions); row i is line i of ids.txt
  parquet  part-00000.parquet, ...: id, text, metadata, vector (a list of fixed size)
  fvecs    vectors.fvecs, as the FAISS and ANN benchmarks read it; ids.txt
  faiss    index.faiss, a flat index for faiss.read_index; ids.txt
\b
Examples:
  embedmill export ./wiki --to ./wiki-npy --format npy
  embedmill export ./wiki --to ./wiki-parquet --format parquet --columns id,text,version --dtype float16
  embedmill export s3://bucket/wiki --to ./wiki-faiss --format faiss --metric l2
"""


# Not named `to`: that is a dataset in embedmill.toml, and would become the default here.
@click.command(epilog=_EPILOG)
@click.argument("dataset", metavar="DATASET")
@click.option("--to", "target", required=True, metavar="FOLDER", help="Where the files come; a new or empty folder.")
@click.option("--format", "format_", type=click.Choice(get_args(Format)), required=True, help="See below.")
@click.option(
    "--columns",
    metavar="NAMES",
    help="For parquet, beside id and vector, with commas between: text, metadata, version, group, job, text_hash,"
    " metadata_hash, deleted.  [default: text,metadata]",
)
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Of the vectors.  [default: as stored]")
@click.option(
    "--metric", type=click.Choice(get_args(Metric)), help="For faiss: inner product or L2 distance.  [default: ip]"
)
@click.option(
    "--overwrite", is_flag=True, help="Replace an earlier export, and nothing else, once the new one is whole."
)
@output_options
def export(
    dataset: str, target: str, format_: Format, columns: str | None, dtype: str | None, metric: Metric | None,
    overwrite: bool, as_json: bool,
) -> int:  # fmt: skip
    """Write the vectors of DATASET, the newest version of each id, into FOLDER for other tools.

    The folder appears when all of it is written. A shard is in memory at a time. Vectors are those of the dataset, bit
    for bit, unless --dtype says otherwise.
    """
    if "://" in target:
        raise ConfigurationError(f"--to {target}: exports go to a local folder; copy it from there")
    if metric is not None and format_ != "faiss":
        raise ConfigurationError(f"--metric is for --format faiss: --format {format_} has none")
    choice = Choice(format_, None if columns is None else split_names(columns), dtype, metric)
    reader = open_dataset(dataset)
    show = _Show(len(reader), quiet=as_json)
    started = time.monotonic()
    made = export_dataset(reader, Path(target).expanduser().resolve(), choice, overwrite=overwrite, progress=show.add)
    show.end()
    seconds = time.monotonic() - started
    summary = summarize(Dataset.open(dataset))
    if as_json:
        left = {"owed": summary.owed, "failed": summary.open_failures}
        click.echo(json.dumps({"dataset": reader.url, **made.as_dict(), **left, "seconds": round(seconds, 3)}))
    else:
        for line in _lines(made, summary, seconds):
            click.echo(line)
    return 0


class _Show:
    """Rows written so far, on stderr: over and over on a terminal, else a line every few seconds."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._rows = total, 0
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._shown_at = time.monotonic()

    def add(self, rows: int) -> None:
        self._rows += rows
        now = time.monotonic()
        if not self._quiet and now - self._shown_at >= (_LIVE_EVERY_S if self._live else _PLAIN_EVERY_S):
            self._shown_at = now
            percent = 100 * self._rows / self._total
            words = f"{self._rows:,} of {self._total:,} rows written ({percent:.0f} %)"
            click.echo(f"\r{words}" if self._live else words, nl=not self._live, err=True)

    def end(self) -> None:
        if self._live and not self._quiet:
            click.echo("\r\x1b[K", nl=False, err=True)


def _lines(made: Exported, summary: DatasetSummary, seconds: float) -> Iterator[str]:
    yield (
        f"{made.path}: {made.rows:,} rows of {made.dimensions:,} x {made.dtype},"
        f" {size_words(made.bytes)} in {seconds:.1f} s"
    )
    for name, size in made.files.items():
        yield f"  {name}  {size_words(size)}"
    if summary.owed or summary.open_failures:
        yield f"not in it: {summary.owed:,} passages that are owed, {summary.open_failures:,} that failed"
    if made.metric == "ip" and made.norms and max(1 - made.norms[0], made.norms[1] - 1) > _NOT_NORMALIZED:
        yield (
            f"norms are {made.norms[0]:.4g} to {made.norms[1]:.4g}, not 1: inner products of them are no cosines;"
            " Milvus, as this project loads it, ranks by cosine"
        )
