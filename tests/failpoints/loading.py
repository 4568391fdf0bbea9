"""What the loader's cases load: shards with updates and deletions, and what Milvus must hold of them in the end.

The case itself commits them, in three stages and without a worker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED, LOADS_FOLDER, Failure, Marker
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.documents import hash16
from tests.invariants import check_dataset
from worker.embedders.null import hash_vectors

Row = tuple[str, int, int]
"""(id, version, status)."""

# Loaded before the fault is due.
BASE: list[list[Row]] = [
    [("a", 1, EMBEDDED), ("b", 1, EMBEDDED), ("c", 1, EMBEDDED), ("d", 1, EMBEDDED), ("e", 1, EMBEDDED)],
    [("f", 1, EMBEDDED), ("g", 1, EMBEDDED), ("h", 1, EMBEDDED), ("i", 1, EMBEDDED), ("a", 2, EMBEDDED)],
]
# The fault hits while the first of these is loaded: new documents, an update of one that is there, two deletions.
NEXT: list[list[Row]] = [
    [("j", 1, EMBEDDED), ("k", 1, EMBEDDED), ("c", 2, EMBEDDED), ("f", 2, DELETED), ("h", 2, DELETED)],
    [("k", 2, FAILED), ("f", 3, EMBEDDED), ("l", 1, EMBEDDED), ("g", 2, DELETED)],
]
# Committed while the loader is dead or stands still: it overrules what was sent, and what is about to be sent.
LATE: list[list[Row]] = [
    [("j", 2, EMBEDDED), ("c", 3, DELETED), ("h", 3, EMBEDDED), ("d", 2, DELETED), ("m", 1, EMBEDDED)],
]
SHARDS = [*BASE, *NEXT, *LATE]


def commit_shards(dataset: Dataset, shards: Sequence[Sequence[Row]]) -> None:
    """Admit and commit these as the next shards."""
    for rows in shards:
        shard = len(dataset.admitted())
        origin = ShardOrigin(shard, "main")
        dataset.append_passages(shard, [_passage(*row) for row in rows], origin=origin)
        statuses = np.array([status for _, _, status in rows], dtype=np.uint8)
        vectors = hash_vectors([_text(id_, version) for id_, version, _ in rows], dataset.info.dimensions)
        vectors[statuses != EMBEDDED] = np.nan
        failures = tuple(
            Failure(number, id_, version, "content", "refused by the provider")
            for number, (id_, version, status) in enumerate(rows)
            if status == FAILED
        )
        dataset.commit(
            Marker(
                shard,
                statuses,
                dataset.info.embedder.fingerprint,
                "attempt",
                "worker",
                "2026-01-01T00:00:00+00:00",
                failures=failures,
                objects={
                    layout.documents_key(shard): dataset.describe_object(layout.documents_key(shard)),
                    layout.vectors_key(shard): dataset.create_vectors(shard, vectors),
                },
            )
        )


def applied(folder: Path) -> set[int]:
    """Shards that the ledger calls loaded, of the one collection of this dataset."""
    return {int(path.name[:8]) for path in folder.glob(f"{LOADS_FOLDER}/*/????????.json")}


def check_loaded(dataset: Dataset, found: dict[str, dict[str, object]]) -> None:
    """Raises AssertionError unless the collection has the newest decided version of every id, and nothing else.

    found: rows of the collection by id: `version`, `text`, `metadata` and `vector`, the bytes of its float32 in hex.
    """
    deciding: dict[str, tuple[int, int, int, int]] = {}
    for shard, rows in enumerate(SHARDS):
        for row, (id_, version, status) in enumerate(rows):
            if status != FAILED and version > deciding.get(id_, (0, 0, 0, 0))[0]:
                deciding[id_] = (version, status, shard, row)
    living = {id_: place for id_, place in deciding.items() if place[1] == EMBEDDED}
    assert found.keys() == living.keys(), (
        f"Milvus lacks {sorted(living.keys() - found.keys())} and has {sorted(found.keys() - living.keys())} too many"
    )
    for id_, (version, _, shard, row) in living.items():
        stored = np.asarray(dataset.vectors(shard)[row], dtype=np.float32)
        passage = _passage(id_, version, EMBEDDED)
        expected = {
            "version": version,
            "text": passage.text,
            "metadata": json.loads(passage.metadata),
            "vector": stored.tobytes().hex(),
        }
        assert found[id_] == expected, f"{id_} is {found[id_]} in Milvus, and should be {expected}"


def check_ledger(folder: Path) -> None:
    """Raises AssertionError unless every shard has its result and no intent is left over."""
    assert applied(folder) == set(range(len(SHARDS))), f"the ledger has results of {sorted(applied(folder))}"
    intents = [path.name for path in folder.glob(f"{LOADS_FOLDER}/*/*.intent.json")]
    assert not intents, f"intents are left over: {intents}"
    for shard, rows in enumerate(SHARDS):
        [path] = folder.glob(f"{LOADS_FOLDER}/*/{shard:08d}.json")
        result = json.loads(path.read_bytes())
        counted = sum(result[kind] for kind in ("upserted", "deleted", "superseded", "skipped"))
        assert counted == len(rows), f"the result of shard {shard} counts {counted} of {len(rows)} rows: {result}"
        described = Dataset.open(str(folder)).describe_object(layout.commit_key(shard))
        assert result["marker_crc32c"] == described.crc32c, f"the result of shard {shard} is of another marker"


def check_source(folder: Path) -> None:
    """The dataset itself is whole, and holds what was put into it."""
    newest: dict[str, str] = {}
    for rows in SHARDS:
        for id_, version, status in rows:
            newest.pop(id_, None)
            if status != DELETED:
                newest[id_] = _text(id_, version)
    check_dataset(folder, source=newest)


def _text(id_: str, version: int) -> str:
    return f"the {id_} in version {version}"


def _passage(id_: str, version: int, status: int) -> Passage:
    text, metadata = _text(id_, version), json.dumps({"version": version})
    return Passage(id_, text, metadata, version, hash16(text), hash16(metadata), deleted=status == DELETED)
