"""Small datasets for tests: few rows to a shard, so that a handful of documents makes several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DatasetInfo
from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.documents import Cursor, SourceDocument, hash16
from embedmill.embedder import EmbedderSpec


def small_dataset(
    folder: Path,
    *,
    embedder: EmbedderSpec | None = None,
    shard_rows: int = 8,
    chunk_rows: int = 4,
    dataset_id: str = "d0",
) -> Dataset:
    """A new dataset in `folder`, for vectors of this embedder (else of null/3)."""
    spec = embedder or EmbedderSpec(model="null/3", dimensions=3, revision="1")
    info = DatasetInfo(dataset_id, "2026-01-01T00:00:00+00:00", spec, shard_rows=shard_rows, chunk_rows=chunk_rows)
    LocalStore(folder).create(layout.DATASET_KEY, info.to_bytes())
    return Dataset.open_or_create(str(folder), embedder=spec)


def passage(id_: str, text: str, *, version: int = 1, metadata: str = "{}", deleted: bool = False) -> Passage:
    return Passage(id_, text, metadata, version, hash16(text), hash16(metadata), deleted)


def admit_texts(dataset: Dataset, shard: int, texts: Sequence[str], *, origin: ShardOrigin | None = None) -> None:
    """Append a shard whose rows have the ids `SHARD-ROW`."""
    passages = [passage(f"{shard}-{row}", text) for row, text in enumerate(texts)]
    dataset.append_passages(shard, passages, origin=origin or ShardOrigin(shard, "main"))


def document(
    id_: str,
    text: str,
    *,
    record: int,
    metadata: str = "{}",
    deleted: bool = False,
    group: str | None = None,
    last: bool = True,
) -> SourceDocument:
    cursor = Cursor(record=record)
    return SourceDocument(id_, text, metadata, cursor, f"source:{record}", deleted=deleted, group=group, last=last)


def passage_of(name: str, number: int, text: str, *, last: bool) -> SourceDocument:
    """Passage `NAME#NUMBER` of a document that was split, as record NUMBER + 1."""
    return document(f"{name}#{number}", text, record=number + 1, group=name, last=last)
