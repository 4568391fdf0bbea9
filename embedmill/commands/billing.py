"""The true bill, from what a provider said of each request, and beside it what a quote would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.requesting import WorkerCounts

from ..dataset.dataset import Dataset
from ..embedder import is_local
from ..prices import usd_of, usd_words
from ..token_estimates import TokenEstimator, read_estimates


@dataclass(frozen=True, slots=True)
class Bill:
    """What one run was billed. tokens: for all answers, also those to controls and to the probe, and those that could not be
    used; unknown_tokens: estimate for requests whose answer was lost; quoted_tokens: None where nothing has to be estimated.
    """

    model: str
    tokens: int
    unknown_tokens: int
    quoted_tokens: int | None

    @classmethod
    def of(cls, model: str, counts: WorkerCounts, *, probed_tokens: int) -> Bill:
        quoted = None if counts.quoted_tokens is None else round(counts.quoted_tokens)
        return cls(model, counts.tokens + counts.control_tokens + probed_tokens, counts.lost_tokens, quoted)

    def words(self) -> list[str]:
        """Lines for people, the first without its label; the second stands beside it."""
        if is_local(self.model):
            return [f"{self.tokens:,}"]
        lines = [f"{self.tokens:,} billed{usd_words(self.model, self.tokens)}"]
        if self.quoted_tokens:
            off = self.tokens / self.quoted_tokens - 1
            than = f"{abs(100 * off):.1f} % {'more' if off > 0 else 'less'}"
            lines.append(
                f"{self.quoted_tokens:,}{usd_words(self.model, self.quoted_tokens)} for the same passages: billed was {than}"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "usd": usd_of(self.model, self.tokens),
            "unknown_tokens": self.unknown_tokens,
            "quoted_tokens": self.quoted_tokens,
            "quoted_usd": None if self.quoted_tokens is None else usd_of(self.model, self.quoted_tokens),
        }


def price_lines(model: str, tokens: float) -> list[str]:
    """What a dataset's tokens came to, where the price is known and not zero."""
    usd = usd_words(model, tokens)
    return [f"  price       {usd.removeprefix(', ')} for the tokens billed"] if usd else []


def quoted_tokens(dataset: Dataset) -> Callable[[Sequence[str]], NDArray[np.float64]]:
    """What `embedmill quote --to DATASET` counts for a text at this moment, whatever is learned from now on."""
    estimator = read_estimates(dataset.store) or TokenEstimator()
    limit = dataset.info.embedder.max_input_tokens

    def count(texts: Sequence[str]) -> NDArray[np.float64]:
        tokens = estimator.estimate(texts)
        return np.minimum(tokens, limit) if limit else tokens

    return count
