"""Documents erased: out of the log, the vectors, the markers, the checkpoints and everything that is kept beside them.

Shards that hold them are written anew without them, and the old ones are deleted at once, without the grace that compaction
gives. What was purged is looked for afterwards in every object, and only that search is the proof.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import CorruptStore, ObjectChanged
from . import layout
from .compaction import compacting_alone, retire_unfinished
from .dataset import DAMAGED_FOLDER, Dataset
from .dead_letters import retried_places
from .index import DatasetIndex
from .rewriting import Rewriting, erase_shard, read_shard
from .work_lock import dataset_folder

_REJECTS_FOLDER = "rejects"


@dataclass(slots=True)
class PurgeReport:
    """found: rows that held the ids, of any version; failures: (shard, row) of those that had failed; rewritten: shards that
    were replaced; owed: shards that hold some and are not committed yet; left: objects in which the ids still are, after
    all."""

    found: int = 0
    rewritten: int = 0
    owed: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failures: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_gone(self) -> bool:
        return not self.owed and not self.left

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Purge:
    """The erasure of some ids; an id of a document that was split stands for all of its passages. Blocking."""

    def __init__(self, dataset: Dataset, ids: Collection[str]) -> None:
        self._dataset = dataset
        self._ids = pa.array(sorted(set(ids)), pa.string())
        self._names = set(ids)
        self.passages: set[str] = set()
        """Ids of the passages that were found."""

    def run(self, *, on_shard: Callable[[int, int], None] | None = None) -> PurgeReport:
        """Erase, then look for what is left. Raises ConfigurationError when somebody compacts just now."""
        dataset, report = self._dataset, PurgeReport()
        with compacting_alone(dataset):
            index = dataset.open_index()
            try:
                retire_unfinished(dataset, index)
                holding = self._look(report, on_shard)
                report.owed = sorted(set(holding) & set(dataset.owed()))
                live = sorted(set(holding) & set(dataset.committed()))
                for shards in self._groups(live):
                    report.rewritten += self._rewrite(index, shards)
                for shard in sorted(set(holding) & dataset.retired()):
                    erase_shard(dataset, shard)
                self._clean_aside(holding)
                index.shred()
                if report.rewritten:
                    dataset.publish_shape()
                report.left = sorted(set(self._left(index, holding)))
            finally:
                index.close()
        return report

    def _look(self, report: PurgeReport, on_shard: Callable[[int, int], None] | None) -> dict[int, int]:
        """Shards that hold the ids, retired or not, and how many of their rows do."""
        holding: dict[int, int] = {}
        admitted = self._dataset.admitted()
        for shard in admitted:
            table, _ = self._dataset.documents(shard, columns=["id", "group"])
            mask = self._mask(table)
            if mask.any():
                holding[shard] = int(mask.sum())
                self.passages.update(str(id_) for id_ in table.filter(pa.array(mask))["id"].to_pylist())
                report.found += holding[shard]
                report.failures += self._failures(shard, mask)
            if on_shard is not None:
                on_shard(shard + 1, len(admitted))
        return holding

    def _failures(self, shard: int, mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
        marker = self._dataset.marker(shard)
        return [(shard, f.row) for f in marker.failures if mask[f.row]] if marker is not None else []

    def _mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """(rows,): those that belong to the ids."""
        by_id, by_group = (pc.is_in(table[name], value_set=self._ids).to_numpy() for name in ("id", "group"))
        return np.asarray(by_id | by_group, dtype=bool)

    def _groups(self, shards: Sequence[int]) -> Iterator[list[int]]:
        """Shards to rewrite together: of one job, at most one full shard of rows."""
        by_job: dict[str, list[int]] = {}
        for shard in shards:
            by_job.setdefault(self._dataset.admission(shard).job, []).append(shard)
        for of_job in by_job.values():
            group: list[int] = []
            rows = 0
            for shard in of_job:
                count = self._dataset.admission(shard).rows
                if group and rows + count > self._dataset.info.shard_rows:
                    yield group
                    group, rows = [], 0
                group.append(shard)
                rows += count
            yield group

    def _rewrite(self, index: DatasetIndex, shards: Sequence[int]) -> int:
        """How many of them were replaced. What cannot be read stays, and the search for what is left names it."""
        contents = []
        for shard in shards:
            with suppress(CorruptStore):
                contents.append(read_shard(self._dataset, shard))
        if not contents:
            return 0
        readable = [content.marker.shard for content in contents]
        job = self._dataset.admission(readable[0]).job
        rewriting = Rewriting(self._dataset, index, readable, job=job, reason="purge")
        retried = retried_places(self._dataset)
        for content in contents:
            hits = [p.id in self.passages for p in content.passages]
            rewriting.add(content, ~np.array(hits, dtype=bool), retried=retried)
        return len(readable) if rewriting.switch() is not None else 0

    def _clean_aside(self, holding: Iterable[int]) -> None:
        """Lists of failures and rejects lose their lines, and what repairs put aside goes."""
        store = self._dataset.store
        while (current := store.read_or_none(layout.DROPPED_KEY)) is not None:
            kept = b"".join(line for line in current.splitlines(keepends=True) if not self._is_about(line))
            if kept == current:
                break
            with suppress(ObjectChanged):
                store.swap(layout.DROPPED_KEY, kept, expected=current)
        for path in self._reject_files():
            lines = path.read_bytes().splitlines(keepends=True)
            kept_lines = [line for line in lines if not self._is_about(line)]
            if len(kept_lines) < len(lines):
                rewritten = path.with_name(path.name + ".rewritten")
                rewritten.write_bytes(b"".join(kept_lines))
                rewritten.replace(path)
        for key in self._damaged(holding):
            store.delete(key)

    def _damaged(self, shards: Iterable[int]) -> list[str]:
        """What repairs took out of these shards."""
        store = self._dataset.store
        keys = [key for shard in shards for key in (layout.commit_key(shard), layout.vectors_key(shard))]
        aside = [f"{DAMAGED_FOLDER}/{stamp}/{key}" for stamp in store.names(DAMAGED_FOLDER) for key in keys]
        return [key for key in aside if store.exists(key)]

    def _reject_files(self) -> list[Path]:
        return sorted((dataset_folder(self._dataset) / _REJECTS_FOLDER).glob("*.jsonl"))

    def _is_about(self, line: bytes) -> bool:
        """A line of JSON about one of the ids."""
        with suppress(ValueError, KeyError, TypeError):
            return json.loads(line)["id"] in {*self._names, *self.passages}
        return False

    def _left(self, index: DatasetIndex, holding: Iterable[int]) -> Iterator[str]:
        """Every object in which the ids still are."""
        dataset = self._dataset
        for shard in dataset.admitted():
            table, _ = dataset.documents(shard, columns=["id", "group"])
            if self._mask(table).any():
                yield layout.documents_key(shard)
        for shard in dataset.stored_markers():
            marker = dataset.marker(shard)
            if marker is not None and any(failure.id in self.passages for failure in marker.failures):
                yield layout.commit_key(shard)
        if any(map(self._is_about, (dataset.store.read_or_none(layout.DROPPED_KEY) or b"").splitlines())):
            yield layout.DROPPED_KEY
        for path in self._reject_files():
            if any(map(self._is_about, path.read_bytes().splitlines())):
                yield f"{_REJECTS_FOLDER}/{path.name}"
        yield from self._damaged(holding)
        if index.versions([*self._names, *self.passages]):
            yield "index"
