"""Documents erased: out of the log, the vectors, the markers, the checkpoints and everything that is kept beside them.

Shards that hold them are written anew without them, and the old ones are deleted at once, without the grace that compaction
gives. What was purged is looked for afterwards in every object, and only that search is the proof. Wherever a purge dies,
the same one again ends it: what is beside the log goes by its ids, whatever the log still has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from .erasures import is_erased, sweep_erased, with_vectors
from .index import DatasetIndex
from .local_store import LocalStore
from .rewriting import Rewriting, erase_shard, read_shard
from .work_lock import dataset_folder

_REJECTS_FOLDER = "rejects"
_REJECTS = "*.jsonl*"
# A list of rejects that somebody died writing anew; whoever reads it on leaves none of these behind.
_REWRITTEN = ".rewritten"
_TEMPORARIES = ".*.tmp"
# Younger files may be somebody's who is writing.
_TEMPORARIES_AGE_S = 60.0
# A shorter id, unless in quotes, is too likely a word of the sentence.
_SHORTEST_NAMED = 4


@dataclass(slots=True)
class PurgeReport:
    """found: rows that held the ids, of any version; rewritten: shards that were replaced; owed: shards that
    hold some and are not committed yet; left: objects in which the ids still are, after all, or may be; unknown: ids that no
    row held."""

    found: int = 0
    rewritten: int = 0
    owed: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

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
        self._names_quoted = re.compile("|".join(_named(id_) for id_ in sorted(self._names)))

    def run(self, *, on_shard: Callable[[int, int], None] | None = None) -> PurgeReport:
        """Erase, then look for what is left. Raises ConfigurationError when somebody compacts just now."""
        dataset, report = self._dataset, PurgeReport()
        with compacting_alone(dataset):
            index = dataset.open_index()
            try:
                retire_unfinished(dataset, index)
                sweep_erased(dataset)
                half_written = self._half_written()
                holding = self._look(report, on_shard)
                report.owed = sorted(set(holding) & set(dataset.owed()))
                live = sorted(set(holding) & set(dataset.committed()))
                for shards in self._groups(live):
                    report.rewritten += self._rewrite(index, shards)
                for shard in sorted(set(holding) & dataset.retired()):
                    erase_shard(dataset, shard)
                self._clean_aside(index, holding)
                index.shred()
                dataset.publish_shape()
                report.left = sorted({*self._left(index, holding), *(half_written & self._half_written())})
            finally:
                index.close()
        return report

    def matching(self, ids: Iterable[str]) -> set[str]:
        """Those of these ids that are to go, as they stand outside of the dataset: also of passages that the log has
        forgotten. After `run`."""
        index = self._dataset.open_index()
        try:
            return self._matching(index, ids)
        finally:
            index.close()

    def _matching(self, index: DatasetIndex, ids: Iterable[str]) -> set[str]:
        wanted = set(ids)
        known = wanted & (self._names | self.passages)
        parts = {id_ for id_ in wanted - known if any(id_[: at.start()] in self._names for at in re.finditer("#", id_))}
        # `a#1` may be another document's own id.
        return known | (parts - index.versions(sorted(parts)).keys())

    def _look(self, report: PurgeReport, on_shard: Callable[[int, int], None] | None) -> dict[int, int]:
        """Shards that hold the ids, retired or not, and how many of their rows do."""
        holding: dict[int, int] = {}
        admitted = self._dataset.admitted()
        known: set[object] = set()
        for shard in admitted:
            table, _ = self._dataset.documents(shard, columns=["id", "group"])
            mask = self._mask(table)
            if mask.any():
                holding[shard] = int(mask.sum())
                self.passages.update(str(id_) for id_ in table.filter(pa.array(mask))["id"].to_pylist())
                report.found += holding[shard]
                known.update(*(table.filter(pa.array(mask))[name].to_pylist() for name in ("id", "group")))
            if on_shard is not None:
                on_shard(shard + 1, len(admitted))
        report.unknown = sorted(self._names - known)
        return holding

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

    def _clean_aside(self, index: DatasetIndex, holding: Collection[int]) -> None:
        """Lists of failures and rejects lose their lines, and what repairs put aside and killed writers left goes."""
        store = self._dataset.store
        while (current := store.read_or_none(layout.DROPPED_KEY)) is not None:
            kept = self._without(index, current)
            if kept == current:
                break
            with suppress(ObjectChanged):
                store.swap(layout.DROPPED_KEY, kept, expected=current)
        for path in self._reject_files():
            if path.name.endswith(_REWRITTEN):
                path.unlink(missing_ok=True)
                continue
            lines = path.read_bytes()
            kept = self._without(index, lines)
            if kept != lines:
                rewritten = path.with_name(path.name + _REWRITTEN)
                rewritten.write_bytes(kept)
                rewritten.replace(path)
        for key in self._damaged(holding):
            store.delete(key)
        if isinstance(store, LocalStore):
            store.sweep(older_than_s=_TEMPORARIES_AGE_S)

    def _damaged(self, holding: Collection[int]) -> list[str]:
        """What repairs took out of shards that hold the ids, or that were erased since: nobody can tell of those."""
        store, found = self._dataset.store, []
        for stamp in store.names(DAMAGED_FOLDER):
            folder = f"{DAMAGED_FOLDER}/{stamp}/"
            markers = set(layout.numbers(store.names(f"{folder}{layout.COMMITS_FOLDER}"), suffix=".json"))
            vectors = with_vectors(self._dataset, under=folder)
            for shard in sorted(markers | vectors):
                if shard in holding or is_erased(self._dataset, shard):
                    found += [f"{folder}{layout.commit_key(shard)}"] * (shard in markers)
                    found += [f"{folder}{layout.vectors_key(shard)}"] * (shard in vectors)
        return [key for key in found if store.exists(key)]

    def _half_written(self) -> set[str]:
        """Files that a killed writer may have left, with whole texts in them."""
        store = self._dataset.store
        if not isinstance(store, LocalStore):
            return set()
        return {str(path.relative_to(store.root)) for path in store.root.rglob(_TEMPORARIES)}

    def _reject_files(self) -> list[Path]:
        return sorted((dataset_folder(self._dataset) / _REJECTS_FOLDER).glob(_REJECTS))

    def _without(self, index: DatasetIndex, data: bytes) -> bytes:
        """The lines that are about none of the ids."""
        lines = data.splitlines(keepends=True)
        records = [_record(line) for line in lines]
        matching = self._matching(index, (id_ for record in records if isinstance(id_ := record.get("id"), str)))
        return b"".join(
            line
            for line, record in zip(lines, records, strict=True)
            if record.get("id") not in matching and not self._is_named_in(record)
        )

    def _is_named_in(self, record: Mapping[str, object]) -> bool:
        """A record without an id says in its other fields whose it was."""
        return record.get("id") is None and any(
            value in self._names or self._names_quoted.search(value)
            for value in record.values()
            if isinstance(value, str)
        )

    def _left(self, index: DatasetIndex, holding: Collection[int]) -> Iterator[str]:
        """Every object in which the ids still are."""
        dataset = self._dataset
        for shard in dataset.admitted():
            table, _ = dataset.documents(shard, columns=["id", "group"])
            if self._mask(table).any():
                yield layout.documents_key(shard)
        for shard in dataset.stored_markers():
            marker = dataset.marker(shard)
            if marker is not None and self._matching(index, (failure.id for failure in marker.failures)):
                yield layout.commit_key(shard)
        for shard in sorted(dataset.retired() & with_vectors(dataset)):
            if is_erased(dataset, shard):
                yield layout.vectors_key(shard)
        dropped = dataset.store.read_or_none(layout.DROPPED_KEY) or b""
        if self._without(index, dropped) != dropped:
            yield layout.DROPPED_KEY
        for path in self._reject_files():
            data = path.read_bytes()
            if self._without(index, data) != data:
                yield f"{_REJECTS_FOLDER}/{path.name}"
        yield from self._damaged(holding)
        if index.versions([*self._names, *self.passages]):
            yield "index"


def _named(id_: str) -> str:
    """A pattern: the id in quotes, as messages have it, or where it is long enough, as a word."""
    whole = re.escape(id_)
    return rf"(?<!\w){whole}(?!\w)" if len(id_) >= _SHORTEST_NAMED else f"[\"']{whole}[\"']"


def _record(line: bytes) -> dict[str, object]:
    """A line of JSON; empty for what is none."""
    with suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return {}
