"""Late chunking: which rows are embedded together, what of a checkpoint counts, and what the marker tells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.dataset.layout import Failure, Marker, Window
from embedmill.embedder import BatchLimits
from worker.packing import window_bounds
from worker.results import Increment, ShardResults
from worker.windows import WindowPlan, documents_of, split_documents


class Counting:
    """One token a character, ten to a window."""

    window_tokens = 10

    def planned_tokens(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


def limits(max_tokens: int, max_inputs: int = 100) -> BatchLimits:
    return BatchLimits(max_inputs, max_tokens, padded=False, concurrency=1)


def increment(*rows: int, value: float = 1.0, windows: tuple[tuple[int, ...], ...] | None = None) -> Increment:
    vectors = np.full((len(rows), 2), value, np.float32)
    return Increment(np.array(rows, np.int32), vectors, windows=windows if windows is not None else (rows,))


def test_a_document_that_fits_is_one_window() -> None:
    assert window_bounds([3, 3, 4], limits=limits(10)) == [(0, 3)]


def test_a_document_that_is_too_long_makes_even_windows() -> None:
    assert window_bounds([3, 3, 3, 3], limits=limits(10)) == [(0, 2), (2, 4)]
    assert window_bounds([1] * 25, limits=limits(10)) == [(0, 9), (9, 17), (17, 25)]


def test_a_passage_over_the_limit_is_a_window_of_its_own() -> None:
    assert window_bounds([2, 99, 2], limits=limits(10)) == [(0, 1), (1, 2), (2, 3)]


def test_windows_have_no_more_passages_than_a_request() -> None:
    assert window_bounds([1] * 6, limits=limits(100, max_inputs=4)) == [(0, 3), (3, 6)]


@given(tokens=st.lists(st.integers(1, 12), max_size=40), most=st.integers(1, 20), inputs=st.integers(1, 8))
def test_windows_are_whole_in_order_within_the_limits_and_as_few_as_can_be(
    tokens: list[int], most: int, inputs: int
) -> None:
    bounds = window_bounds(tokens, limits=limits(most, inputs))
    assert [position for first, end in bounds for position in range(first, end)] == list(range(len(tokens)))
    for first, end in bounds:
        assert 1 <= end - first <= inputs
        assert end - first == 1 or sum(tokens[first:end]) <= most
    greedy, held, cost = 0, 0, 0
    for count in tokens:
        if not held or held >= inputs or cost + count > most:
            greedy, held, cost = greedy + 1, 0, 0
        held, cost = held + 1, cost + count
    assert len(bounds) == greedy


def test_documents_are_runs_of_one_group_and_end_at_deleted_rows_and_at_newer_versions() -> None:
    ids = ["a#0", "a#1", "x", "b#0", "b#1", "b#2", "b#0", "b#1", "c#0"]
    groups = ["a", "a", None, "b", "b", "b", "b", "b", "c"]
    deleted = [False, False, False, False, False, True, False, False, False]
    assert documents_of(ids, groups, deleted) == [(0, 1), (2,), (3, 4), (6, 7), (8,)]
    assert documents_of(ids[:5] + ids[6:], groups[:5] + groups[6:], [False] * 8)[2:4] == [(3, 4), (5, 6)]


def plan(*lengths: int) -> WindowPlan:
    return WindowPlan([tuple(range(len(lengths)))], ["t" * length for length in lengths], Counting(), max_inputs=100)


def test_a_window_of_which_a_part_is_owed_is_owed_whole_without_its_failed_rows() -> None:
    windows = plan(3, 3, 3, 3, 4)
    assert windows.windows == [(0, 1, 2), (3, 4)]
    results = ShardResults(5, 2)
    results.add(increment(3, 4))
    results.add(increment(0))
    results.add(
        Increment(np.empty(0, np.int32), np.empty((0, 2), np.float32), failures=(Failure(1, "x", 1, "c", "?"),))
    )
    windows.owe_whole(results)
    assert windows.owed(results) == [(0, 2)]
    assert np.isnan(results.vectors[0]).all()
    assert results.windows == [(3, 4)]


def test_rows_that_another_attempt_embedded_with_others_are_not_mixed_in() -> None:
    results = ShardResults(4, 2)
    assert results.add(increment(0, 1, 2, 3, value=1.0)) == 4
    assert results.add(increment(2, 3, value=2.0)) == 0
    assert results.vectors[:, 0].tolist() == [1.0] * 4
    assert results.windows == [(0, 1, 2, 3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_of_two_attempts_the_larger_window_is_taken_in_whatever_order_they_are_read(order: tuple[int, ...]) -> None:
    attempts = [increment(0, 1, value=1.0), increment(2, value=1.0), increment(0, 1, 2, value=2.0)]
    results = ShardResults(4, 2)
    for number in order:
        results.add(attempts[number])
    assert results.vectors[:3, 0].tolist() == [2.0] * 3
    assert results.windows == [(0, 1, 2)]


def test_vectors_that_are_stored_give_way_to_no_window() -> None:
    results = ShardResults(3, 2)
    results.add(increment(0, value=1.0, windows=()))
    assert results.add(increment(0, 1, 2, value=2.0)) == 0


def test_what_is_owed_again_takes_with_it_what_was_embedded_together() -> None:
    results = ShardResults(4, 2)
    results.add(increment(0, 1))
    results.add(increment(2, 3))
    results.owe_again([1])
    assert results.owed() == [0, 1]


def test_the_marker_tells_the_windows_of_documents_that_were_split_only() -> None:
    documents = [(0, 1), (2, 3, 4, 5), (6, 7)]
    results = ShardResults(8, 2)
    for rows in ((0, 1), (2, 3), (4, 5)):
        results.add(increment(*rows))
    results.add(increment(6, 7, windows=()))
    assert split_documents(documents, results, planned=documents) == (Window(2, 2), Window(4, 2))
    assert split_documents(documents, results, planned=[(0, 1), (2, 3), (4, 5), (6,), (7,)])[2:] == (
        Window(6, 1),
        Window(7, 1),
    )


@pytest.mark.parametrize("windows", [(), (Window(2, 2), Window(4, 2))])
def test_windows_stand_in_the_marker_and_older_markers_have_none(windows: tuple[Window, ...]) -> None:
    marker = Marker(0, np.ones(6, np.uint8), "f", "a", "w", "t", windows=windows)
    assert Marker.from_bytes(marker.to_bytes(), name="x").windows == windows
    older = marker.to_bytes().replace(b'"windows"', b'"unknown"')
    assert Marker.from_bytes(older, name="x").windows == ()
