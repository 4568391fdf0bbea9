"""What counts in a dataset at one moment: the live committed shards, and the ids of which a version may overrule another.

The log holds an (id, version) once, but for failures that are tried again and for replacements: there the other row has
failed or is in a retired shard. So only a higher version overrules a row, and only ids that have one above 1 need to be
remembered, however many there are in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptStore
from . import layout
from .dataset import Dataset
from .layout import DELETED, EMBEDDED, Marker


@dataclass(frozen=True, slots=True)
class Snapshot:
    """shards: live and committed, in order; newest: the highest decided version of each id that has one above 1;
    first_versions: shards known to hold nothing but version 1; retired: shards that do not count any more."""

    shards: tuple[int, ...] = ()
    newest: Mapping[str, int] = field(default_factory=dict)
    first_versions: frozenset[int] = frozenset()
    retired: frozenset[int] = frozenset()

    def decides(
        self, ids: Sequence[str], versions: NDArray[np.int64], *, among: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """(n,): the rows of `among` (n,) that no higher version overrules. `among`: decided rows."""
        if not self.newest:
            return among
        highest = np.fromiter((self.newest.get(id_, 0) for id_ in ids), dtype=np.int64, count=len(ids))
        decided: NDArray[np.bool_] = among & (highest <= versions)
        return decided


def look(dataset: Dataset, *, earlier: Snapshot | None = None) -> Snapshot:
    """What counts now. `earlier`: a snapshot of the same dataset; what is known from it is not read again."""
    dataset.require_there()
    while True:
        dataset.forget_put_aside()
        # A switch while we look could show us neither the old shards nor the new ones: then we look again.
        retired = dataset.retired()
        try:
            found = _collect(dataset, earlier or Snapshot(), retired=retired)
        except CorruptStore:
            if dataset.retired() == retired:
                raise
        else:
            if dataset.retired() == retired:
                return found


def decided_rows(marker: Marker) -> NDArray[np.bool_]:
    """(rows,): embedded or deleted. Others decide nothing."""
    rows: NDArray[np.bool_] = np.isin(marker.statuses, (EMBEDDED, DELETED))
    return rows


def _collect(dataset: Dataset, earlier: Snapshot, *, retired: frozenset[int]) -> Snapshot:
    shards = dataset.committed()
    added: Iterable[int] = shards
    newest: dict[str, int] = {}
    if set(earlier.shards).issubset(shards):
        added = sorted(set(shards).difference(earlier.shards))
        newest = dict(earlier.newest)
    first_versions = set(earlier.first_versions)
    for shard in added:
        if shard in first_versions or dataset.admission(shard).max_version == 1:
            first_versions.add(shard)
        else:
            _remember_newest(dataset, shard, newest)
    return Snapshot(tuple(shards), newest, frozenset(first_versions), retired)


def _remember_newest(dataset: Dataset, shard: int, newest: dict[str, int]) -> None:
    marker = dataset.marker(shard)
    table, _ = dataset.documents(shard, columns=["id", "version"])
    if marker is None or marker.rows != table.num_rows:
        raise CorruptStore(f"{dataset.url}/{layout.documents_key(shard)} has not the rows that its marker names")
    versions = table["version"].to_numpy()
    rows = np.flatnonzero(decided_rows(marker) & (versions > 1))
    ids: list[str] = table["id"].take(rows).to_numpy(zero_copy_only=False).tolist()
    for id_, version in zip(ids, versions[rows].tolist(), strict=True):
        if version > newest.get(id_, 0):
            newest[id_] = version
