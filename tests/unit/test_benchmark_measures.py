"""What the benchmarks compute, against cases worked out by hand."""

from __future__ import annotations

import sys
import threading
import time
from argparse import Namespace
from math import log2
from pathlib import Path
from types import GeneratorType

import numpy as np
import pytest

from benchmarks.judged import differences, find_text_fields, main, rank_exactly, read_judgements
from benchmarks.minilm import arrival_batches, padding_factor
from benchmarks.pipeline import read_all, write_corpus
from benchmarks.retrieval import Quality, evaluate, ndcg, recall, reciprocal_rank
from benchmarks.stages import IDLE, find_stage
from embedmill.errors import ConfigurationError
from embedmill.sources.files import LocalFile
from embedmill.sources.lines import LineFile


def test_ndcg_discounts_by_rank_when_relevant_documents_stand_first_and_third() -> None:
    assert ndcg(["a", "x", "b"], relevant={"a", "b"}, depth=10) == pytest.approx((1 + 1 / 2) / (1 + 1 / log2(3)))
    assert ndcg(["a", "x", "b"], relevant={"a", "b"}, depth=10) == pytest.approx(0.9197, abs=5e-5)


def test_ndcg_is_one_when_more_documents_are_relevant_than_the_depth_shows() -> None:
    ids = [str(number) for number in range(12)]
    assert ndcg(ids, relevant=set(ids), depth=10) == pytest.approx(1.0)


def test_measures_ignore_what_stands_behind_their_depth() -> None:
    ranking = [f"x{number}" for number in range(10)] + ["a"]
    assert ndcg(ranking, relevant={"a"}, depth=10) == 0
    assert reciprocal_rank(ranking, relevant={"a"}, depth=10) == 0
    assert recall(ranking, relevant={"a"}, depth=10) == 0
    assert recall(ranking, relevant={"a"}, depth=11) == 1


def test_recall_counts_a_missing_document_as_missed() -> None:
    assert recall(["a", "b"], relevant={"a", "b", "gone"}, depth=100) == pytest.approx(2 / 3)


def test_evaluate_averages_over_judged_queries_and_scores_a_missing_ranking_zero() -> None:
    rankings = {"1": ["x", "a"], "unjudged": ["a"]}
    found = evaluate(rankings, relevant={"1": {"a"}, "2": {"b"}, "3": set()})
    assert (found.queries, found.recall_at_100, found.mrr_at_10) == (2, 0.5, 0.25)
    assert found.ndcg_at_10 == pytest.approx(1 / log2(3) / 2)


def test_evaluate_refuses_a_ranking_that_names_a_document_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        evaluate({"1": ["a", "a"]}, relevant={"1": {"a"}})
    with pytest.raises(ValueError, match="no query"):
        evaluate({}, relevant={})


def test_exact_ranking_goes_by_cosine_whatever_the_lengths() -> None:
    vectors = np.array([[10, 10], [0.1, 0], [0, 3]], np.float32)
    queries = np.array([[5, 0], [0, 0.5]], np.float32)
    assert rank_exactly(queries, vectors, ids=["both", "x", "y"], depth=2) == [["x", "both"], ["y", "both"]]


def test_judgements_keep_positive_scores_and_pass_over_the_header(tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\t0\n2\ta\t3\n")
    assert read_judgements(path) == {"1": {"a"}, "2": {"a"}}
    path.write_text("1\ta\t1\n2\tb\n")
    with pytest.raises(ConfigurationError, match=r"qrels\.tsv:2"):
        read_judgements(path)


def test_text_fields_are_those_that_the_records_have_with_the_title_first(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "text": "a", "title": "b"}\n')
    assert find_text_fields(path) == ("title", "text")
    path.write_text('{"id": "1", "text": "a"}\n')
    assert find_text_fields(path) == ("text",)
    path.write_text('{"id": "1", "body": "a"}\n')
    with pytest.raises(ConfigurationError, match="neither a title nor a text"):
        find_text_fields(path)


def test_judged_says_in_one_line_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main(["--corpus", nowhere, "--queries", nowhere, "--qrels", nowhere]) == 2
    assert capsys.readouterr().err == f"benchmarks.judged: {nowhere}: cannot be opened: No such file or directory\n"


def test_a_figure_outside_of_the_tolerance_is_told() -> None:
    options = Namespace(expect_ndcg=0.5, expect_recall=0.8, tolerance=0.01)
    found = Quality(9, 0.509, 0.78, 0.7)
    assert differences("exact", found, options=options) == ["exact: recall@100 is 0.7800, expected 0.8 within 0.01"]


def test_padding_is_what_the_longest_of_each_batch_costs_the_others() -> None:
    assert padding_factor([10, 2, 10, 2], batches=[[0, 1], [2, 3]]) == pytest.approx(40 / 24)
    assert padding_factor([10, 2, 10, 2], batches=[[0, 2], [1, 3]]) == 1
    assert [len(batch) for batch in arrival_batches(70)] == [32, 32, 6]


def test_one_seed_makes_one_corpus(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for path, seed in ((first, 1), (second, 1), (other, 2)):
        write_corpus(path, documents=50, seed=seed)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert read_all(first) == 50


def test_a_stack_in_the_readers_is_reading_and_a_waiting_thread_is_idle(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n")
    lines = LineFile(LocalFile(path, name="lines")).lines()
    assert isinstance(lines, GeneratorType)
    assert lines.gi_frame is not None
    assert find_stage(lines.gi_frame).startswith("read:")
    lines.close()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        deadline_s = time.monotonic() + 10
        while find_stage(sys._current_frames()[thread.ident or 0]) != IDLE:
            assert time.monotonic() < deadline_s
    finally:
        release.set()
        thread.join()
