"""Questions to a real Milvus Lite, and what the commands say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.embedder import EmbedderSpec
from embedmill.errors import ConfigurationError
from loader.description import CollectionDescription
from loader.search import search
from loader.target import MilvusTarget
from loader.verification import verify_target
from tests.loader_bench import DIMENSIONS, add, embedded, load, make_dataset, text_of
from worker.embedders.null import NullEmbedder


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "corpus")


@pytest.fixture
async def searchable(dataset: Dataset, target: MilvusTarget) -> MilvusTarget:
    add(dataset, embedded(50), embedded(50, version=2, start=50))
    await load(dataset, target.address.uri)
    await target.connect()
    return target


async def test_a_search_finds_the_passage_itself_first(searchable: MilvusTarget) -> None:
    hits = await search(searchable, NullEmbedder(DIMENSIONS), text_of("d7", 1), limit=3)
    assert len(hits) == 3
    assert (hits[0].id, hits[0].text, hits[0].metadata) == ("d7", text_of("d7", 1), {"version": 1, "kind": "odd"})
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


async def test_a_filter_leaves_only_what_passes_it(searchable: MilvusTarget) -> None:
    embedder = NullEmbedder(DIMENSIONS)
    hits = await search(searchable, embedder, text_of("d7", 1), limit=100, filter='metadata["kind"] == "even"')
    assert {hit.metadata["kind"] for hit in hits} == {"even"}
    assert len(hits) == 50
    assert await search(searchable, embedder, "anything", filter='metadata["kind"] == "prime"') == []


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (" \n", {}, "question is empty"),
        ("x", {"limit": 0}, "--limit 0"),
        ("x", {"limit": -1}, "--limit -1"),
        ("x", {"limit": 20_000}, "from 1 to 16384"),
        ("x", {"filter": "kind =="}, "--filter 'kind ==' is not understood"),
        ("x", {"filter": "kind == 1"}, "unknown field 'kind'"),
    ],
)
async def test_a_question_that_cannot_be_answered_is_refused_in_one_line(
    searchable: MilvusTarget, text: str, options: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        await search(searchable, NullEmbedder(DIMENSIONS), text, **options)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


async def test_a_search_with_another_embedder_is_refused(searchable: MilvusTarget) -> None:
    with pytest.raises(ConfigurationError, match=r"model 'null/8', here 'null/16'; dimensions 8, here 16"):
        await search(searchable, NullEmbedder(16), "x")


async def test_among_several_collections_one_must_be_chosen(searchable: MilvusTarget, tmp_path: Path) -> None:
    add(other := make_dataset(tmp_path / "other"), embedded(3))
    await load(other, searchable.address.uri)
    searchable.collection = None
    with pytest.raises(ConfigurationError, match="choose one with --collection, of corpus, other"):
        await search(searchable, NullEmbedder(DIMENSIONS), "x")
    searchable.collection = "elsewhere"
    with pytest.raises(ConfigurationError, match="it has: corpus, other"):
        await search(searchable, NullEmbedder(DIMENSIONS), "x")


async def test_an_empty_collection_has_no_hits(dataset: Dataset, target: MilvusTarget) -> None:
    await load(dataset, target.address.uri)
    await target.connect()
    assert await search(target, NullEmbedder(DIMENSIONS), "x") == []
    assert await target.count() == 0
    assert (await verify_target(dataset, target)).ok


async def test_a_database_without_a_collection_of_ours_is_said_so(target: MilvusTarget) -> None:
    with pytest.raises(ConfigurationError, match="no collection of embedmill"):
        await search(target, NullEmbedder(DIMENSIONS), "x")


def test_a_description_keeps_what_search_needs_and_refuses_a_newer_format(dataset: Dataset) -> None:
    made = CollectionDescription.of_dataset(dataset.info)
    assert CollectionDescription.from_json(made.to_json()) == made
    assert CollectionDescription.from_json("a collection of my own") is None
    assert CollectionDescription.from_json('{"other": 1}') is None
    with pytest.raises(ConfigurationError, match="upgrade"):
        CollectionDescription.from_json('{"embedmill": 2}')


def test_a_specification_with_options_differs_by_them() -> None:
    spec = EmbedderSpec("null/8", 8, options={"task": "a"})
    info = layout.DatasetInfo("id", now_iso(), spec)
    other = layout.DatasetInfo("id", now_iso(), EmbedderSpec("null/8", 8, options={"task": "b"}))
    found = CollectionDescription.of_dataset(info).differences(CollectionDescription.of_dataset(other))
    assert found == ["options {'task': 'a'} here, {'task': 'b'} in the dataset"]


def embedmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from embedmill.commands.main import run; run()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_commands_load_and_search_speak_plainly(dataset: Dataset, tmp_path: Path) -> None:
    add(dataset, embedded(30))
    uri = str(tmp_path / "new" / "milvus.db")
    loaded = embedmill("load", dataset.url, "--milvus", uri)
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert "Collection corpus of" in loaded.stdout
    assert "holds 30 rows" in loaded.stdout
    again = embedmill("load", dataset.url, "--milvus", uri, "--json")
    assert json.loads(again.stdout)["shards_loaded"] == 0
    found = embedmill("search", text_of("d7", 1), "--milvus", uri, "--limit", "2", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    record = json.loads(found.stdout.splitlines()[-1])
    assert (record["collection"], record["hits"][0]["id"], len(record["hits"])) == ("corpus", "d7", 2)
    bad = embedmill("search", "x", "--milvus", uri, "--filter", "nonsense ==")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1
