"""`embedmill compact`: small and hollow shards into full ones, while everybody goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from ..dataset.compaction import GRACE_S, CompactionReport
from ..dataset.compaction import compact as compact_dataset
from ..dataset.dataset import Dataset
from .options import output_options

_EPILOG = """\b
Exit status: 0 done; 4 some shards could not be read and stay as they are: `embedmill verify` names them.
"""


@click.command(epilog=_EPILOG)
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0),
    default=GRACE_S,
    show_default=True,
    metavar="SECONDS",
    help="Delete retired shards so long after they were replaced; readers that began before may need them.",
)
@output_options
def compact(dataset: str, grace_s: float, as_json: bool) -> int:
    """Merge the small shards of DATASET, and drop rows that a later version or a deletion overrules.

    Nothing is embedded again. Workers, loaders and readers may go on. A scheduler does it by itself.
    """
    opened = Dataset.open(dataset)
    report = compact_dataset(opened, grace_s=grace_s)
    waiting = len(opened.retired() & opened.stored_markers())
    if as_json:
        click.echo(json.dumps({"dataset": opened.url, **report.as_dict(), "waiting": waiting}))
    else:
        for line in _lines(opened, report, waiting, grace_s):
            click.echo(line)
    return 4 if report.problems else 0


def _lines(dataset: Dataset, report: CompactionReport, waiting: int, grace_s: float) -> Iterator[str]:
    for problem in report.problems:
        yield f"  {problem.object}: {problem.text}; it is not compacted"
    if report.retired:
        yield f"{dataset.url}: {report.retired:,} shards became {report.written:,}, with {report.rows:,} rows"
        yield f"{report.dropped:,} versions that a later one or a deletion overrules are gone"
    else:
        yield f"{dataset.url}: there is nothing to compact"
    if report.deleted:
        yield f"deleted what {report.deleted:,} retired shards stored"
    if waiting:
        yield (
            f"{waiting:,} retired shards stay readable until {grace_s:,.0f} s after they were replaced; "
            "a scheduler or `embedmill compact` deletes them then"
        )
