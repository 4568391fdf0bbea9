"""What is known of a shard so far."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED, OWED, Failure
from worker.results import Increment, ShardResults, merge
from worker.windows import WindowPlan


def increment(*rows: int, value: float = 1.0, failures: tuple[int, ...] = (), tokens: int = 0) -> Increment:
    return Increment(
        rows=np.array(rows, np.int32),
        vectors=np.full((len(rows), 2), value, np.float32),
        failures=tuple(Failure(row, f"i{row}", 1, "gate", f"cause {value}") for row in failures),
        truncated=rows[:1],
        billed_tokens=tokens,
        requests=1 if tokens else 0,
    )


def test_a_row_keeps_its_first_vector_and_its_first_failure_until_a_vector_comes() -> None:
    results = ShardResults(4, 2)
    assert results.add(increment(0, 1, value=1, tokens=5)) == 2
    assert results.add(increment(1, 2, value=2, failures=(0, 3), tokens=7)) == 1
    results.add(increment(failures=(3,), value=3))
    assert results.statuses.tolist() == [EMBEDDED, EMBEDDED, EMBEDDED, FAILED]
    assert results.vectors[:3, 0].tolist() == [1, 1, 2]
    assert np.isnan(results.vectors[3]).all()
    assert results.failures[3].cause == "cause 2"
    assert set(results.failures) == {3}
    assert results.add(increment(3, value=4)) == 1
    assert results.statuses[3] == EMBEDDED
    assert not results.failures
    assert (results.billed_tokens, results.requests) == (12, 2)


def test_deleted_and_cancelled_rows_are_not_owed_and_take_no_vector() -> None:
    results = ShardResults(3, 2)
    results.delete([0])
    results.delete([1], cancelled=True)
    assert results.owed() == [2]
    assert results.add(increment(0, 1, 2)) == 1
    assert results.statuses.tolist() == [DELETED, CANCELLED, EMBEDDED]
    assert np.isnan(results.vectors[:2]).all()


def test_what_was_not_kept_is_taken_once_and_can_be_put_back() -> None:
    results = ShardResults(4, 2)
    results.add(increment(0, tokens=3))
    results.add(increment(1), kept=True)
    results.add(increment(2, failures=(3,), tokens=4))
    taken = results.take_unkept()
    assert taken.rows.tolist() == [0, 2]
    assert [failure.row for failure in taken.failures] == [3]
    assert (taken.billed_tokens, taken.requests, taken.truncated) == (7, 2, (0, 2))
    assert results.take_unkept().empty
    results.put_back(taken)
    assert results.take_unkept().rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("one", "empty"),
    [(increment(), True), (increment(1), False), (increment(failures=(1,)), False), (increment(tokens=1), False)],
)
def test_an_increment_is_empty_when_it_says_nothing(one: Increment, empty: bool) -> None:
    assert one.empty == empty


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=5), max_size=6))
def test_merged_increments_say_what_each_of_them_said(parts: list[list[int]]) -> None:
    increments = [increment(*rows, value=number + 1, tokens=len(rows)) for number, rows in enumerate(parts)]
    one_by_one, at_once = ShardResults(10, 2), ShardResults(10, 2)
    for part in increments:
        one_by_one.add(part)
    merged = merge(increments, dimensions=2)
    assert merged.rows.dtype == np.int32
    assert merged.vectors.shape == (len(merged.rows), 2)
    first = sorted(np.unique(merged.rows, return_index=True)[1])
    at_once.add(Increment(merged.rows[first], merged.vectors[first], merged.failures, merged.truncated))
    np.testing.assert_array_equal(one_by_one.vectors, at_once.vectors)
    assert one_by_one.statuses.tolist() == at_once.statuses.tolist()
    assert one_by_one.truncated == at_once.truncated
    assert one_by_one.owed() == [row for row in range(10) if one_by_one.statuses[row] == OWED]


def together(*windows: tuple[int, ...], value: float = 1.0) -> Increment:
    rows = np.array([row for window in windows for row in window], np.int32)
    return Increment(rows, np.full((len(rows), 2), value, np.float32), windows=windows)


def test_rows_that_were_embedded_together_stay_with_the_largest_window_whoever_comes_first() -> None:
    results = ShardResults(6, 2)
    results.add(together((0, 1), (3,), value=1))
    assert results.add(together((1, 2), (3,), (4, 5), value=2)) == 2, "torn, known, new"
    assert results.windows == [(0, 1), (3,), (4, 5)]
    assert results.add(together((0, 1, 2), value=3)) == 3
    assert results.windows == [(3,), (4, 5), (0, 1, 2)]
    assert results.vectors[:, 0].tolist() == [3, 3, 3, 1, 2, 2]
    results.owe_again([1, 4])
    assert results.windows == [(3,)]
    assert results.owed() == [0, 1, 2, 4, 5]


class OneToken:
    """A tokenizer to which every text is a token."""

    window_tokens = 2

    def planned_tokens(self, texts: Sequence[str]) -> list[int]:
        return [1] * len(texts)


def test_windows_are_taken_and_owed_again_in_time_that_grows_with_their_rows() -> None:
    rows = 8192
    results, alone, whole = ShardResults(rows, 2), [(row,) for row in range(rows)], tuple(range(rows))
    plan = WindowPlan([(row, row + 1) for row in range(0, rows, 2)], ["t"] * rows, OneToken(), max_inputs=2)
    began_s = time.process_time()
    for window in alone[::2]:
        results.add(together(window))
    plan.owe_whole(results, suspects=range(1, rows, 2))
    assert results.add(together(*alone)) == rows / 2
    assert results.add(together(*alone)) == 0
    assert results.add(together(whole)) == rows
    assert results.add(together(whole)) == 0
    results.owe_again(range(0, rows, 2))
    assert len(results.owed()) == rows
    results.add(together(*alone))
    for window in alone:
        results.owe_again(window)
    assert results.windows == []
    assert time.process_time() - began_s < 6, "many times as long where each window looks at all others"
