"""The integrity gate: nothing becomes durable that is not one finite, non-zero vector per text. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedmill.embedder import EmbedderSpec, is_local
from embedmill.token_bounds import most_tokens

_FLOAT32: np.dtype[np.floating] = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class GateReport:
    """bad: position -> cause, for the rows that may not pass; whole: why the answer as a whole may not pass; alike:
    different texts all have one vector: a broken provider, or texts for which `may_share_vector` holds."""

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


def may_share_vector(texts: Sequence[str], spec: EmbedderSpec) -> bool:
    """Whether a model that is well may have one vector for all of these different texts.

    Of an API: when each may be cut, so that they differ behind the cut only, or when they are one text to tokenizers that
    fold case, accents and blanks. A local model is believed whatever the texts: there is nobody between it and us, and its
    vocabulary may know no character of them.
    """
    return is_local(spec.model) or may_all_be_cut(texts, spec) or len(set(map(_folded, texts))) == 1


def may_all_be_cut(texts: Sequence[str], spec: EmbedderSpec) -> bool:
    """Whether none of these texts is certain to reach the model whole."""
    limit = spec.max_input_tokens
    cuts = limit > 0 and spec.options.get("truncate") is not False
    return cuts and all(most_tokens([text]) >= limit for text in texts)


def _folded(text: str) -> str:
    """Without case, accents, blanks and control characters."""
    characters = unicodedata.normalize("NFKD", text.casefold())
    return "".join(
        one for one in characters if unicodedata.category(one)[0] not in "ZC" and not unicodedata.combining(one)
    )
