"""Datasets to load into Milvus: made by hand, shard by shard, with vectors that follow from the texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import DELETED, EMBEDDED, Marker
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.documents import hash16
from loader.service import Loader
from loader.target import MilvusTarget
from worker.embedders.null import NullEmbedder, hash_vectors

DIMENSIONS = 8
Row = tuple[str, int, int]
"""(id, version, status)."""


def make_dataset(folder: Path, *, dimensions: int = DIMENSIONS) -> Dataset:
    return Dataset.open_or_create(str(folder), embedder=NullEmbedder(dimensions).spec)


def text_of(id_: str, version: int) -> str:
    return f"the {id_} in version {version}"


def admit(dataset: Dataset, shard: int, rows: Sequence[Row], *, texts: dict[str, str] | None = None) -> None:
    passages = []
    for id_, version, status in rows:
        text = (texts or {}).get(id_, text_of(id_, version))
        metadata = json.dumps({"version": version, "kind": "even" if version % 2 == 0 else "odd"})
        passages.append(
            Passage(id_, text, metadata, version, hash16(text), hash16(metadata), deleted=status == DELETED)
        )
    dataset.append_passages(shard, passages, origin=ShardOrigin(shard, "main"))


def commit(dataset: Dataset, shard: int, rows: Sequence[Row]) -> None:
    statuses = np.array([row[2] for row in rows], dtype=np.uint8)
    texts: list[str] = [str(text) for text in dataset.documents(shard)[0].column("text").to_pylist()]
    vectors: NDArray[np.float32] = hash_vectors(texts, dataset.info.dimensions)
    vectors[statuses != EMBEDDED] = np.nan
    stored = dataset.create_vectors(shard, vectors)
    objects = {layout.vectors_key(shard): stored}
    dataset.commit(
        Marker(shard, statuses, dataset.info.embedder.fingerprint, "attempt", "worker", now_iso(), objects=objects)
    )


def add(dataset: Dataset, *shards: Sequence[Row]) -> None:
    for rows in shards:
        shard = len(dataset.admitted())
        admit(dataset, shard, rows)
        commit(dataset, shard, rows)


def embedded(count: int, *, version: int = 1, start: int = 0) -> list[Row]:
    return [(f"d{number}", version, EMBEDDED) for number in range(start, start + count)]


async def load(dataset: Dataset, uri: str, **options: Any) -> Loader:
    """Load all there is, let go, and the loader for its counts."""
    async with Loader(dataset, MilvusTarget(uri, **options)) as loader:
        await loader.sweep()
        await loader.finish()
    return loader
