"""Proof of a dataset: the log, the markers and the vectors read back and held against each other, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from ..errors import CorruptStore
from . import layout
from .dataset import Dataset, describe
from .layout import Marker
from .passages import ShardOrigin, decode_passages
from .summary import DatasetSummary, summarize
from .zarr_metadata import check_array


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be: the object that it concerns, and a sentence.

    shard: the shard that can be embedded again to mend it; None where that would not help.
    """

    object: str
    text: str
    shard: int | None = None


@dataclass(slots=True)
class DatasetReport:
    """The result. summary: None when there are problems; set_aside: shards that a repair took out, to be embedded again;
    mended: objects that it wrote anew."""

    summary: DatasetSummary | None = None
    problems: list[Problem] = field(default_factory=list)
    bytes_read: int = 0
    set_aside: list[int] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "passages": self.summary.as_dict() if self.summary else None,
            "problems": [asdict(problem) for problem in self.problems],
            "bytes_read": self.bytes_read,
            "set_aside": self.set_aside,
            "mended": self.mended,
        }


def verify_dataset(dataset: Dataset, *, on_shard: Callable[[int], None] | None = None) -> DatasetReport:
    """Read everything back and check it. Never stops at the first problem. Blocking, bounded memory: a shard at a time."""
    report = DatasetReport()
    try:
        admitted = dataset.admitted()
    except CorruptStore as error:
        report.problems.append(Problem(layout.DOCUMENTS_FOLDER, str(error)))
        return report
    markers = dataset.stored_markers()
    for orphan in sorted(markers - set(admitted)):
        report.problems.append(Problem(layout.commit_key(orphan), "a marker without documents"))
    retired = dataset.retired()
    for shard in admitted:
        try:
            if shard not in retired:
                problems = list(_check_shard(dataset, shard, report))
                # It may be retired, and deleted, while it is looked at.
                report.problems.extend(problems if problems and shard not in dataset.retired() else ())
        except CorruptStore as error:
            if shard not in dataset.retired():
                report.problems.append(Problem(layout.commit_key(shard), str(error)))
        if on_shard is not None:
            on_shard(shard)
    report.problems.extend(_check_shape(dataset))
    if report.passed:
        report.summary = summarize(dataset)
    return report


def _check_shard(dataset: Dataset, shard: int, report: DatasetReport) -> Iterator[Problem]:
    key = layout.documents_key(shard)
    data = dataset.store.read(key)
    report.bytes_read += len(data)
    marker = dataset.marker(shard)
    try:
        table, origin = decode_passages(data, name=key)
    except CorruptStore as error:
        yield Problem(key, str(error))
        return
    if origin.shard != shard:
        yield Problem(key, f"it says that it is shard {origin.shard}")
    if marker is None:
        return
    if marker.objects.get(key) != describe(data):
        yield Problem(key, "not the object that was committed: size or checksum differ")
    if marker.shard != shard:
        yield Problem(layout.commit_key(shard), f"it says that it is shard {marker.shard}")
    if marker.rows != table.num_rows:
        yield Problem(layout.commit_key(shard), f"statuses of {marker.rows} rows for {table.num_rows} documents")
        return
    if marker.replaces != origin.replaces:
        yield Problem(layout.commit_key(shard), "it replaces other shards than its documents say")
    if marker.fingerprint != dataset.info.embedder.fingerprint:
        yield Problem(layout.commit_key(shard), "vectors of another embedder")
    yield from _check_statuses(marker, deleted=np.array(table["deleted"].to_pylist(), dtype=bool))
    yield from _check_retries(dataset, marker, origin, table)
    yield from _check_vectors(dataset, marker, report)


def _check_statuses(marker: Marker, *, deleted: np.ndarray) -> Iterator[Problem]:
    key = layout.commit_key(marker.shard)
    owed = marker.count(layout.OWED)
    if owed:
        yield Problem(key, f"committed, and {owed} rows are still owed")
    failed = {int(row) for row in np.flatnonzero(marker.statuses == layout.FAILED)}
    if failed != {failure.row for failure in marker.failures}:
        yield Problem(key, f"{len(failed)} failed rows and the causes of {len(marker.failures)}")
    if (deleted & (marker.statuses == layout.EMBEDDED)).any():
        yield Problem(key, "deleted rows are marked as embedded")


def _check_retries(dataset: Dataset, marker: Marker, origin: ShardOrigin, table: pa.Table) -> Iterator[Problem]:
    """What a row tries again is a failure of the same id and version."""
    if marker.retries != origin.retries:
        yield Problem(layout.commit_key(marker.shard), "it tries other rows again than its documents say")
    retired = dataset.retired() if origin.retries else ()
    for row, (shard, old_row) in origin.retries.items():
        if shard in retired:
            continue
        earlier = dataset.marker(shard)
        failed = {(f.row, f.id, f.version) for f in earlier.failures} if earlier else set()
        if (old_row, table["id"][row].as_py(), table["version"][row].as_py()) not in failed:
            yield Problem(layout.documents_key(marker.shard), f"row {row} tries again what did not fail")


def _check_vectors(dataset: Dataset, marker: Marker, report: DatasetReport) -> Iterator[Problem]:
    key = layout.vectors_key(marker.shard)
    embedded = marker.statuses == layout.EMBEDDED
    promised = marker.objects.get(key)
    if promised is None:
        if embedded.any():
            yield Problem(key, f"{int(embedded.sum())} embedded rows, and no vectors were committed")
        return
    try:
        values = dataset.vectors(marker.shard)
    except CorruptStore as error:
        yield Problem(key, str(error), marker.shard)
        return
    report.bytes_read += promised.bytes
    bad = embedded & ~(np.isfinite(values).all(axis=1) & values.any(axis=1))
    if bad.any():
        yield Problem(
            key, f"{int(bad.sum())} embedded rows without a usable vector, the first is row {int(bad.argmax())}"
        )


def _check_shape(dataset: Dataset) -> Iterator[Problem]:
    try:
        check_array(dataset.store.read(layout.ZARR_ARRAY_KEY), dataset.info, url=dataset.url)
        missing = dataset.unpublished_rows()
    except CorruptStore as error:
        yield Problem(layout.ZARR_ARRAY_KEY, str(error))
        return
    if missing:
        yield Problem(layout.ZARR_ARRAY_KEY, f"the array's shape hides {missing} committed rows from other readers")
