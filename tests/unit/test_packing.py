"""Which passages share a request."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.commands.embedders import request_limits
from embedmill.embedder import BatchLimits
from embedmill.models import TIERS
from worker.packing import api_limits, pack

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


@pytest.mark.parametrize("tier", ["free", "paid", "premium"])
@pytest.mark.parametrize("length", [5, 10, 20, 50, 200, 1_000, 8_000])
@pytest.mark.parametrize("model", ["jina/jina-embeddings-v3", "jina/jina-embeddings-v4"])
def test_requests_run_out_of_tokens_before_requests_at_every_tier(tier: str, length: int, model: str) -> None:
    limits = request_limits(model, TIERS[tier])
    requests = pack([length] * 20_000, limits=limits)[:-1]
    held = sum(map(len, requests)) * length / len(requests)
    assert held * TIERS[tier].requests >= TIERS[tier].tokens
    assert max(map(len, requests)) <= 2_048


@pytest.mark.parametrize(
    ("tier", "shortest"),
    # 2,048 passages of fewer tokens use up a minute's requests first, whatever is done.
    [("free", 1), ("paid", 2), ("premium", 5)],
)
def test_the_shortest_passages_with_which_tokens_run_out_first(tier: str, shortest: int) -> None:
    limits, plan = request_limits("jina/jina-embeddings-v3", TIERS[tier]), TIERS[tier]

    def token_bound(length: int) -> bool:
        return len(pack([length] * 50_000, limits=limits)[0]) * length * plan.requests >= plan.tokens

    assert token_bound(shortest)
    assert shortest == 1 or not token_bound(shortest - 1)


def test_five_hundred_and_twelve_passages_are_the_rule_and_short_ones_go_beyond_it_only_as_far_as_they_must() -> None:
    limits = api_limits(requests_per_minute=5_000, tokens_per_minute=50_000_000, concurrency=1, max_input_tokens=8_192)
    assert limits.least_tokens == 12_500
    assert len(pack([30] * 2_000, limits=limits)[0]) == 512
    assert len(pack([10] * 4_000, limits=limits)[0]) == 1_250
    assert len(pack([5] * 5_000, limits=limits)[0]) == 2_048


def test_few_requests_a_minute_make_larger_requests() -> None:
    limits = api_limits(requests_per_minute=60, tokens_per_minute=5_000_000, concurrency=1, max_input_tokens=8_192)
    requests = pack([500] * 2_000, limits=limits)
    assert sum(map(len, requests[:-1])) * 500 / (len(requests) - 1) * 60 >= 5_000_000


def test_a_dozen_requests_fit_into_a_minute_of_a_small_key_and_one_passage_always_fits() -> None:
    free = api_limits(requests_per_minute=100, tokens_per_minute=100_000, concurrency=2, max_input_tokens=8_192)
    assert (free.max_tokens, free.least_tokens) == (8_333, 1_250)
    tiny = api_limits(requests_per_minute=100, tokens_per_minute=1_000, concurrency=2, max_input_tokens=8_192)
    assert tiny.max_tokens == 8_192


def test_a_passage_that_may_be_cut_goes_alone() -> None:
    limits = api_limits(requests_per_minute=None, tokens_per_minute=None, concurrency=1, max_input_tokens=8_192)
    assert pack([10, 7_000, 10, 6_000, 10], limits=limits) == [[0], [1], [2, 3, 4]]


def test_where_lone_passages_would_use_up_the_requests_only_those_over_the_limit_go_alone() -> None:
    limits = request_limits("jina/jina-embeddings-v3", TIERS["premium"])
    assert pack([10, 8_000, 10, 8_192, 10], limits=limits) == [[0, 1, 2], [3], [4]]
