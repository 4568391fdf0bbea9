"""How many tokens texts count, without their tokenizer: learned from what a provider billed for whole requests.

A text is described by how many of its characters are of which script; tokens are a weighted sum of these counts. The weights
start on the high side and follow each bill (a Kalman filter on relative error), so texts of another language are learned
within a few requests, and what was learned of one script is not forgotten while another one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .dataset.layout import TOKENS_KEY, from_json, to_json
from .dataset.store import Store
from .errors import CorruptStore, ObjectChanged

# Per feature: tokens each, before anything is learned, as the larger of what WordPiece, XLM-R and Qwen tokenizers take.
_PRIOR = {
    "text": 3.0,
    "latin word": 0.9,
    "other word": 0.9,
    "lower": 0.08,
    "upper": 0.25,
    "digit": 0.6,
    "space": 0.05,
    "symbol": 0.7,
    "latin accented": 0.5,
    "greek, cyrillic": 0.35,
    "hebrew, arabic": 0.6,
    "indic": 0.8,
    "thai to georgian": 0.8,
    "kana": 0.8,
    "hangul": 0.9,
    "han": 1.0,
    "other": 1.5,
}
_NAMES = tuple(_PRIOR)
_SPACE, _OTHER = _NAMES.index("space"), _NAMES.index("other")
_LATIN_WORD, _OTHER_WORD = _NAMES.index("latin word"), _NAMES.index("other word")
_LATIN = [_NAMES.index(name) for name in ("lower", "upper", "latin accented")]
_ALPHABETS = [_NAMES.index(name) for name in ("greek, cyrillic", "hebrew, arabic", "indic", "hangul")]
_RANGES = (
    (0x0000, 0x007F, "symbol"),
    (0x0030, 0x0039, "digit"),
    (0x0041, 0x005A, "upper"),
    (0x0061, 0x007A, "lower"),
    (0x0080, 0x00BF, "symbol"),
    (0x00C0, 0x024F, "latin accented"),
    (0x0250, 0x036F, "other"),
    (0x0370, 0x058F, "greek, cyrillic"),
    (0x0590, 0x08FF, "hebrew, arabic"),
    (0x0900, 0x0DFF, "indic"),
    (0x0E00, 0x10FF, "thai to georgian"),
    (0x1100, 0x11FF, "hangul"),
    (0x1200, 0x1DFF, "thai to georgian"),
    (0x1E00, 0x1EFF, "latin accented"),
    (0x1F00, 0x1FFF, "greek, cyrillic"),
    (0x2000, 0x206F, "symbol"),
    (0x3000, 0x303F, "symbol"),
    (0x3040, 0x30FF, "kana"),
    (0x3130, 0x318F, "hangul"),
    (0x3400, 0x9FFF, "han"),
    (0xAC00, 0xD7AF, "hangul"),
    (0xF900, 0xFAFF, "han"),
    (0xFF00, 0xFFEF, "symbol"),
    (0x20000, 0x323AF, "han"),
)
_WHITE = [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_LEAST_WEIGHT = 0.01
_NOISE = 0.05
_DRIFT = 0.002
_ERROR_MEMORY = 0.95
_STATE_VERSION = 1


class TokenEstimator:
    """Estimates for one model and task. Not thread-safe: one event loop, or one thread, uses it at a time.

    weights: tokens per feature, see `features`; bills: requests learned from; error: mean relative error of the last bills,
    as a fraction, 1 before the first.
    """

    def __init__(self) -> None:
        self.weights = np.array(list(_PRIOR.values()))
        self._prior_variance = np.square(0.6 * self.weights + 0.05)
        self._covariance = np.diag(self._prior_variance)
        self.bills = 0
        self.error = 1.0

    def estimate(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(n,) tokens, at least 1 each."""
        tokens: NDArray[np.float64] = features(texts) @ self.weights
        return np.maximum(tokens, 1.0)

    def learn(self, texts: Sequence[str], billed_tokens: int) -> None:
        """Take in what these texts were billed together, as one request."""
        if billed_tokens <= 0 or not texts:
            return
        total = features(texts).sum(axis=0)
        missed = abs(float(total @ self.weights) / billed_tokens - 1.0)
        memory = min(_ERROR_MEMORY, self.bills / (self.bills + 1))
        self.error = memory * self.error + (1 - memory) * min(missed, 1.0)
        self.bills += 1
        relative = total / billed_tokens
        spread = self._covariance @ relative
        gain = spread / (_NOISE**2 + relative @ spread)
        self.weights = np.maximum(self.weights + gain * (1.0 - relative @ self.weights), _LEAST_WEIGHT)
        covariance = self._covariance - np.outer(gain, spread)
        covariance[np.diag_indices_from(covariance)] += _DRIFT * self._prior_variance
        # What is not seen for long is no less certain than it was at the start.
        shrink = np.sqrt(np.minimum(1.0, self._prior_variance / np.diag(covariance)))
        self._covariance = covariance * np.outer(shrink, shrink)

    def adopt(self, other: TokenEstimator) -> None:
        """Go on from what another one learned."""
        self.weights, self._covariance = other.weights.copy(), other._covariance.copy()
        self.bills, self.error = other.bills, other.error

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "features": list(_NAMES),
            "weights": self.weights.tolist(),
            "covariance": self._covariance.tolist(),
            "bills": self.bills,
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, state: Any) -> TokenEstimator:
        """What `as_dict` gave. Of another version: nothing was learned. Raises CorruptStore for what is no such state."""
        estimator = cls()
        try:
            if state["version"] != _STATE_VERSION or state["features"] != list(_NAMES):
                return estimator
            weights, covariance = np.array(state["weights"], float), np.array(state["covariance"], float)
            bills, error = int(state["bills"]), float(state["error"])
        except (KeyError, TypeError, ValueError) as problem:
            raise CorruptStore(f"what was learned of token counts cannot be read: {problem!r}") from problem
        size = len(_NAMES)
        if weights.shape != (size,) or covariance.shape != (size, size) or not np.isfinite(covariance).all():
            raise CorruptStore("what was learned of token counts has the wrong shape")
        if not (np.isfinite(weights).all() and weights.min() > 0 and np.isfinite(error)):
            raise CorruptStore("what was learned of token counts is not finite")
        estimator.weights, estimator._covariance = weights, covariance
        estimator.bills, estimator.error = bills, error
        return estimator


