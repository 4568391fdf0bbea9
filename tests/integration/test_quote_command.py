"""`embedmill quote`: no key, no network, and figures that the bill then confirms."""

from __future__ import annotations

import re

import pytest

from embedmill.dataset.local_store import LocalStore
from embedmill.embedder import EmbedderSpec
from embedmill.token_estimates import TokenEstimator, write_estimates
from tests.conftest import Command, Corpus
from tests.datasets import small_dataset

V3 = ("--model", "jina/jina-embeddings-v3")


def test_a_quote_needs_no_key_and_names_every_figure(embedmill: Command, python_docs: Corpus) -> None:
    ended = embedmill("quote", python_docs.path, *V3)
    assert ended.status == 0
    for name in ("documents", "passages", "tokens", "price", "time", "dataset", "milvus"):
        assert re.search(rf"^  {name} +\S", ended.stdout, re.MULTILINE), name
    assert f"documents   {len(python_docs.texts):,}\n" in ended.stdout
    assert "give or take 25 %" in ended.stdout
    assert all(tier in ended.stdout for tier in ("free", "paid", "premium"))
    record = embedmill("quote", python_docs.path, *V3, "--tier", "paid", "--price", "2", "--json").record
    assert record["passages"] == len(python_docs.texts)
    assert record["price"]["usd"] == pytest.approx(record["tokens"] * 2 / 1e6, abs=1e-4)
    assert [time["tier"] for time in record["times"]] == ["paid"]
    assert record["milvus_bytes"] > 4 * 1024 * len(python_docs.texts)


def test_a_deadline_says_which_tier_meets_it(embedmill: Command, python_docs: Corpus) -> None:
    record = embedmill("quote", python_docs.path, *V3, "--by", "1min", "--json").record
    slow = [time["tier"] for time in record["times"] if time["seconds"] * (1 + record["error"]) > 60]
    assert set(record["in_time"]) == {"free", "paid", "premium"} - set(slow)
    assert "too late" in embedmill("quote", python_docs.path, *V3, "--rpm", "1", "--tpm", "8192", "--by", "1min").stdout
    assert embedmill("quote", python_docs.path, *V3, "--by", "2020-01-01").status == 2
    wrong = embedmill("quote", python_docs.path, *V3, "--by", "soon")
    assert (wrong.status, wrong.stdout) == (2, "")
    assert "12h" in wrong.stderr


def test_a_dataset_is_quoted_for_what_it_lacks_with_what_its_bills_taught(
    embedmill: Command, python_docs: Corpus
) -> None:
    assert (
        embedmill("run", python_docs.path, "--to", "d", "--model", "null/8", "--limit", "10", "--no-milvus").status == 0
    )
    record = embedmill("quote", python_docs.path, "--to", "d", "--json").record
    assert record["model"] == "null/8"
    assert record["unchanged"] == 10
    small_dataset(embedmill.folder / "hosted", embedder=EmbedderSpec("jina/jina-embeddings-v3", 8))
    before = embedmill("quote", python_docs.path, "--to", "hosted", "--json").record
    learned = TokenEstimator()
    texts = list(python_docs.texts.values())
    for start in range(0, 200, 10):
        request = texts[start : start + 10]
        learned.learn(request, sum(len(text) // 8 for text in request))
    write_estimates(LocalStore(embedmill.folder / "hosted"), learned)
    after = embedmill("quote", python_docs.path, "--to", "hosted", "--json").record
    assert before["error"] == 0.25
    assert after["error"] < 0.15
    assert after["tokens"] < before["tokens"]


def test_a_local_model_is_timed_on_this_machine(embedmill: Command, python_docs: Corpus) -> None:
    record = embedmill("quote", python_docs.path, "--model", "null/8", "--json").record
    assert record["price"]["usd"] == 0
    assert [time["tier"] for time in record["times"]] == ["this machine"]
    assert "none, a local model" in embedmill("quote", python_docs.path, "--model", "null/8", "--sample", "50").stdout


def test_a_price_that_nobody_published_is_asked_for(embedmill: Command, python_docs: Corpus) -> None:
    ended = embedmill("quote", python_docs.path, "--model", "jina/jina-embeddings-v4")
    assert ended.status == 0
    assert "--price USD" in ended.stdout


def test_what_cannot_be_quoted_is_one_line(embedmill: Command, python_docs: Corpus) -> None:
    for arguments in (
        ("nothing.jsonl", *V3),
        (python_docs.path, "--model", "jina/nothing"),
        (python_docs.path, *V3, "--dimensions", "2000"),
    ):
        ended = embedmill("quote", *arguments)
        assert ended.status == 2
        assert len(ended.stderr.strip().splitlines()) == 1


def test_a_rehearsed_run_needs_no_key_tells_its_bill_and_its_vectors_go_nowhere_else(
    embedmill: Command, python_docs: Corpus
) -> None:
    run = ("run", python_docs.path, *V3, "--dimensions", "16", "--tier", "paid", "--limit", "200", "--no-milvus")
    ended = embedmill(*run, "--rehearse", "--json")
    assert ended.status == 0, ended.output
    assert ended.record["passages"]["embedded"] == 200
    assert ended.record["dataset"].endswith("-rehearsal")
    billed = re.search(r"would have billed ([\d,]+) tokens", ended.stderr)
    assert billed is not None
    # Before the documents, one small request tries the key.
    assert 0 < int(billed[1].replace(",", "")) - ended.record["now"]["tokens"] < 20
    real = embedmill(*run, "--to", ended.record["dataset"], environment={"JINA_API_KEY": "jina_0123456789"})
    assert real.status == 2
    assert "another embedder" in real.stderr
    local = embedmill("run", python_docs.path, "--model", "null/8", "--rehearse")
    assert local.status == 2
    assert "--rehearse is for a provider's model" in local.stderr
