"""--late-chunking, --too-long and --tokenizer as a user says them, against the rehearsal; limits learned from refusals."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.exact_tokens import ExactTokens
from embedmill.rehearsal import Rehearsal, pretend_tokens, serve_rehearsal
from embedmill.rehearsal.server import ProviderSimulator
from embedmill.rehearsal.vectors import pretend_context, pretend_vectors
from tests.unit.test_exact_tokens import write_tokenizer
from worker.embedders.jina import JinaEmbedder

KEY, MODEL, DIMENSIONS = "jina_packing", "jina-embeddings-v3", 8
SENTENCE = "A sentence of seven words stands here. "
On = tuple[str, ProviderSimulator]


@pytest.fixture
async def on() -> AsyncIterator[On]:
    async with serve_rehearsal(Rehearsal()) as serving:
        yield serving


async def embedmill(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMILL_")}
    environment |= {"JINA_API_KEY": KEY}
    command = [sys.executable, "-m", "embedmill", *arguments]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return await anyio.to_thread.run_sync(run)


async def run_on(on: On, folder: Path, *options: str, to: str = "d") -> dict[str, Any]:
    ended = await embedmill(
        "run", "docs.jsonl", "--to", to, "--no-milvus", "--json", "--api-base", on[0], "--tier", "premium",
        "--model", f"jina/{MODEL}", "--dimensions", str(DIMENSIONS), *options, cwd=folder,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stderr
    record: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return record


def write(folder: Path, texts: Mapping[str, str]) -> None:
    lines = (json.dumps({"id": id_, "text": text}) for id_, text in texts.items())
    (folder / "docs.jsonl").write_text("\n".join(lines))


def rows(dataset: Dataset, shard: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dataset.documents(shard)[0].to_pylist()
    return found


async def test_late_chunking_embeds_each_document_with_all_of_its_passages(on: On, tmp_path: Path) -> None:
    write(tmp_path, {"a": SENTENCE * 30, "b": SENTENCE * 3, "long": SENTENCE * 1_500})
    await run_on(on, tmp_path, "--late-chunking", "--chunk", "400")
    dataset = Dataset.open(str(tmp_path / "d"))
    assert dataset.info.embedder.late_chunking
    texts = [row["text"] for row in rows(dataset) if row["group"] == "a"]
    assert len(texts) > 2
    expected = pretend_vectors(texts, model=pretend_context(texts, model=MODEL), dimensions=DIMENSIONS)
    assert np.array_equal(dataset.vectors(0)[: len(texts)], expected)
    marker = dataset.marker(0)
    assert marker is not None
    places = [row for row, passage in enumerate(rows(dataset)) if passage["group"] == "long"]
    assert marker.windows[0].first_row == places[0]
    assert sum(window.rows for window in marker.windows) == len(places)
    assert len(marker.windows) == 3
    shown = await embedmill("info", "d", cwd=tmp_path)
    assert "3, of documents" in shown.stdout


async def test_a_changed_passage_pays_for_its_document_and_for_no_other(on: On, tmp_path: Path) -> None:
    texts = {"a": SENTENCE * 40, "b": SENTENCE * 40}
    write(tmp_path, texts)
    await run_on(on, tmp_path, "--late-chunking", "--chunk", "400")
    write(tmp_path, texts | {"a": SENTENCE * 39 + "Another sentence ends it."})
    ended = await run_on(on, tmp_path, "--late-chunking", "--chunk", "400")
    assert (ended["documents"]["changed"], ended["documents"]["unchanged"]) == (4, 4)
    dataset = Dataset.open(str(tmp_path / "d"))
    assert {row["group"] for row in rows(dataset, 1)} == {"a"}
    texts_of_a = [row["text"] for row in rows(dataset, 1)]
    expected = pretend_vectors(texts_of_a, model=pretend_context(texts_of_a, model=MODEL), dimensions=DIMENSIONS)
    assert np.array_equal(dataset.vectors(1), expected)


@pytest.mark.parametrize("choice", ["truncate", "fail", "split"])
async def test_what_becomes_of_a_passage_over_the_limit_is_the_job_s_choice(
    on: On, tmp_path: Path, choice: str
) -> None:
    write(tmp_path, {"a": "short", "long": SENTENCE * 2_000, "b": "short, too"})
    ended = await run_on(on, tmp_path, "--too-long", choice)
    dataset = Dataset.open(str(tmp_path / "d"))
    job, marker = dataset.job("main"), dataset.marker(0)
    assert job is not None
    assert marker is not None
    assert job.too_long == choice
    ids = [row["id"] for row in rows(dataset)]
    if choice == "truncate":
        assert [ids[row] for row in marker.truncated] == ["long"]
        assert ended["now"]["truncated"] == 1
    elif choice == "fail":
        assert [(failure.id, failure.code) for failure in marker.failures] == [("long", "too_long")]
        assert "8,192 tokens" in marker.failures[0].cause
        assert ended["status"] == 1
    else:
        assert ids[1:-1] == [f"long#{part}" for part in range(len(ids) - 2)]
        assert (marker.truncated, marker.failures) == ((), ())
        billed = on[1].stats()["tokens_billed"]
        assert isinstance(billed, int)
        assert billed > pretend_tokens(SENTENCE * 2_000)
    # The job keeps it: the same command without the option has nothing to do.
    again = await run_on(on, tmp_path)
    assert again["now"]["requests"] == 0
    assert len(Dataset.open(str(tmp_path / "d")).admitted()) == 1


async def test_an_exact_tokenizer_says_which_passages_were_cut_without_sending_them_alone(
    on: On, tmp_path: Path
) -> None:
    embedder = JinaEmbedder(
        f"jina/{MODEL}", key=KEY, api_base=on[0], dimensions=8, tokenizer=ExactTokens(write_tokenizer(tmp_path))
    )
    try:
        answer = await embedder.embed(["short", "word " * 9_000, "w " * 8_000])
        assert answer.truncated == (1,)
        assert embedder.estimate_tokens(["a b c", "word " * 9_000]) == [5, 8_192]
        assert embedder.window_tokens == 8_192
    finally:
        await embedder.aclose()


async def test_a_tokenizer_that_is_not_the_model_s_is_warned_of_once(
    on: On, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = JinaEmbedder(f"jina/{MODEL}", key=KEY, api_base=on[0], tokenizer=ExactTokens(write_tokenizer(tmp_path)))
    with caplog.at_level(logging.WARNING, logger="embedmill.worker"):
        for _ in range(45):
            # Two tokens a word for the rehearsal, one for the tokenizer.
            await embedder.embed(["eightchr " * 20])
    await embedder.aclose()
    assert sum("not the model's tokenizer" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("allowed", [512, 100])
async def test_how_many_inputs_a_request_may_have_is_learned_and_nothing_is_lost(tmp_path: Path, allowed: int) -> None:
    write(tmp_path, {f"d{number}": f"t {number}" for number in range(3_000)})
    async with serve_rehearsal(Rehearsal(max_inputs=allowed)) as on:
        ended = await run_on(on, tmp_path, "--rpm", "100", "--tpm", "2000000")
        assert ended["passages"]["embedded"] == 3_000
        stats = on[1].stats()
    # A few are refused before all know, and each text is billed once.
    assert dict(stats["statuses"])["422"] <= 4  # type: ignore[call-overload]
    assert stats["max_per_text"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "docs.jsonl", "--model", f"jina/{MODEL}", "--tokenizer", "nosuch.json"), "No such file"),
        (("quote", "docs.jsonl", "--model", f"jina/{MODEL}", "--tokenizer", "docs.jsonl"), "no tokenizer.json"),
        (("worker", "--redis", "redis://127.0.0.1:1", "--model", f"jina/{MODEL}", "--tokenizer", "x"), "No such file"),
        (("run", "docs.jsonl", "--tokenizer", "x"), "--tokenizer does not apply"),
        (("run", "docs.jsonl", "--late-chunking"), "--late-chunking does not apply"),
        (("run", "docs.jsonl", "--model", "jina/jina-embeddings-v5-text-nano", "--late-chunking"), "no late chunking"),
        (
            ("run", "docs.jsonl", "--model", f"jina/{MODEL}", "--late-chunking", "--too-long", "truncate"),
            "say split or fail",
        ),
        (("run", "docs.jsonl", "--too-long", "split"), "say --chunk N"),
        (("create", "d", "--model", f"jina/{MODEL}", "--too-long", "split"), "say it there"),
        (
            ("push", "docs.jsonl", "--inbox", "i", "--redis", "redis://127.0.0.1:1", "--too-long", "fail"),
            "embedmill create",
        ),
    ],
)
async def test_what_cannot_be_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    write(tmp_path, {"a": "text"})
    ended = await embedmill(*arguments, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "d").exists()


async def test_a_quote_counts_a_request_a_document_and_believes_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, {f"d{number}": SENTENCE * 20 for number in range(50)})
    base = ("quote", "docs.jsonl", "--model", f"jina/{MODEL}", "--json", "--tier", "paid")
    plain = json.loads((await embedmill(*base, cwd=tmp_path)).stdout)
    late = json.loads((await embedmill(*base, "--late-chunking", "--chunk", "200", cwd=tmp_path)).stdout)
    assert plain["times"][0]["requests"] < late["times"][0]["requests"] == 50
    exact = json.loads((await embedmill(*base, "--tokenizer", write_tokenizer(tmp_path), cwd=tmp_path)).stdout)
    # Seven words and a full stop a sentence, and two tokens around each text.
    assert (exact["tokens"], exact["error"]) == (50 * (20 * 8 + 2), 0.0)


async def test_a_job_that_is_created_with_late_chunking_refuses_what_is_too_long(tmp_path: Path) -> None:
    ended = await embedmill("create", "d", "--model", f"jina/{MODEL}", "--late-chunking", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    job = Dataset.open(str(tmp_path / "d")).job("main")
    assert job is not None
    assert job.too_long == "fail"