@runtime_checkable
class LearnsTokens(Protocol):
    """An embedder that does not have the tokenizer of its model."""

    @property
    def estimator(self) -> TokenEstimator: ...


def read_estimates(store: Store) -> TokenEstimator | None:
    """What the workers of a dataset have learned. Raises CorruptStore."""
    data = store.read_or_none(TOKENS_KEY)
    return None if data is None else TokenEstimator.from_dict(from_json(data, name=TOKENS_KEY))


def write_estimates(store: Store, estimator: TokenEstimator) -> None:
    """Keep it beside the dataset, unless more is known there. Blocking."""
    try:
        current = store.read_or_none(TOKENS_KEY)
        known = None if current is None else TokenEstimator.from_dict(from_json(current, name=TOKENS_KEY))
    except CorruptStore:
        known = None
    if known is None or known.bills < estimator.bills:
        with suppress(ObjectChanged):
            store.swap(TOKENS_KEY, to_json(estimator.as_dict()), expected=current)


def features(texts: Sequence[str]) -> NDArray[np.float64]:
    """(n, 17) counts: 1 for the text itself, words begun in Latin and in other alphabets, characters of each class."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    # The code points of all texts, one after the other; a lone surrogate is one, too.
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    classes = _classes()[points]
    size = len(_NAMES)
    offsets = np.repeat(np.arange(len(texts)) * size, lengths)
    counts = np.bincount(offsets + classes, minlength=len(texts) * size).reshape(len(texts), size).astype(np.float64)
    counts[:, 0] = 1.0
    if len(points):
        inside = _word_class()[classes]
        begins = inside != 0
        begins[1:] &= inside[:-1] == 0
        starts = np.cumsum(lengths)[:-1]
        starts = starts[starts < len(points)]
        begins[starts] = inside[starts] != 0
        at = np.flatnonzero(begins)
        words = np.bincount(offsets[at] + inside[at], minlength=len(texts) * size).reshape(len(texts), size)
        counts[:, _LATIN_WORD] = words[:, _LATIN_WORD]
        counts[:, _OTHER_WORD] = words[:, _OTHER_WORD]
    return counts


@cache
def _classes() -> NDArray[np.uint8]:
    table = np.full(0x110000, _OTHER, np.uint8)
    for first, last, name in _RANGES:
        table[first : last + 1] = _NAMES.index(name)
    table[_WHITE] = _SPACE
    return table


@cache
def _word_class() -> NDArray[np.uint8]:
    """By class, the feature that a word begun with it counts for; 0 for what makes no words."""
    table = np.zeros(len(_NAMES), np.uint8)
    table[_LATIN] = _LATIN_WORD
    table[_ALPHABETS] = _OTHER_WORD
    return table
