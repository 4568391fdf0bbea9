"""What a dataset holds, counted from its markers and its log."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from . import layout
from .dataset import Dataset


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """Rows by what became of them. admitted = embedded + failed + deleted + cancelled + owed."""

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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def summarize(dataset: Dataset) -> DatasetSummary:
    """Count a dataset. Cheap: markers for what is committed, Parquet footers for what is owed."""
    shards = dataset.admitted()
    markers = [marker for shard in dataset.committed() if (marker := dataset.marker(shard)) is not None]
    owed = sum(dataset.documents(shard, columns=["version"])[0].num_rows for shard in dataset.owed())

    def count(status: int) -> int:
        return sum(marker.count(status) for marker in markers)

    return DatasetSummary(
        shards=len(shards),
        committed_shards=len(markers),
        admitted=sum(marker.rows for marker in markers) + owed,
        embedded=count(layout.EMBEDDED),
        failed=count(layout.FAILED),
        deleted=count(layout.DELETED),
        cancelled=count(layout.CANCELLED),
        owed=owed,
        truncated=sum(len(marker.truncated) for marker in markers),
        billed_tokens=sum(marker.billed_tokens for marker in markers),
    )
