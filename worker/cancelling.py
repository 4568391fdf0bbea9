"""A shard given up: committed with what its checkpoints hold, and every other row cancelled.

Safe beside a worker that is at the same shard: vectors and marker are created once, and whoever comes second adopts them.
"""

from __future__ import annotations

import uuid
from contextlib import suppress

import numpy as np

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED, Marker
from embedmill.errors import CorruptStore, ObjectExists

from .checkpoints import Checkpoint
from .commit import commit_shard
from .results import Increment, ShardResults
from .windows import documents_of, split_documents


def cancel_shard(dataset: Dataset, shard: int, *, who: str) -> Marker:
    """The marker that is stored in the end, this one or that of a worker that was faster. Blocking; repeatable.

    The job must be cancelled in the dataset before: that is how a worker that finds such vectors knows what they mean.
    """
    attempt = uuid.uuid4().hex[:12]
    checkpoint = Checkpoint(dataset, shard, attempt=attempt)
    marker = dataset.marker(shard)
    if marker is None:
        table, origin = dataset.documents(shard, columns=["id", "version", "deleted", "group"])
        columns = table.to_pydict()
        results = ShardResults(table.num_rows, dataset.info.dimensions)
        results.delete(row for row, deleted in enumerate(columns["deleted"]) if deleted)
        checkpoint.adopt(results)
        _adopt_stored(dataset, shard, results)
        results.delete(results.owed(), cancelled=True)
        if not (results.statuses == EMBEDDED).any():
            # An object without chunks keeps a worker that commits a moment later from storing vectors that nobody counts.
            with suppress(ObjectExists):
                dataset.create_vectors(shard, results.vectors[:0])
        passages = list(zip(columns["id"], columns["version"], strict=True))
        documents = documents_of(columns["id"], columns["group"], columns["deleted"])
        marker = commit_shard(
            dataset, shard, results, origin=origin, passages=passages, attempt=attempt, worker=who,
            windows=lambda: split_documents(documents, results) if dataset.info.embedder.late_chunking else (),
        )  # fmt: skip
    checkpoint.sweep()
    return marker


def _adopt_stored(dataset: Dataset, shard: int, results: ShardResults) -> None:
    """Vectors that an attempt stored before it died; its marker would have counted them."""
    try:
        stored = dataset.stored_vectors(shard, rows=results.rows)
    except CorruptStore:
        dataset.put_aside(shard)
        return
    if stored is not None:
        rows = np.flatnonzero(np.isfinite(stored[0]).all(axis=1)).astype(np.int32)
        results.add(Increment(rows, stored[0][rows].astype(np.float32)), kept=True)
