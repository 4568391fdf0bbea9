"""What a dataset holds, counted from its markers and its log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from . import layout
from .dataset import Dataset
from .dead_letters import failed_rows, retried_places
from .spending import spend_lines


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """Accepted (id, version) by what became of each. admitted: all the others together, from embedded to removed.

    A failure that was tried again counts as what came of that. dropped, superseded: those of the failed that nobody has to
    look at any more. billed_tokens: of all attempts of all workers, as their spend logs say. windows: requests that the
    documents took which late chunking could not embed whole. removed: versions that compaction and erasure have taken away.
    """

    shards: int
    committed_shards: int
    admitted: int
    embedded: int
    failed: int
    deleted: int
    cancelled: int
    owed: int
    truncated: int
    billed_tokens: int
    dropped: int = 0
    superseded: int = 0
    windows: int = 0
    removed: int = 0

    @property
    def open_failures(self) -> int:
        """Failures that somebody should look at: what ends commands with status 1."""
        return self.failed - self.dropped - self.superseded

    @property
    def windows_words(self) -> str:
        return f"{self.windows:,}, of documents that late chunking could not embed whole"

    @property
    def failed_words(self) -> str:
        """For example: 3 failed (1 dropped, 1 superseded)."""
        notes = [f"{n:,} {word}" for n, word in ((self.dropped, "dropped"), (self.superseded, "superseded")) if n]
        return f"{self.failed:,} failed" + (f" ({', '.join(notes)})" if notes else "")

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def summarize(dataset: Dataset, *, job: str | None = None) -> DatasetSummary:
    """Count a dataset, or one job of it. Cheap: it reads markers, and the footers of documents."""
    dataset.forget_put_aside()
    shards = shards_of(dataset, dataset.admitted(), job=job)
    markers = [
        marker for shard in shards_of(dataset, dataset.committed(), job=job) if (marker := dataset.marker(shard))
    ]
    owed = sum(dataset.admission(shard).rows for shard in shards_of(dataset, dataset.owed(), job=job))
    mine = set(shards)
    live = {marker.shard for marker in markers}
    retries = sum(shard in live for shard, _ in retried_places(dataset))
    removed = sum(r.dropped for r in dataset.retirements() if job is None or r.job == job)
    failures = [letter for letter in failed_rows(dataset) if letter.shard in mine]

    def count(status: int) -> int:
        return sum(marker.count(status) for marker in markers)

    lines = (line for line in spend_lines(dataset) if job is None or line.job == job or line.shard in mine)
    in_logs = sum(line.tokens for line in lines)
    in_markers = sum(marker.billed_tokens for marker in markers)
    return DatasetSummary(
        shards=len(mine - dataset.retired()),
        committed_shards=len(markers),
        admitted=sum(marker.rows for marker in markers) + owed - retries + removed,
        embedded=count(layout.EMBEDDED),
        failed=len(failures),
        deleted=count(layout.DELETED),
        cancelled=count(layout.CANCELLED),
        owed=owed,
        truncated=sum(len(marker.truncated) for marker in markers),
        billed_tokens=max(in_markers, in_logs),
        dropped=sum(letter.state == "dropped" for letter in failures),
        superseded=sum(letter.state == "superseded" for letter in failures),
        windows=sum(len(marker.windows) for marker in markers),
        removed=removed,
    )


def shards_of(dataset: Dataset, shards: Iterable[int], *, job: str | None) -> list[int]:
    """Those of one job; all without one."""
    return [shard for shard in shards if dataset.admission(shard).job == job] if job else list(shards)
