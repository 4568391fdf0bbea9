"""Which passages share a request. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from embedmill.embedder import BatchLimits


def pack(tokens: Sequence[int], *, limits: BatchLimits) -> list[list[int]]:
    """Batches of positions into `tokens`, each within the limits; every position in exactly one batch.

    Where padding costs (`limits.padded`), passages of like length share a batch, since a batch costs its rows times its
    longest; elsewhere the order of the source is kept. A passage over the limit is alone in its batch.
    """
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i]) if limits.padded else range(len(tokens))
    batches: list[list[int]] = []
    batch: list[int] = []
    cost = longest = 0
    for position in order:
        longest = max(longest, tokens[position]) if batch else tokens[position]
        grown = (len(batch) + 1) * longest if limits.padded else cost + tokens[position]
        if batch and (grown > limits.max_tokens or len(batch) >= limits.max_inputs):
            batches.append(batch)
            batch, longest = [], tokens[position]
            grown = tokens[position]
        batch.append(position)
        cost = grown
    if batch:
        batches.append(batch)
    return batches
