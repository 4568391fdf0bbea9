"""Small and hollow shards into full ones, while workers, loaders and readers go on.

A live stream closes a shard every few seconds, and updates leave rows behind that nothing reads any more. Compaction keeps
the rows that count (`deciding`), with their addresses new and everything else as it was, and costs nothing at a provider.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from ..errors import ConfigurationError, CorruptStore
from . import layout
from .dataset import Dataset, now_iso
from .dead_letters import retried_places
from .index import DatasetIndex
from .layout import CANCELLED, Marker, Retirement
from .rewriting import CommittedShard, Rewriting, Rewritten, delete_retired, erase_shard, read_shard, rows_that_count
from .verification import Problem
from .work_lock import open_lock

GRACE_S = 3600.0
"""How long what was retired stays readable, for readers that began before."""
AUTOMATIC_SHARDS = 64
"""Small shards of a job that a scheduler lets come together."""
_LOCK = ".compact.lock"
_log = logging.getLogger("embedmill.compaction")


@dataclass(slots=True)
class CompactionReport:
    """retired, written: shards; rows: that were taken over; dropped: accepted versions that a later one overrules; deleted:
    shards whose grace was over; problems: shards that could not be read, and stay as they are."""

    retired: int = 0
    written: int = 0
    rows: int = 0
    dropped: int = 0
    deleted: int = 0
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def add(self, done: Rewritten) -> None:
        self.retired += len(done.retired)
        self.written += len(done.replacements)
        self.rows += done.rows
        self.dropped += done.dropped


def compact(
    dataset: Dataset,
    *,
    thorough: bool = True,
    grace_s: float = GRACE_S,
    on_shards: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = bool,
) -> CompactionReport:
    """Compact a dataset, and delete what was retired more than `grace_s` seconds ago.

    thorough: whatever can be merged, and shards of which less than half counts; else only what has become
    AUTOMATIC_SHARDS small shards of a job, or a full one. on_shards: (done, of how many). Raises ConfigurationError when
    somebody else is at it. Blocking; memory for three shards.
    """
    report = CompactionReport()
    with compacting_alone(dataset):
        index = dataset.open_index()
        try:
            retire_unfinished(dataset, index)
            plans = plan_compaction(dataset, index, thorough=thorough)
            total, done = sum(map(len, plans)), 0
            for shards in plans:
                if stop():
                    break
                _compact_some(dataset, index, shards, report)
                done += len(shards)
                if on_shards is not None:
                    on_shards(done, total)
        finally:
            index.close()
        report.deleted = len(delete_retired(dataset, older_than_s=grace_s))
        # Also of one that was killed behind its switch.
        dataset.publish_shape()
    return report


def plan_compaction(dataset: Dataset, index: DatasetIndex, *, thorough: bool) -> list[list[int]]:
    """Shards to rewrite together, each group of one job and at most one full shard of rows."""
    full = dataset.info.shard_rows
    by_job: dict[str, list[tuple[int, int]]] = {}
    counting = index.newest_rows_by_shard() if thorough else {}
    for shard in dataset.committed():
        marker = dataset.marker(shard)
        if marker is None or (marker.statuses == CANCELLED).any():
            # That a source was given up stands in what was cancelled of it.
            continue
        rows = counting.get(shard, 0) if thorough else marker.rows
        if rows * 2 <= full:
            by_job.setdefault(dataset.admission(shard).job, []).append((shard, rows))
    return [group for shards in by_job.values() for group in _groups(dataset, shards, full, thorough=thorough)]


def retire_unfinished(dataset: Dataset, index: DatasetIndex) -> list[int]:
    """Give up replacements that somebody left behind in the middle; they never counted. Only for whoever compacts alone."""
    dataset.catch_up(index)
    left = index.unplaced()
    if left and dataset.retire(Retirement(tuple(left), (), "unfinished", now_iso())):
        for shard in left:
            erase_shard(dataset, shard)
        dataset.catch_up(index)
        return left
    return []


@contextmanager
def compacting_alone(dataset: Dataset) -> Iterator[None]:
    """One compaction at a time on this machine. The dataset stays whole without it: the slower one of two gives up."""
    with open_lock(dataset, _LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"somebody else is compacting {dataset.url}: wait for it") from error
        yield


def _groups(dataset: Dataset, shards: Sequence[tuple[int, int]], full: int, *, thorough: bool) -> Iterator[list[int]]:
    group: list[int] = []
    rows = 0
    for shard, count in shards:
        if rows + count > full:
            yield group
            group, rows = [], 0
        group.append(shard)
        rows += count
    least = 2 if thorough else AUTOMATIC_SHARDS
    if len(group) >= least or (thorough and group and _is_hollow(dataset.marker(group[0]), rows)):
        yield group


def _is_hollow(marker: Marker | None, counting: int) -> bool:
    return marker is not None and counting * 2 <= marker.rows


def _compact_some(dataset: Dataset, index: DatasetIndex, shards: Sequence[int], report: CompactionReport) -> None:
    """Rewrite these together, without those that cannot be read."""
    left = list(shards)
    while left:
        try:
            done = _rewrite(dataset, index, left)
        except _Unreadable as error:
            report.problems.append(Problem(layout.vectors_key(error.shard), str(error.cause), error.shard))
            _log.warning("%s; it is not compacted", error.cause)
            left.remove(error.shard)
            retire_unfinished(dataset, index)
            continue
        if done is None:
            _log.info("shards %s were retired by somebody else", left)
        else:
            report.add(done)
        return


def _rewrite(dataset: Dataset, index: DatasetIndex, shards: Sequence[int]) -> Rewritten | None:
    while True:
        switches = len(dataset.retirements())
        committed = frozenset(dataset.committed())
        dataset.catch_up(index)
        if switches == index.retirements == len(dataset.retirements()):
            # Which shards count and where rows are, after the same switches.
            break
    retried = retried_places(dataset)
    leaving = {*shards, *dataset.retired()}
    drops_deleted = _is_loaded_everywhere(dataset, shards)
    rewriting = Rewriting(dataset, index, shards, job=dataset.admission(shards[0]).job, reason="compaction")
    for shard in shards:
        content = _read(dataset, shard)
        keep = rows_that_count(
            dataset, index, content,
            committed=committed, retried=retried, drops_deleted=drops_deleted, leaving=leaving,
        )  # fmt: skip
        rewriting.add(content, keep, retried=retried)
    return rewriting.switch()


def _read(dataset: Dataset, shard: int) -> CommittedShard:
    try:
        return read_shard(dataset, shard)
    except CorruptStore as error:
        raise _Unreadable(shard, error) from error


class _Unreadable(Exception):
    def __init__(self, shard: int, cause: CorruptStore) -> None:
        super().__init__(str(cause))
        self.shard = shard
        self.cause = cause


def _is_loaded_everywhere(dataset: Dataset, shards: Sequence[int]) -> bool:
    """Every collection that was ever loaded from here has these shards, and nothing under way: deletions were applied."""
    for target in dataset.store.names(layout.LOADS_FOLDER):
        names = dataset.store.names(f"{layout.LOADS_FOLDER}/{target}")
        if any(name.endswith(layout.INTENT_SUFFIX) for name in names):
            return False
        if not set(shards) <= set(layout.numbers(names, suffix=".json")):
            return False
    return True
