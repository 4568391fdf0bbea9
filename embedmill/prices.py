"""What providers ask per token. Prices change: each has its date and where it stood, and `--price` overrides it."""

from __future__ import annotations

from dataclasses import dataclass

from .embedder import is_local


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
    if is_local(model):
        return Price(0.0, "", "a local model")
    return PRICES.get(model)


def usd_of(model: str, tokens: float) -> float | None:
    """What these tokens cost, as published; None where nobody knows."""
    price = price_of(model, usd=None)
    return None if price is None else round(price.of(tokens), 6)


def usd_words(model: str, tokens: float) -> str:
    """`, 0.0512 USD`, where the price is known and not zero; else nothing."""
    usd = usd_of(model, tokens)
    return f", {usd:,.4f} USD" if usd else ""
