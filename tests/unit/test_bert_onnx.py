"""The graph builder against a plain numpy forward pass of the same random model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmill.errors import ConfigurationError
from worker.embedders.bert_onnx import BertFolder, Pooling, build_graph, read_folder, start_session

pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.numpy")

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
HIDDEN, INNER, HEADS, LAYERS, VOCABULARY, POSITIONS = 16, 32, 4, 2, 40, 24
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
}
IDS = np.array([[2, 17, 9, 33, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], np.int32)


def make_tensors() -> dict[str, Array]:
    draw = np.random.default_rng(7)

    def random(*shape: int) -> Array:
        return draw.normal(0, 0.4, shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": random(VOCABULARY, HIDDEN),
        "embeddings.position_embeddings.weight": random(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(2, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + random(HIDDEN),
        "embeddings.LayerNorm.bias": random(HIDDEN),
    }
    shapes = {"intermediate": (INNER, HIDDEN), "output": (HIDDEN, INNER), "attention.output": (HIDDEN, HIDDEN)}
    shapes |= {f"attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            dense = "" if "self" in name else ".dense"
            tensors[f"encoder.layer.{layer}.{name}{dense}.weight"] = random(*shape)
            tensors[f"encoder.layer.{layer}.{name}{dense}.bias"] = random(shape[0])
        for name in ("attention.output", "output"):
            tensors[f"encoder.layer.{layer}.{name}.LayerNorm.weight"] = 1 + random(HIDDEN)
            tensors[f"encoder.layer.{layer}.{name}.LayerNorm.bias"] = random(HIDDEN)
    return tensors


def forward(ids: Array, tensors: Mapping[str, Array], *, pooling: Pooling, tanh: bool) -> Doubles:
    """One text without padding, in double precision: the pooled vector before normalisation."""

    def linear(x: Doubles, name: str) -> Doubles:
        return np.asarray(x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"], np.float64)

    def layer_norm(x: Doubles, name: str) -> Doubles:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
        return np.asarray(scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"], np.float64)

    def gelu(x: Doubles) -> Doubles:
        if tanh:
            return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
        return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))

    x = tensors["embeddings.word_embeddings.weight"][ids].astype(np.float64)
    x += tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(query @ key.swapaxes(1, 2) / math.sqrt(HIDDEN / HEADS))
        attended = (scores / scores.sum(-1, keepdims=True) @ value).swapaxes(0, 1).reshape(len(ids), HIDDEN)
        x = layer_norm(x + linear(attended, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{name}.intermediate.dense"))
        x = layer_norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return x[0] if pooling == "cls" else np.asarray(x.mean(0))


def expected(*, pooling: Pooling = "mean", tanh: bool = False, normalize: bool = True) -> Doubles:
    tensors = make_tensors()
    rows = [forward(ids[mask > 0], tensors, pooling=pooling, tanh=tanh) for ids, mask in zip(IDS, MASK, strict=True)]
    vectors = np.stack(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


def run(folder: BertFolder, ids: NDArray[Any] = IDS, mask: NDArray[Any] = MASK) -> Array:
    session = start_session(build_graph(folder), threads=1)
    return np.asarray(session.run(["vectors"], {"input_ids": ids, "attention_mask": mask})[0])


def make_folder(tensors: Mapping[str, NDArray[Any]] | None = None, **fields: Any) -> BertFolder:
    config = CONFIG | fields.pop("config", {})
    weights = safetensors.save(dict(tensors or make_tensors()))
    return BertFolder(config=config, weights=weights, **fields)


def write_folder(root: Path, **files: object) -> Path:
    contents: dict[str, object] = {
        "config.json": CONFIG,
        "modules.json": [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 20},
        "1_Pooling/config.json": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    }
    (root / "1_Pooling").mkdir()
    (root / "model.safetensors").write_bytes(safetensors.save(make_tensors()))
    for name, content in (contents | files).items():
        (root / name).write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(("activation", "tanh"), [("gelu", False), ("gelu_new", True), ("gelu_pytorch_tanh", True)])
def test_graph_agrees_with_a_plain_forward_pass(pooling: Pooling, activation: str, tanh: bool) -> None:
    vectors = run(make_folder(pooling=pooling, config={"hidden_act": activation}))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(pooling=pooling, tanh=tanh), atol=1e-5)


def test_graph_without_normalisation_keeps_the_length_of_the_mean() -> None:
    vectors = run(make_folder(normalize=False))
    np.testing.assert_allclose(vectors, expected(normalize=False), atol=1e-5)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_wrong_pooling_or_activation_would_be_noticed() -> None:
    assert np.abs(expected() - expected(pooling="cls")).max() > 1e-2
    assert np.abs(expected() - expected(tanh=True)).max() > 1e-5


def test_padding_changes_no_row() -> None:
    folder = make_folder()
    np.testing.assert_allclose(run(folder, IDS[1:2, :3], MASK[1:2, :3]), run(folder)[1:2], atol=1e-6)


def test_old_tensor_names_give_the_same_vectors() -> None:
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in make_tensors().items()
    }
    np.testing.assert_array_equal(run(make_folder(renamed)), run(make_folder()))


def test_half_precision_weights_are_computed_in_single() -> None:
    halved = {name: tensor.astype(np.float16) for name, tensor in make_tensors().items()}
    restored = {name: tensor.astype(np.float32) for name, tensor in halved.items()}
    np.testing.assert_array_equal(run(make_folder(halved)), run(make_folder(restored)))


def test_folder_is_read_as_its_files_say(tmp_path: Path) -> None:
    folder = read_folder(write_folder(tmp_path))
    assert (folder.pooling, folder.normalize, folder.max_tokens, folder.dimensions) == ("mean", True, 20, HIDDEN)
    np.testing.assert_allclose(run(folder), expected(), atol=1e-5)


def test_newer_spelling_of_pooling_is_read(tmp_path: Path) -> None:
    pooling = {"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": True}
    assert read_folder(write_folder(tmp_path, **{"1_Pooling/config.json": pooling})).pooling == "cls"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"modules.json": [{"path": "", "type": "x.Transformer"}, {"path": "2", "type": "x.Dense"}]}, "Dense"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling is max_tokens"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}}, "max_tokens"),
    ],
)
def test_folder_of_another_shape_is_refused_with_a_way_out(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{reason}.*embedmill\[transformers\]"):
        read_folder(write_folder(tmp_path, **files))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "xlm-roberta"}, "xlm-roberta"),
        ({"hidden_act": "relu"}, "relu"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "decoder"),
    ],
)
def test_model_of_another_kind_is_refused_with_a_way_out(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{reason}.*embedmill\[transformers\]"):
        build_graph(make_folder(config=config))


def test_missing_tensor_is_named() -> None:
    tensors = make_tensors()
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ConfigurationError, match=r"no encoder\.layer\.1\.output\.dense\.bias"):
        build_graph(make_folder(tensors))


def test_weights_that_are_no_safetensors_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        build_graph(BertFolder(config=CONFIG, weights=b"version https://git-lfs"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"modules\.json cannot be read"):
        read_folder(tmp_path)
