"""Which passages share a request."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embedmill.embedder import BatchLimits
from worker.packing import pack

limits = st.builds(
    BatchLimits, st.integers(1, 6), st.integers(1, 60), padded=st.booleans(), concurrency=st.integers(1, 3)
)
token_counts = st.lists(st.integers(1, 40), max_size=40)


def cost(batch: list[int], tokens: list[int], *, padded: bool) -> int:
    counts = [tokens[position] for position in batch]
    return len(counts) * max(counts) if padded else sum(counts)


@given(tokens=token_counts, limits=limits)
def test_every_passage_is_in_exactly_one_batch_and_no_batch_passes_a_limit(
    tokens: list[int], limits: BatchLimits
) -> None:
    batches = pack(tokens, limits=limits)
    assert sorted(position for batch in batches for position in batch) == list(range(len(tokens)))
    for batch in batches:
        assert 1 <= len(batch) <= limits.max_inputs
        assert len(batch) == 1 or cost(batch, tokens, padded=limits.padded) <= limits.max_tokens


@given(tokens=token_counts, limits=limits)
def test_a_batch_ends_only_where_the_next_passage_would_not_fit(tokens: list[int], limits: BatchLimits) -> None:
    batches = pack(tokens, limits=limits)
    for batch, following in pairwise(batches):
        grown = [*batch, following[0]]
        full = len(grown) > limits.max_inputs
        assert full or cost(grown, tokens, padded=limits.padded) > limits.max_tokens


@given(tokens=token_counts, limits=limits)
def test_the_order_of_the_source_is_kept_unless_padding_costs(tokens: list[int], limits: BatchLimits) -> None:
    order = [position for batch in pack(tokens, limits=limits) for position in batch]
    if limits.padded:
        assert [tokens[position] for position in order] == sorted(tokens, reverse=True)
    else:
        assert order == sorted(order)


def test_a_passage_over_the_limit_is_alone() -> None:
    limits = BatchLimits(max_inputs=8, max_tokens=10, padded=False, concurrency=1)
    assert pack([4, 99, 5, 5], limits=limits) == [[0], [1], [2, 3]]


def test_passages_of_like_length_share_a_padded_batch() -> None:
    limits = BatchLimits(max_inputs=8, max_tokens=20, padded=True, concurrency=1)
    assert pack([1, 10, 1, 10, 1], limits=limits) == [[1, 3], [0, 2, 4]]


def test_nothing_makes_no_batch() -> None:
    assert pack([], limits=BatchLimits(8, 10, padded=True, concurrency=1)) == []
