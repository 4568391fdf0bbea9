"""The simulator's windows and accounts, on a clock that the test holds."""

import time

import pytest

from embedmill.rehearsal.accounts import Account, Payments
from embedmill.rehearsal.behaviour import Rehearsal
from embedmill.rehearsal.limits import FixedWindow, SlidingLog, TokenBucket
from embedmill.rehearsal.refusals import Refused

MODES = ["sliding", "fixed", "bucket"]


def account(**limits):
    return Account(Rehearsal(**limits), now=0.0, began=0.0, reset=0.0)


def admitted(account, tokens, *, now):
    try:
        account.admit(tokens, now=now)
    except Refused:
        return False
    account.leave()
    return True


def refusal(account, tokens, *, now):
    with pytest.raises(Refused) as caught:
        account.admit(tokens, now=now)
    return caught.value


@pytest.mark.parametrize("mode", MODES)
def test_a_quota_fits_at_once_and_nothing_more(mode):
    key = account(rpm=10, tpm=1_000, window=mode)
    assert [admitted(key, 100, now=0.0) for _ in range(11)] == [True] * 10 + [False]


def test_a_sliding_window_gives_back_what_is_older_than_a_minute_and_no_sooner():
    key = account(tpm=100)
    assert admitted(key, 60, now=0.0)
    assert admitted(key, 40, now=30.0)
    assert not admitted(key, 1, now=59.9)
    assert admitted(key, 60, now=60.0)
    assert not admitted(key, 1, now=89.9)
    assert admitted(key, 40, now=90.0)


def test_two_quotas_fit_around_the_end_of_a_fixed_window():
    key = account(tpm=100, window="fixed")
    assert admitted(key, 1, now=10.0)
    assert admitted(key, 99, now=69.9)
    assert not admitted(key, 1, now=69.95)
    assert admitted(key, 100, now=70.0)
    assert key.lifetime.peak_window_tokens == 199


def test_a_fixed_window_opens_with_the_first_request_after_the_last_one():
    key = account(tpm=100, window="fixed")
    assert admitted(key, 100, now=10.0)
    assert admitted(key, 100, now=125.0)
    assert not admitted(key, 1, now=184.9)
    assert admitted(key, 1, now=185.0)


def test_a_bucket_is_refilled_evenly_and_holds_one_quota():
    key = account(tpm=600, window="bucket")
    assert admitted(key, 600, now=0.0)
    assert not admitted(key, 11, now=1.0)
    assert admitted(key, 10, now=1.0)
    assert admitted(key, 600, now=1_000.0)
    assert not admitted(key, 1, now=1_000.0)


@pytest.mark.parametrize("mode", MODES)
def test_over_many_windows_a_greedy_client_gets_the_quota_of_each(mode):
    key = account(tpm=1_000, window=mode)
    got = sum(admitted(key, 10, now=step / 10) * 10 for step in range(6_000))
    assert 10_000 <= got <= 11_000


def test_refused_requests_count_only_where_that_is_asked_for():
    lenient, strict = account(rpm=2, tpm=100), account(rpm=2, tpm=100, count_refused=True)
    for key in (lenient, strict):
        assert not admitted(key, 101, now=0.0)
        assert not admitted(key, 101, now=1.0)
    assert admitted(lenient, 100, now=2.0)
    assert refusal(strict, 100, now=2.0).kind == "RATE_REQUEST_LIMIT_EXCEEDED"


def test_each_refusal_names_what_was_used_and_the_limit():
    key = account(rpm=2, tpm=1_500, concurrency=1)
    key.admit(1_400, now=0.0)
    assert "Concurrency limit exceeded: 1/1 concurrent requests." in str(refusal(key, 1, now=1.0))
    key.leave()
    assert "Token rate limit exceeded: 1,501/1,500 tokens per minute." in str(refusal(key, 101, now=1.0))
    assert admitted(key, 100, now=1.0)
    assert "Request rate limit exceeded: 2/2 requests per minute." in str(refusal(key, 1, now=2.0))


@pytest.mark.parametrize("mode", ["sliding", "bucket"])
def test_a_stranger_takes_his_share_and_a_greedy_client_gets_the_rest(mode):
    key = account(rpm=100, tpm=10_000, other_client=0.3, window=mode)
    got = [admitted(key, 100, now=now / 10) * 100 for now in range(7_200)]
    assert sum(got[1_200:]) == pytest.approx(70_000, rel=0.05)
    assert key.lifetime.other_client_tokens == pytest.approx(36_000, rel=0.02)


def test_a_stranger_counts_while_nobody_else_asks():
    key = account(rpm=100, tpm=10_000, other_client=0.3)
    assert key.used(600.0).tokens == pytest.approx(3_000, rel=0.05)
    assert key.used(600.0).requests == pytest.approx(30, abs=1)
    assert key.lifetime.peak_window_tokens == 0


@pytest.mark.parametrize("make", [SlidingLog, FixedWindow, lambda s: TokenBucket(s, rpm=10**6, tpm=10**9)])
def test_a_request_costs_the_same_with_a_hundred_thousand_in_the_window(make):
    def cost_s(held):
        window = make(60.0)
        for number in range(held):
            window.add(number * 1e-6, requests=1, tokens=10)
        began = time.perf_counter()
        for number in range(2_000):
            window.used(1.0 + number * 1e-6)
            window.add(1.0 + number * 1e-6, requests=1, tokens=10)
        return time.perf_counter() - began

    assert min(cost_s(100_000) for _ in range(5)) < 10 * min(cost_s(100) for _ in range(5))


def test_a_new_period_counts_anew_and_frees_no_limit():
    key = account(tpm=100)
    assert admitted(key, 80, now=0.0)
    key.reset(10.0)
    assert admitted(key, 20, now=12.5)
    assert not admitted(key, 1, now=13.0)
    assert (key.lifetime.tokens_admitted, key.period.tokens_admitted) == (100, 20)
    assert dict(key.period.by_second) == {2: 20}


def test_payments_are_counted_per_text():
    payments = Payments()
    payments.add(["a", "b", "a"], [3, 4, 3])
    payments.add(["a"], [3])
    assert payments.report() == {
        "distinct_texts": 2,
        "texts_by_payments": {"1": 1, "3": 1},
        "max_per_text": 3,
        "tokens_billed_again": 6,
    }
