"""The commit of a shard: vectors, then the marker, each created once. Doing it twice changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import (
    CANCELLED,
    EMBEDDED,
    FAILED,
    Failure,
    Marker,
    StoredObject,
    Window,
    commit_key,
    documents_key,
    vectors_key,
)
from embedmill.dataset.passages import ShardOrigin
from embedmill.errors import ObjectExists
from embedmill.failpoints import failpoint
from embedmill.messages import DeadLetter, Task

from .results import ShardResults


def commit_shard(
    dataset: Dataset,
    shard: int,
    results: ShardResults,
    *,
    origin: ShardOrigin,
    passages: list[tuple[str, int]],
    attempt: str,
    worker: str,
    windows: Callable[[], tuple[Window, ...]] = tuple,
) -> Marker:
    """Make a shard's results durable and final; the marker that is stored, ours or that of whoever was faster.

    Of a shard that was retired, since somebody was so much faster, nothing is stored: it may have been erased. Its marker
    has no failures then.

    passages: (id, version) of every row; windows: asked once it is known what is stored. Blocking: run in a thread.
    """
    objects: dict[str, StoredObject] = {}
    failpoint("worker.before_vectors")
    has_stored_vectors = has_stored_marker = False
    if shard not in dataset.retired():
        stored, has_stored_vectors = _store_vectors(dataset, shard, results, job=origin.job, passages=passages)
        if stored is not None:
            objects[vectors_key(shard)] = stored
    failpoint("worker.after_vectors")
    marker = Marker(
        shard=shard,
        statuses=results.statuses,
        fingerprint=dataset.info.embedder.fingerprint,
        attempt=attempt,
        worker=worker,
        committed_at=now_iso(),
        billed_tokens=results.billed_tokens,
        requests=results.requests,
        failures=tuple(results.failures[row] for row in sorted(results.failures)),
        truncated=tuple(sorted(results.truncated)),
        replaces=origin.replaces,
        retries=origin.retries,
        windows=windows(),
        objects={documents_key(shard): dataset.describe_object(documents_key(shard)), **objects},
    )
    if shard not in dataset.retired():
        marker = dataset.commit(marker)
        has_stored_marker = marker.attempt == attempt
    failpoint("worker.after_marker")
    if shard in dataset.retired():
        _take_back(dataset, marker, with_vectors=has_stored_vectors, with_marker=has_stored_marker)
        return replace(marker, failures=())
    return marker


def dead_letters(marker: Marker, task: Task) -> list[DeadLetter]:
    """One per failed row of a marker."""
    return [
        DeadLetter(task.dataset, task.job, f.id, f.version, marker.shard, f.row, f.code, f.cause)
        for f in marker.failures
    ]


def _take_back(dataset: Dataset, marker: Marker, *, with_vectors: bool, with_marker: bool) -> None:
    """Delete what was stored while somebody retired the shard, and nothing of what others stored of it."""
    if with_vectors:
        dataset.store.delete(vectors_key(marker.shard))
    if with_marker:
        dataset.store.delete(commit_key(marker.shard))
        dataset.forget(marker.shard)


def _store_vectors(
    dataset: Dataset, shard: int, results: ShardResults, *, job: str, passages: list[tuple[str, int]]
) -> tuple[StoredObject | None, bool]:
    """What is stored, and whether that was now."""
    embedded = results.statuses == EMBEDDED
    if not embedded.any() and not dataset.store.exists(vectors_key(shard)):
        return None, False
    try:
        return dataset.create_vectors(shard, results.vectors), True
    except ObjectExists:
        return _adopt(dataset, shard, results, job=job, passages=passages), False


def _adopt(
    dataset: Dataset, shard: int, results: ShardResults, *, job: str, passages: list[tuple[str, int]]
) -> StoredObject | None:
    """A dead or slower attempt left the vectors: they are what is stored, so they are what the marker describes."""
    stored = dataset.stored_vectors(shard, rows=results.rows)
    if stored is None:
        return None
    values, described = stored
    present = np.isfinite(values).all(axis=1)
    for row in map(int, np.flatnonzero(present & np.isin(results.statuses, (FAILED, CANCELLED)))):
        results.statuses[row] = EMBEDDED
        results.failures.pop(row, None)
    missing = list(map(int, np.flatnonzero(~present & (results.statuses == EMBEDDED))))
    record = dataset.job(job) if missing else None
    if record is not None and record.state == "cancelled":
        # Whoever cancels the job was faster, and stored what was there by then.
        results.delete(missing, cancelled=True)
        missing = []
    for row in missing:
        id_, version = passages[row]
        results.statuses[row] = FAILED
        results.failures[row] = Failure(row, id_, version, "lost_attempt", "an earlier attempt stored no vector for it")
    results.vectors = values.astype(np.float32)
    return described
