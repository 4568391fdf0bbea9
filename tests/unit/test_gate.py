"""The integrity gate: what may not become durable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedmill.embedder import EmbedderSpec
from worker.gate import inspect, may_share_vector

TEXTS = ["one", "two", "three", "four"]


def answer() -> NDArray[np.float32]:
    return np.arange(1, 13, dtype=np.float32).reshape(4, 3)


def test_one_usable_vector_per_text_passes() -> None:
    report = inspect(answer(), TEXTS, dimensions=3)
    assert report.passed
    assert (report.bad, report.whole) == ({}, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_spoils_its_row_alone(value: float) -> None:
    vectors = answer()
    vectors[2, 1] = value
    report = inspect(vectors, TEXTS, dimensions=3)
    assert report.bad == {2: "the vector has a value that is not finite"}
    assert report.whole is None
    assert not report.passed


def test_a_zero_vector_spoils_its_row_alone() -> None:
    vectors = answer()
    vectors[0] = 0
    vectors[3] = -0.0
    assert inspect(vectors, TEXTS, dimensions=3).bad == {0: "the vector is zero", 3: "the vector is zero"}


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (answer()[:3], r"4 texts went out and an answer of shape \(3, 3\) came back"),
        (np.vstack([answer(), answer()]), r"4 texts went out and an answer of shape \(8, 3\)"),
        (answer().ravel(), r"shape \(12,\)"),
        (answer()[np.newaxis], r"shape \(1, 4, 3\)"),
        (answer()[:, :2], "vectors of 2 dimensions came back instead of 3"),
        (np.empty((0, 3), np.float32), r"shape \(0, 3\)"),
    ],
)
def test_an_answer_of_another_shape_is_refused_as_a_whole(vectors: NDArray[np.float32], words: str) -> None:
    report = inspect(vectors, TEXTS, dimensions=3)
    assert report.whole is not None
    assert not report.passed
    with pytest.raises(ValueError, match=words):
        raise ValueError(report.whole)


def test_different_texts_with_one_and_the_same_vector_do_not_pass_unasked() -> None:
    report = inspect(np.ones((4, 3), np.float32), TEXTS, dimensions=3)
    assert (report.alike, report.whole, report.passed) == (True, None, False)


def test_a_value_that_half_precision_cannot_hold_is_bad_for_a_half_precision_dataset() -> None:
    vectors = np.eye(4, 3, dtype=np.float32) + 1
    vectors[2, 1] = 70_000
    assert inspect(vectors, TEXTS, dimensions=3).passed
    assert list(inspect(vectors, TEXTS, dimensions=3, dtype=np.dtype(np.float16)).bad) == [2]


def test_equal_texts_may_have_equal_vectors() -> None:
    assert inspect(np.ones((4, 3), np.float32), ["same"] * 4, dimensions=3).passed
    assert not inspect(np.ones((2, 3), np.float32), ["one", "two"], dimensions=3).passed


def spec(model: str = "jina/m", *, max_input_tokens: int = 100, truncate: bool = True) -> EmbedderSpec:
    return EmbedderSpec(model, 3, max_input_tokens=max_input_tokens, options={"truncate": truncate})


@pytest.mark.parametrize("texts", [["one", "two"], ["a" * 200 + "b", "short"], ["1", "2"], ["a b", "a c"], ["?", "!"]])
def test_an_api_has_no_one_vector_for_texts_that_it_can_tell_apart(texts: list[str]) -> None:
    assert not may_share_vector(texts, spec())


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(["a" * 200 + "b", "a" * 200 + "c"], id="cut"),
        pytest.param(["\N{GRINNING FACE}" * 30 + "b", "\N{GRINNING FACE}" * 30 + "c"], id="four tokens to a character"),
        pytest.param(["A Caf\N{LATIN SMALL LETTER E WITH ACUTE}", "a cafe"], id="case and accents"),
        pytest.param(["one  two", "one\ntwo", "one\u200btwo "], id="blanks"),
        pytest.param(["\N{LATIN SMALL LIGATURE FI}x", "fix"], id="compatibility form"),
    ],
)
def test_an_api_may_have_one_vector_for_texts_that_are_one_to_it(texts: list[str]) -> None:
    assert may_share_vector(texts, spec())


def test_what_is_not_cut_is_told_apart_however_long() -> None:
    texts = ["a" * 200 + "b", "a" * 200 + "c"]
    assert not may_share_vector(texts, spec(truncate=False))
    assert not may_share_vector(texts, spec(max_input_tokens=0))


@pytest.mark.parametrize("model", ["local/minilm", "null/3"])
def test_a_local_model_is_believed_whatever_the_texts(model: str) -> None:
    assert may_share_vector(["one", "two"], spec(model))


@given(st.lists(st.sampled_from(["good", "nan", "inf", "zero"]), min_size=1, max_size=12))
def test_exactly_the_bad_rows_are_named(kinds: list[str]) -> None:
    fill = {"nan": np.nan, "inf": np.inf, "zero": 0.0}
    vectors = np.array([[fill.get(kind, row + 1.0)] * 2 for row, kind in enumerate(kinds)], dtype=np.float32)
    report = inspect(vectors, [str(row) for row in range(len(kinds))], dimensions=2)
    assert set(report.bad) == {row for row, kind in enumerate(kinds) if kind != "good"}
    assert report.whole is None
