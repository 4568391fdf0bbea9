"""Which rows of a committed shard go into the target, and what the target holds in the end. Pure: no I/O.

The state of an id is decided by its highest committed version that is embedded or deleted; a failed or cancelled version
decides nothing, so the one before it stays. Whatever order shards are applied in, the end is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset.deciding import Place, StatusOf, newest_decided
from embedmill.dataset.layout import DELETED, EMBEDDED

MAX_TEXT_BYTES = 65_535
MAX_METADATA_BYTES = 65_535


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """upsert: rows of the shard; delete: ids; superseded: rows that a higher version overrules; skipped: rows that decide
    nothing; superseding: the other shards that hold those higher versions."""

    upsert: tuple[int, ...]
    delete: tuple[str, ...]
    superseded: int
    skipped: int
    superseding: frozenset[int]


def plan_shard(
    shard: int,
    *,
    ids: Sequence[str],
    versions: Sequence[int],
    statuses: NDArray[np.uint8],
    known: Mapping[str, Sequence[Place]],
    status_of: StatusOf,
) -> ShardPlan:
    """What to do with each row of a shard. `known`: all places of each id in the log, of any version."""
    decided = [row for row in range(len(ids)) if int(statuses[row]) in (EMBEDDED, DELETED)]
    best: dict[str, int] = {}
    for row in decided:
        other = best.get(ids[row])
        if other is None or (versions[row], row) > (versions[other], other):
            best[ids[row]] = row
    upsert: list[int] = []
    delete: list[str] = []
    superseding: set[int] = set()
    for id_, row in best.items():
        higher = [place for place in known.get(id_, ()) if place[0] > versions[row] and place[1] != shard]
        winner = newest_decided(higher, status_of)
        if winner is not None:
            superseding.add(winner[1])
        elif int(statuses[row]) == DELETED:
            delete.append(id_)
        else:
            upsert.append(row)
    superseded = len(decided) - len(upsert) - len(delete)
    return ShardPlan(tuple(upsert), tuple(delete), superseded, len(ids) - len(decided), frozenset(superseding))


def cut_text(text: str, *, limit: int = MAX_TEXT_BYTES) -> tuple[str, bool]:
    """The text, cut at a character's border to at most `limit` UTF-8 bytes; whether it was cut."""
    if len(text) * 4 <= limit:
        return text, False
    data = text.encode()
    if len(data) <= limit:
        return text, False
    return data[:limit].decode(errors="ignore"), True


def parse_metadata(metadata: str | None) -> tuple[dict[str, Any], bool]:
    """The metadata as an object; empty, and True, when it is longer than Milvus takes."""
    if not metadata:
        return {}, False
    if len(metadata.encode()) > MAX_METADATA_BYTES:
        return {}, True
    value: dict[str, Any] = json.loads(metadata)
    return value, False
