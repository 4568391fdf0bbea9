"""What providers ask per token. Prices change: each has its date and where it stood, and `--price` overrides it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Price:
    """usd: for a million tokens; as_of: a date, ISO 8601, empty when the user said it; source: where it stood."""

    usd: float
    as_of: str
    source: str

    def of(self, tokens: float) -> float:
        """USD."""
        return tokens * self.usd / 1e6


# Jina's description of its API gives one price as an example; the others were not published where we could read them.
PRICES = {"jina/jina-embeddings-v3": Price(0.05, "2026-04-02", "Jina's API description")}


def price_of(model: str, *, usd: float | None) -> Price | None:
    """What the user says, else what is published, else None: nobody knows. A local model costs nothing."""
    if usd is not None:
        return Price(usd, "", "--price")
    if model.startswith(("local/", "null/")):
        return Price(0.0, "", "a local model")
    return PRICES.get(model)
