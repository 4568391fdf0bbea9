"""What is known of one shard so far: a vector or a failure per row, and what of it is not yet kept anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED, OWED, Failure


@dataclass(frozen=True, slots=True)
class Increment:
    """Results that arrived together: rows (m,) int32 with vectors (m, dimensions) float32, failures, and their price.

    windows: with late chunking, which of the rows were embedded together.
    """

    rows: NDArray[np.int32]
    vectors: NDArray[np.float32]
    failures: tuple[Failure, ...] = ()
    truncated: tuple[int, ...] = ()
    billed_tokens: int = 0
    requests: int = 0
    windows: tuple[tuple[int, ...], ...] = ()

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
    _window_of: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _unkept: list[Increment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vectors = np.full((self.rows, self.dimensions), np.nan, dtype=np.float32)
        self.statuses = np.full(self.rows, OWED, dtype=np.uint8)

    def owed(self) -> list[int]:
        """Rows without a result, in order."""
        return [int(row) for row in np.flatnonzero(self.statuses == OWED)]

    @property
    def embedded(self) -> int:
        """Rows with a vector."""
        return int(np.count_nonzero(self.statuses == EMBEDDED))

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """Which rows were embedded together."""
        return self._windows_of(self._window_of)

    def window_of(self, row: int) -> tuple[int, ...]:
        """The rows that a row was embedded together with, itself included; none where nothing is known of it."""
        return self._window_of.get(row, ())

    def _windows_of(self, rows: Iterable[int]) -> list[tuple[int, ...]]:
        """Each window of these rows, once."""
        found = {id(window): window for row in rows if (window := self.window_of(row))}
        return list(found.values())

    def delete(self, rows: Iterable[int], *, cancelled: bool = False) -> None:
        """Rows that are to have no vector."""
        for row in rows:
            self.statuses[row] = CANCELLED if cancelled else DELETED

    def owe_again(self, rows: Iterable[int]) -> None:
        """Give up vectors that are of no use without their neighbours', and whatever was embedded together with them."""
        again = set(rows)
        for window in self._windows_of(again):
            again.update(row for row in window if self.statuses[row] == EMBEDDED)
            for row in window:
                self._window_of.pop(row, None)
        for row in again:
            self.statuses[row] = OWED
            self.vectors[row] = np.nan

    def add(self, increment: Increment, *, kept: bool = False) -> int:
        """Take results; how many rows were new. `kept`: they stand in a checkpoint already."""
        increment = self._without_torn(increment)
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
        self._window_of.update((row, window) for window in increment.windows for row in window)
        if not kept:
            self._unkept.append(increment)
        return len(new)

    def _without_torn(self, increment: Increment) -> Increment:
        """Rows that were embedded together are taken together. Where attempts differ, the larger window is taken, whoever
        comes first."""
        for rows in increment.windows:
            within = [window for window in self._windows_of(rows) if set(window) < set(rows)]
            self.owe_again(row for window in within for row in window if self.statuses[row] == EMBEDDED)
        torn = {rows for rows in increment.windows if any(self.statuses[row] == EMBEDDED for row in rows)}
        if not torn:
            return increment
        left_out = {row for rows in torn for row in rows}
        positions = [position for position, row in enumerate(increment.rows) if int(row) not in left_out]
        return replace(
            increment,
            rows=increment.rows[positions],
            vectors=increment.vectors[positions],
            windows=tuple(rows for rows in increment.windows if rows not in torn),
        )

    def take_unkept(self) -> Increment:
        """Everything since the last call, in one piece."""
        pending, self._unkept = self._unkept, []
        return merge(pending, dimensions=self.dimensions)

    def put_back(self, increment: Increment) -> None:
        """What `take_unkept` gave could not be kept after all."""
        self._unkept.insert(0, increment)


def billed_only(tokens: int, *, requests: int = 0, dimensions: int) -> Increment:
    """What was paid without a row to show for it."""
    none = np.empty((0, dimensions), dtype=np.float32)
    return Increment(np.empty(0, np.int32), none, billed_tokens=tokens, requests=requests)


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
        windows=tuple(rows for i in increments for rows in i.windows),
    )
