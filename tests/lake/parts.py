"""One part in one process. Writers admit and commit shards of a few small rows; the others look at what is there.

Item N of writer W is the same rows whenever it is written: new ids, the next version of the writer's hot id, now and then a
deletion. A writer goes on where the log left it, as a push does.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embedmill import open_dataset
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.passages import Passage, ShardOrigin, SourcePosition
from embedmill.documents import Cursor, hash16
from embedmill.errors import ConfigurationError, ObjectExists, SnapshotOutdated
from worker.commit import commit_shard
from worker.embedders.null import hash_vectors
from worker.results import Increment, ShardResults

WRITERS = 4
GRACE_S = 15.0
_DELETES_EVERY = 7


def rows_of(writer: int, item: int) -> list[Passage]:
    """The rows of an item, newest versions of ids that nobody else writes."""
    chance = random.Random(writer * 1_000_003 + item)
    texts = {f"{writer}-{item}-{row}": f"text {chance.random()}" for row in range(chance.randint(1, 12))}
    rows = [_passage(id_, text) for id_, text in texts.items()]
    rows.append(_passage(f"hot-{writer}", f"version {item} {chance.random()}", version=item + 1))
    if item % _DELETES_EVERY == 0 and item:
        rows.append(_passage(f"{writer}-{item - 1}-0", "", version=2, deleted=True))
    return rows


def write(dataset: Dataset, writer: int, items: int) -> None:
    """Every item of this writer that the log does not have, and whatever of it is still owed."""
    index = dataset.open_index()
    key = f"writer-{writer}"
    for shard in dataset.owed():
        if any(source.push_key == key for source in dataset.origin(shard).sources):
            _commit(dataset, shard)
    cursor = index.cursor(key)
    for item in range(cursor.record if cursor else 0, items):
        while True:
            shard = index.next_shard
            origin = ShardOrigin(shard, "main", (SourcePosition(key, key, Cursor(record=item + 1), 0),))
            try:
                table = dataset.append_passages(shard, rows_of(writer, item), origin=origin)
            except ObjectExists:
                dataset.catch_up(index)
                continue
            index.absorb(shard, table, origin)
            break
        _commit(dataset, shard)
    index.close()


def read(dataset: Dataset, report: Path, is_over: Callable[[], bool]) -> None:
    """Look at everything, again and again: no wrong row, no half one, and no id vanishes that nobody deleted."""
    seen: set[str] = set()
    passes = rows = outdated = 0
    reader = open_dataset(dataset.url)
    while not is_over():
        reader.refresh()
        found: set[str] = set()
        try:
            for block in reader.blocks(columns=("text",)):
                _check(block.ids, block.documents["text"].to_pylist(), block.vectors)
                ids = [str(id_) for id_ in block.ids]
                assert not found.intersection(ids), "an id was shown twice"
                found.update(ids)
        except SnapshotOutdated:
            outdated += 1
            continue
        vanished = {id_ for id_ in seen - found if not _may_be_deleted(id_)}
        assert not vanished, f"{len(vanished)} ids are gone, for example {sorted(vanished)[:3]}"
        seen |= found
        passes, rows = passes + 1, rows + len(found)
    report.write_text(json.dumps({"passes": passes, "rows": rows, "outdated": outdated}))


def follow(dataset: Dataset, report: Path, is_over: Callable[[], bool]) -> None:
    """Take what is new until the end; in the end it must be what there is. Who falls behind the grace time begins anew."""
    anew = 0
    while True:
        try:
            held, given = _held_in_the_end(dataset, is_over)
        except SnapshotOutdated:
            anew += 1
            continue
        break
    last = {
        str(id_): vector.tobytes()
        for block in open_dataset(dataset.url).blocks()
        for id_, vector in zip(block.ids, block.vectors, strict=True)
    }
    differing = held.keys() ^ last.keys()
    assert not differing, f"{len(differing)} ids differ: {sorted(differing)[:3]}"
    assert held == last
    report.write_text(json.dumps({"given": given, "held": len(held), "anew": anew}))


def _held_in_the_end(dataset: Dataset, is_over: Callable[[], bool]) -> tuple[dict[str, bytes], int]:
    held: dict[str, bytes] = {}
    given = 0
    for block in open_dataset(dataset.url).follow(columns=("text",), poll_s=0.1, until=is_over):
        _check(block.ids, block.documents["text"].to_pylist(), block.vectors)
        given += len(block.ids)
        for id_, vector in zip(block.ids, block.vectors, strict=True):
            held[str(id_)] = vector.tobytes()
        for id_ in block.deleted:
            held.pop(str(id_), None)
    return held, given


def keep_compact(dataset: Dataset, report: Path, is_over: Callable[[], bool]) -> None:
    while not is_over():
        try:
            found = compact(dataset, grace_s=GRACE_S)
        except ConfigurationError:
            # One that was killed holds the lock until it is gone.
            time.sleep(0.05)
            continue
        assert not found.problems, found.problems
        report.write_text(json.dumps({"switches": len(dataset.retirements())}))
        time.sleep(0.3)


def _commit(dataset: Dataset, shard: int) -> None:
    table, origin = dataset.documents(shard)
    results = ShardResults(table.num_rows, dataset.info.dimensions)
    deleted = [row for row, gone in enumerate(table["deleted"].to_pylist()) if gone]
    results.delete(deleted)
    rows = np.array([row for row in range(table.num_rows) if row not in deleted], dtype=np.int32)
    texts = [str(table["text"][int(row)]) for row in rows]
    results.add(Increment(rows, hash_vectors(texts, dataset.info.dimensions)))
    ids, versions = table["id"].to_pylist(), table["version"].to_pylist()
    commit_shard(
        dataset, shard, results, origin=origin, passages=list(zip(map(str, ids), map(int, versions), strict=True)),
        attempt=f"{time.monotonic_ns()}", worker="lake",
    )  # fmt: skip


def _check(ids: object, texts: list[str], vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(
        vectors, hash_vectors(texts, vectors.shape[1]).astype(vectors.dtype), err_msg=str(ids)
    )


def _may_be_deleted(id_: str) -> bool:
    """Row 0 of the item before each that deletes."""
    parts = id_.split("-")
    return len(parts) == 3 and parts[2] == "0" and (int(parts[1]) + 1) % _DELETES_EVERY == 0


def _passage(id_: str, text: str, *, version: int = 1, deleted: bool = False) -> Passage:
    return Passage(id_, text, "{}", version, hash16(text), hash16("{}"), deleted)


def main(part: str, url: str, *rest: str) -> None:
    dataset = Dataset.open(url)
    if part == "writer":
        write(dataset, int(rest[0]), int(rest[1]))
        return
    report, over = Path(rest[0]), Path(rest[1])
    {"reader": read, "follower": follow, "compactor": keep_compact}[part](dataset, report, over.exists)


if __name__ == "__main__":
    main(*sys.argv[1:])
