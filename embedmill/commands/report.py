"""What `run` says when it has ended: for people, and as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from scheduler.intake import Intake
from worker.requesting import WorkerCounts

from ..dataset.summary import DatasetSummary
from .billing import Bill
from .pipeline import Outcome
from .progress import duration

if TYPE_CHECKING:
    from loader.service import Loader


@dataclass(frozen=True, slots=True)
class RunEnded:
    """All that a finished run knows. `milvus` and `loader` are None without Milvus; `collection` as it was named."""

    to: str
    milvus: str | None
    collection: str | None
    loader: Loader | None
    counts: WorkerCounts
    intake: Intake
    outcome: Outcome
    bill: Bill

    def status(self, summary: DatasetSummary) -> int:
        """0 all done; 1 done, but some documents were rejected or failed; 3 stopped before the end."""
        if self.outcome.stopped or summary.owed:
            return 3
        return int(summary.open_failures > 0 or self.intake.rejected > 0)


def report(ended: RunEnded, summary: DatasetSummary, *, as_json: bool) -> int:
    """Print the summary; the exit status."""
    status = ended.status(summary)
    if as_json:
        click.echo(json.dumps(_as_record(ended, summary, status)))
    else:
        for line in _lines(ended, summary):
            click.echo(line)
    say_remarks(ended.intake.remarks)
    return status


def say_remarks(remarks: Sequence[str]) -> None:
    """What the summary says of the sources, on stderr: it is advice, and no part of the result."""
    for remark in remarks:
        click.echo(f"embedmill: {remark}", err=True)


def _lines(ended: RunEnded, summary: DatasetSummary) -> Iterator[str]:
    counts, admitted = ended.counts, ended.outcome.admitted
    yield "Stopped before the end; nothing is lost." if ended.outcome.stopped else "Done."
    nothing = not (admitted.new or admitted.updated or admitted.unchanged)
    words = f"{admitted.new:,} new, {admitted.updated:,} changed, {admitted.unchanged:,} unchanged"
    yield f"  documents   {'nothing to add' if nothing else words}"
    if ended.outcome.stopped:
        yield f"  passages    {ended.outcome.done:,} done so far of {summary.admitted:,} ({counts.embedded:,} now)"
    else:
        yield f"  passages    {summary.embedded:,} embedded of {summary.admitted:,} ({counts.embedded:,} now)"
    billed, *quoted = ended.bill.words()
    yield f"  tokens      {billed}, in {counts.requests:,} requests"
    for line in quoted:
        yield f"  quoted      {line}"
    if counts.lost_tokens:
        yield f"              and up to about {counts.lost_tokens:,} more for requests whose answer was lost"
    if counts.truncated:
        yield f"  cut         {counts.truncated:,} passages, to the model's limit"
    if summary.windows:
        yield f"  windows     {summary.windows_words}"
    if counts.rate_limited or counts.failed_requests:
        yield f"  retried     {counts.rate_limited:,} rate-limited, {counts.failed_requests:,} failed requests"
    if summary.owed and not ended.outcome.stopped:
        yield f"  owed        {summary.owed:,}, of jobs that are paused or cancelled"
    if summary.failed:
        words = summary.failed_words.replace(" failed", "", 1)
        yield f"  failed      {words}; see: embedmill status {shlex.quote(ended.to)} --failed"
    for path, count in ended.intake.reject_files.items():
        yield f"  rejected    {count:,}, listed with their lines in {path}"
    yield f"  time        {duration(ended.outcome.seconds)}"
    yield f"  dataset     {ended.to}"
    if ended.loader is not None:
        rows = f"{ended.loader.counts.rows_upserted:,} rows now"
        yield f"  milvus      {ended.milvus}, collection {ended.loader.collection} ({rows})"
    if ended.outcome.capped is None:
        yield f"Next: {_next_command(ended)}"


def _next_command(ended: RunEnded) -> str:
    if ended.outcome.stopped:
        return "run the same command again to go on"
    if ended.milvus is not None:
        collection = f" --collection {ended.collection}" if ended.collection else ""
        return f'embedmill search "your question" --milvus {shlex.quote(ended.milvus)}{collection}'
    return f"embedmill verify {shlex.quote(ended.to)}"


def _as_record(ended: RunEnded, summary: DatasetSummary, status: int) -> dict[str, Any]:
    counts, admitted, loader = ended.counts, ended.outcome.admitted, ended.loader
    return {
        "status": status,
        "stopped": ended.outcome.stopped,
        "dataset": ended.to,
        "milvus": ended.milvus,
        "collection": loader.collection if loader else None,
        "documents": {
            "new": admitted.new,
            "changed": admitted.updated,
            "unchanged": admitted.unchanged,
            "rejected": ended.intake.rejected,
        },
        "passages": summary.as_dict(),
        "now": {
            "embedded": counts.embedded,
            "adopted": counts.adopted,
            "failed": counts.failed,
            "tokens": counts.tokens,
            "lost_tokens": counts.lost_tokens,
            "requests": counts.requests,
            "truncated": counts.truncated,
            "rate_limited": counts.rate_limited,
            "failed_requests": counts.failed_requests,
        },
        "bill": ended.bill.as_dict(),
        "remarks": ended.intake.remarks,
        "rejects": [str(path) for path in ended.intake.reject_files],
        "loaded": loader.counts.rows_upserted if loader else None,
        "seconds": round(ended.outcome.seconds, 3),
    }
