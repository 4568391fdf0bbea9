"""What is known of one shard so far: a vector or a failure per row, and what of it is not yet kept anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED, OWED, Failure


@dataclass(frozen=True, slots=True)
class Increment:
    """Results that arrived together: rows (m,) int32 with vectors (m, dimensions) float32, failures, and their price."""

    rows: NDArray[np.int32]
    vectors: NDArray[np.float32]
    failures: tuple[Failure, ...] = ()
    truncated: tuple[int, ...] = ()
    billed_tokens: int = 0
    requests: int = 0

    @property
    def empty(self) -> bool:
        return not (len(self.rows) or self.failures or self.billed_tokens or self.requests)


@dataclass(slots=True)
class ShardResults:
    """The rows of one shard. A row keeps its first vector, whoever brings another. A vector takes the place of a failure:
    it proves that the passage can be embedded."""

    rows: int
    dimensions: int
    vectors: NDArray[np.float32] = field(init=False)
    statuses: NDArray[np.uint8] = field(init=False)
    failures: dict[int, Failure] = field(default_factory=dict)
    truncated: set[int] = field(default_factory=set)
    billed_tokens: int = 0
    requests: int = 0
    _unkept: list[Increment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vectors = np.full((self.rows, self.dimensions), np.nan, dtype=np.float32)
        self.statuses = np.full(self.rows, OWED, dtype=np.uint8)

    def owed(self) -> list[int]:
        """Rows without a result, in order."""
        return [int(row) for row in np.flatnonzero(self.statuses == OWED)]

    def delete(self, rows: Iterable[int], *, cancelled: bool = False) -> None:
        """Rows that are to have no vector."""
        for row in rows:
            self.statuses[row] = CANCELLED if cancelled else DELETED

    def add(self, increment: Increment, *, kept: bool = False) -> int:
        """Take results; how many rows were new. `kept`: they stand in a checkpoint already."""
        new = [position for position, row in enumerate(increment.rows) if self.statuses[row] in (OWED, FAILED)]
        rows = increment.rows[new]
        self.vectors[rows] = increment.vectors[new]
        self.statuses[rows] = EMBEDDED
        for row in rows:
            self.failures.pop(int(row), None)
        for failure in increment.failures:
            if self.statuses[failure.row] == OWED:
                self.statuses[failure.row] = FAILED
                self.failures[failure.row] = failure
        self.truncated.update(increment.truncated)
        self.billed_tokens += increment.billed_tokens
        self.requests += increment.requests
        if not kept:
            self._unkept.append(increment)
        return len(new)

    def take_unkept(self) -> Increment:
        """Everything since the last call, in one piece."""
        pending, self._unkept = self._unkept, []
        return merge(pending, dimensions=self.dimensions)

    def put_back(self, increment: Increment) -> None:
        """What `take_unkept` gave could not be kept after all."""
        self._unkept.insert(0, increment)


def merge(increments: Sequence[Increment], *, dimensions: int) -> Increment:
    """One increment with the content of all."""
    none = np.empty((0, dimensions), dtype=np.float32)
    return Increment(
        rows=np.concatenate([np.empty(0, np.int32), *(i.rows for i in increments)]).astype(np.int32),
        vectors=np.concatenate([none, *(i.vectors for i in increments)]),
        failures=tuple(failure for i in increments for failure in i.failures),
        truncated=tuple(row for i in increments for row in i.truncated),
        billed_tokens=sum(i.billed_tokens for i in increments),
        requests=sum(i.requests for i in increments),
    )
