from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from embedmill.errors import ConfigurationError
from worker.embedders.minilm import OnnxEmbedder, find_weights
from worker.embedders.sentence_transformers import SentenceTransformerEmbedder, identify_weights


def write_model(folder: Path, *, weights: bytes = b"weights", config: str = "{}") -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match=r"local/some/model needs .*pip install 'embedmill\[transformers\]'"):
        SentenceTransformerEmbedder("some/model")


def test_equal_copies_have_one_revision_whatever_lies_beside_them(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    (second / "README.md").write_text("a model")
    (second / "pytorch_model.bin").write_bytes(b"the same weights in the old format")
    (second / "onnx").mkdir()
    (second / "onnx" / "model.safetensors").write_bytes(b"an export")
    assert identify_weights(first) == identify_weights(second)
    assert len(identify_weights(first)) == 12


def test_other_weights_or_configuration_have_another_revision(tmp_path: Path) -> None:
    original = write_model(tmp_path / "a")
    retrained = write_model(tmp_path / "b", weights=b"weightz")
    changed = write_model(tmp_path / "c", config='{"hidden_act": "relu"}')
    assert len({identify_weights(folder) for folder in (original, retrained, changed)}) == 3


async def test_vectors_equal_those_of_the_light_engine() -> None:
    pytest.importorskip("sentence_transformers")
    texts = ["", "The lighthouse keeper counts ships.", "naïve café — 北京", "many words " * 400]
    full, light = SentenceTransformerEmbedder(str(find_weights()), device="cpu"), OnnxEmbedder()
    expected, found = await light.embed(texts), await full.embed(texts)
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-5)
    assert (found.billed_tokens, found.truncated) == (expected.billed_tokens, expected.truncated)
    assert full.estimate_tokens(texts) == light.estimate_tokens(texts)


async def test_unknown_folder_is_refused_in_one_line() -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigurationError, match="there is no such folder"):
        SentenceTransformerEmbedder("/nonexistent/model")
