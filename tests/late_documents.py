"""Documents of several passages in a dataset with late chunking: how they are read, and what the log then holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.embedder import EmbedderSpec
from scheduler.admission import Admitter
from scheduler.batches import Closed
from scheduler.readings import Batch
from tests.datasets import small_dataset
from worker.windows import documents_of

LATE = EmbedderSpec("null/3", 3, revision="1", options={"late_chunking": True})
_indexes: list[DatasetIndex] = []


def late_dataset(folder: Path) -> Dataset:
    return small_dataset(folder, embedder=LATE, shard_rows=6, chunk_rows=3)


def close_indexes() -> None:
    """Of all admitters so far."""
    while _indexes:
        _indexes.pop().close()


def admitter_on(dataset: Dataset) -> Admitter:
    opened = Dataset.open(dataset.url)
    _indexes.append(opened.open_index())
    return Admitter(opened, _indexes[-1], job="main")


def split(name: str, *texts: str, record: int, metadata: str = "{}") -> list[SourceDocument]:
    """A document as a chunking source gives it: cursors inside of record `record`, the last one behind it."""
    last = len(texts) - 1
    return [
        SourceDocument(
            f"{name}#{part}",
            text,
            metadata,
            Cursor(record=record) if part == last else Cursor(record=record - 1, part=part + 1),
            f"source:{record}",
            group=name,
            last=part == last,
        )
        for part, text in enumerate(texts)
    ]


def push(dataset: Dataset, key: str, *records: SourceDocument) -> tuple[Admitter, list[Reject]]:
    admitter = admitter_on(dataset)
    rejects: list[Reject] = []
    # One record a block: a document is gathered over the blocks of its reading.
    for record in records:
        rejects += admitter.admit(key, key, [record]).rejects
    admitter.close_shard()
    return admitter, rejects


def shards(dataset: Dataset) -> list[list[tuple[str, int, bool]]]:
    return [
        [(row["id"], row["version"], row["deleted"]) for row in dataset.documents(shard)[0].to_pylist()]
        for shard in dataset.admitted()
    ]


def carried(dataset: Dataset) -> list[dict[int, tuple[int, int]]]:
    return [dict(dataset.documents(shard)[1].carried) for shard in dataset.admitted()]


def batch(key: str, *records: SourceDocument) -> Batch:
    numbered = [
        SourceDocument(r.id, r.text, r.metadata, Cursor(record=n, line=n), r.place, group=r.group, last=r.last)
        for n, r in enumerate(records, start=1)
    ]
    return Batch(key, numbered)


def keys(closed: Sequence[Closed]) -> list[str]:
    return [one.key for part in closed for one in part.batches]


def counted(batches: Sequence[Batch]) -> list[tuple[int, int, int]]:
    """Of each message: admitted, repeated, refused."""
    return [(one.counts.admitted, one.counts.repeated, len(one.rejects)) for one in batches]


def contexts(dataset: Dataset) -> dict[tuple[int, int], tuple[str, ...]]:
    """By (shard, row), the texts that its vector knows: a worker's, or those of the row that it is carried over from."""
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for shard in dataset.admitted():
        table, origin = dataset.documents(shard)
        rows = table.to_pylist()
        columns = ([row[name] for row in rows] for name in ("id", "group", "deleted"))
        for places in documents_of(*columns):
            texts = tuple(rows[place]["text"] for place in places)
            known = {row: found[origin.carried[row]] for row in places if row in origin.carried}
            assert len(known) in (0, len(places)), "a document is carried over in part"
            found.update({(shard, row): known.get(row, texts) for row in places})
    return found


def check_contexts(dataset: Dataset, documents: Mapping[str, tuple[str, ...]]) -> None:
    """Every passage of the newest documents knows exactly the passages of its document, in their order."""
    newest: dict[str, tuple[int, tuple[int, int], bool, str]] = {}
    for shard in dataset.admitted():
        for number, row in enumerate(dataset.documents(shard)[0].to_pylist()):
            newest[row["id"]] = max(
                newest.get(row["id"], (0, (-1, -1), True, "")),
                (row["version"], (shard, number), row["deleted"], row["text"]),
            )
    known = contexts(dataset)
    alive = {id_: (place, text) for id_, (_, place, deleted, text) in newest.items() if not deleted}
    expected = {f"{name}#{n}": (texts, text) for name, texts in documents.items() for n, text in enumerate(texts)}
    assert {id_: text for id_, (_, text) in alive.items()} == {id_: text for id_, (_, text) in expected.items()}
    assert {id_: known[place] for id_, (place, _) in alive.items()} == {id_: t for id_, (t, _) in expected.items()}
