"""Which passages share a request. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from embedmill.embedder import BatchLimits

MAX_INPUTS, MOST_INPUTS = 512, 2_048
"""Passages of a request by default, and where short ones would use up the requests of a minute before its tokens."""
_MAX_REQUEST_TOKENS = 16_384
# A paced minute should hold a dozen requests, or the last one of a window weighs too much of the limit.
_REQUESTS_PER_MINUTE_OF_TOKENS = 12
# Requests are not all full: the last one of a shard, one whose next passage did not fit.
_LEAST_MARGIN = 1.25
_MOST_REQUEST_TOKENS = 131_072
# Estimates err: from this share of the model's limit on, a passage may be over it.
_PERHAPS_LONG = 0.8


def api_limits(
    *,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int,
    max_input_tokens: int,
    max_inputs: int = MAX_INPUTS,
    most_inputs: int = MOST_INPUTS,
    exact: bool = False,
) -> BatchLimits:
    """What a request should hold at a key's limits, so that its tokens run out before its requests.

    A request of `tokens_per_minute / requests_per_minute` tokens uses both up at once; one may hold more, but a dozen of
    them should fit into a minute. max_input_tokens: of one text, which always fits; exact: tokens are counted and not
    estimated, so that nobody needs a bill to know what was cut.
    """
    tokens, least = _MAX_REQUEST_TOKENS, 0
    if tokens_per_minute is not None:
        tokens = min(tokens, tokens_per_minute // _REQUESTS_PER_MINUTE_OF_TOKENS)
        if requests_per_minute is not None:
            bound = math.ceil(_LEAST_MARGIN * tokens_per_minute / requests_per_minute)
            least = min(bound, _MOST_REQUEST_TOKENS, tokens_per_minute // 2)
    alone = math.ceil(_PERHAPS_LONG * max_input_tokens)
    if alone < least:
        # So many requests of one passage would use up those of a minute: only what is over the limit for all we know.
        alone = max_input_tokens
    return BatchLimits(
        max_inputs=max_inputs,
        max_tokens=max(tokens, least, max_input_tokens),
        padded=False,
        concurrency=concurrency,
        least_tokens=least,
        most_inputs=max(max_inputs, most_inputs),
        alone_tokens=0 if exact else alone,
    )


def window_bounds(tokens: Sequence[int], *, limits: BatchLimits) -> list[tuple[int, int]]:
    """The windows of one document, as (first, end) positions into its passages: whole, or as few as hold it, balanced.

    A passage over the limit is a window of its own.
    """
    bounds: list[tuple[int, int]] = []
    first = 0
    while first < len(tokens):
        windows, end = _windows_needed(tokens, first, limits), _greedy_end(tokens, first, limits)
        if windows > 1:
            share = math.ceil(sum(tokens[first:]) / windows)
            balanced, cost = first + 1, tokens[first]
            while balanced < end and 2 * cost + tokens[balanced] <= 2 * share:
                cost += tokens[balanced]
                balanced += 1
            # What an even share leaves behind must not need a window more.
            if _windows_needed(tokens, balanced, limits) < windows:
                end = balanced
        bounds.append((first, end))
        first = end
    return bounds


def _greedy_end(tokens: Sequence[int], first: int, limits: BatchLimits) -> int:
    end, cost = first + 1, tokens[first]
    while end < len(tokens) and end - first < limits.max_inputs and cost + tokens[end] <= limits.max_tokens:
        cost += tokens[end]
        end += 1
    return end


def _windows_needed(tokens: Sequence[int], first: int, limits: BatchLimits) -> int:
    windows = 0
    while first < len(tokens):
        first = _greedy_end(tokens, first, limits)
        windows += 1
    return windows


def pack(tokens: Sequence[int], *, limits: BatchLimits) -> list[list[int]]:
    """Batches of positions into `tokens`, each within the limits; every position in exactly one batch.

    Where padding costs (`limits.padded`), passages of like length share a batch, since a batch costs its rows times its
    longest; elsewhere the order of the source is kept. A passage over the limit is alone in its batch, and so is one that is
    long enough to be cut.
    """
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i]) if limits.padded else range(len(tokens))
    batches: list[list[int]] = []
    batch: list[int] = []
    cost = longest = 0
    alone = limits.alone_tokens or math.inf
    for position in order:
        longest = max(longest, tokens[position]) if batch else tokens[position]
        grown = (len(batch) + 1) * longest if limits.padded else cost + tokens[position]
        full = len(batch) >= limits.max_inputs and (cost >= limits.least_tokens or len(batch) >= limits.most_inputs)
        if batch and (grown > limits.max_tokens or full or longest >= alone):
            batches.append(batch)
            batch, longest = [], tokens[position]
            grown = tokens[position]
        batch.append(position)
        cost = grown
    if batch:
        batches.append(batch)
    return batches
