"""The integrity gate: nothing becomes durable that is not one finite, non-zero vector per text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FLOAT32: np.dtype[np.floating] = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class GateReport:
    """bad: position -> cause, for the rows that may not pass; whole: why the answer as a whole may not pass; alike:
    different texts all have one vector: a broken provider, or texts that differ only behind the cut."""

    bad: dict[int, str]
    whole: str | None = None
    alike: bool = False

    @property
    def passed(self) -> bool:
        return not self.bad and self.whole is None and not self.alike


def inspect(
    vectors: NDArray[np.floating],
    texts: Sequence[str],
    *,
    dimensions: int,
    dtype: np.dtype[np.floating] = _FLOAT32,
) -> GateReport:
    """Check an answer: (n, dimensions), finite also as `dtype`, not zero, not all alike for different texts."""
    if vectors.ndim != 2 or len(vectors) != len(texts):
        return GateReport({}, f"{len(texts)} texts went out and an answer of shape {vectors.shape} came back")
    if vectors.shape[1] != dimensions:
        return GateReport({}, f"vectors of {vectors.shape[1]} dimensions came back instead of {dimensions}")
    finite = (np.abs(vectors) <= np.finfo(dtype).max).all(axis=1)
    zero = ~vectors.any(axis=1)
    bad = {int(row): "the vector has a value that is not finite" for row in np.flatnonzero(~finite)}
    bad |= {int(row): "the vector is zero" for row in np.flatnonzero(zero & finite)}
    alike = not bad and len(set(texts)) > 1 and bool((vectors == vectors[0]).all())
    return GateReport(bad, alike=alike)
