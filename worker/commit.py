"""The commit of a shard: vectors, then the marker, each created once. Doing it twice changes nothing."""

from __future__ import annotations

from collections.abc import Callable

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

    passages: (id, version) of every row; windows: asked once it is known what is stored. Blocking: run in a thread.
    """
    objects: dict[str, StoredObject] = {}
    failpoint("worker.before_vectors")
    stored = _store_vectors(dataset, shard, results, job=origin.job, passages=passages)
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
    committed = dataset.commit(marker)
    failpoint("worker.after_marker")
    return committed


def dead_letters(marker: Marker, task: Task) -> list[DeadLetter]:
    """One per failed row of a marker."""
    return [
        DeadLetter(task.dataset, task.job, f.id, f.version, marker.shard, f.row, f.code, f.cause)
        for f in marker.failures
    ]


def _store_vectors(
    dataset: Dataset, shard: int, results: ShardResults, *, job: str, passages: list[tuple[str, int]]
) -> StoredObject | None:
    embedded = results.statuses == EMBEDDED
    if not embedded.any() and not dataset.store.exists(vectors_key(shard)):
        return None
    try:
        return dataset.create_vectors(shard, results.vectors)
    except ObjectExists:
        return _adopt(dataset, shard, results, job=job, passages=passages)


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
