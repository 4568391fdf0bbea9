"""From the folder of a BERT-type sentence-transformers model to an ONNX graph, without torch.

Serves the MiniLM, bge-*-en, e5 and gte families: absolute positions, GELU, mean or CLS pooling. The graph uses ONNX
Runtime's fused operators (domain `com.microsoft`) and equals the model to about 1e-6 in fp32. What it cannot express is
refused, never approximated. `build_graph` does no I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedmill.errors import ConfigurationError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Pooling = Literal["mean", "cls"]

_WEIGHTS_FILE = "model.safetensors"
_FUSED = "com.microsoft"
# BiasGelu is the exact function, FastGelu the tanh approximation: models are trained with one of the two.
_GELU_OPERATORS = {"gelu": "BiasGelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu", "gelu_fast": "FastGelu"}


@dataclass(frozen=True, slots=True)
class BertFolder:
    """What a model's folder says. `config` is its config.json, `weights` the bytes of its safetensors file.

    max_tokens: where a passage is cut, special tokens included; normalize: whether vectors are scaled to unit length.
    """

    config: Mapping[str, Any]
    weights: bytes
    pooling: Pooling = "mean"
    normalize: bool = True
    max_tokens: int = 512

    @property
    def dimensions(self) -> int:
        return int(self.config["hidden_size"])


def start_session(graph: BertGraph, *, threads: int) -> InferenceSession:
    """An ONNX Runtime session on the CPU, with `threads` of its own per call. It is safe to call from many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in graph.weights.values()]
    options.add_external_initializers(list(graph.weights), values)
    return onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])


def read_folder(folder: Path) -> BertFolder:
    """Read a sentence-transformers folder. Raises ConfigurationError for one that `build_graph` could not build."""
    modules = _read_json(folder / "modules.json")
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _cannot_build(f"{folder / 'modules.json'} lists {' + '.join(kinds)}")
    transformer = folder / modules[0]["path"]
    config = _read_json(transformer / "config.json")
    limits = transformer / "sentence_bert_config.json"
    max_tokens = _read_json(limits).get("max_seq_length") if limits.exists() else None
    return BertFolder(
        config=config,
        weights=_read(transformer / _WEIGHTS_FILE),
        pooling=_pooling(_read_json(folder / modules[1]["path"] / "config.json")),
        normalize="Normalize" in kinds,
        max_tokens=int(max_tokens or config.get("max_position_embeddings", 512)),
    )


@dataclass(frozen=True, slots=True)
class BertGraph:
    """A serialised ONNX model, and the weights that it declares as external, by name.

    They are handed to the runtime as they are: copying them through protobuf costs ten times the rest of the build.
    """

    model: bytes
    weights: Mapping[str, NDArray[np.float32]]


def build_graph(folder: BertFolder) -> BertGraph:
    """The model as one fused graph.

    Inputs `input_ids` and `attention_mask`, both (batch, length) int32; output `vectors`, (batch, dimensions) float32.

    Raises ConfigurationError for a model that is not BERT in the plain sense.
    """
    _check_config(folder.config)
    graph = _Graph(_load_weights(folder.weights))
    hidden = _embed(graph, folder.config)
    for layer in range(int(folder.config["num_hidden_layers"])):
        hidden = _add_layer(graph, hidden, layer, folder.config)
    pooled = _pool(graph, hidden, folder.pooling)
    if folder.normalize:
        pooled = graph.add("LpNormalization", [pooled], "unit", axis=-1, p=2)
    graph.add("Identity", [pooled], "vectors")
    return BertGraph(graph.serialize(folder.dimensions), graph.weights)


class _Graph:
    """Nodes and weights as they are added. A weight is stored under the name that the checkpoint gives it."""

    def __init__(self, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self._tensors = tensors
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        self.weights: dict[str, NDArray[np.float32]] = {}

    def tensor(self, name: str) -> NDArray[np.float32]:
        try:
            return self._tensors[name]
        except KeyError:
            raise _cannot_build(f"{_WEIGHTS_FILE} holds no {name}") from None

    def constant(self, name: str, array: NDArray[np.int64]) -> str:
        """Inside the model: shape inference wants to read it."""
        from onnx import numpy_helper

        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: NDArray[np.float32]) -> str:
        from onnx import TensorProto

        declared = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        declared.data_location = TensorProto.EXTERNAL
        declared.external_data.add(key="location", value=_WEIGHTS_FILE)
        self._initializers.append(declared)
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def vector(self, name: str) -> str:
        return self.weight(name, self.tensor(name))

    def matrix(self, name: str) -> str:
        """Checkpoints store (out, in); MatMul wants (in, out)."""
        return self.weight(name, self.tensor(name).T)

    def add(self, operator: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        # EmbedLayerNormalization has a second output, which nobody reads.
        outputs = [output, f"{output}.unused"] if operator == "EmbedLayerNormalization" else [output]
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return output

    def serialize(self, dimensions: int) -> bytes:
        from onnx import TensorProto, helper

        shape = ["batch", "length"]
        graph = helper.make_graph(
            self._nodes,
            "sentence-bert",
            [
                helper.make_tensor_value_info("input_ids", TensorProto.INT32, shape),
                helper.make_tensor_value_info("attention_mask", TensorProto.INT32, shape),
            ],
            [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", dimensions])],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_FUSED, 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def _embed(graph: _Graph, config: Mapping[str, Any]) -> str:
    # Every token is of segment 0 here, so that row is added to the positions once, and not per token.
    positions = graph.tensor("embeddings.position_embeddings.weight")
    segment = graph.tensor("embeddings.token_type_embeddings.weight")[0]
    return graph.add(
        "EmbedLayerNormalization",
        [
            "input_ids",
            "",
            graph.vector("embeddings.word_embeddings.weight"),
            graph.weight("positions", positions + segment),
            "",
            graph.vector("embeddings.LayerNorm.weight"),
            graph.vector("embeddings.LayerNorm.bias"),
        ],
        "embedded",
        domain=_FUSED,
        epsilon=_epsilon(config),
    )


def _add_layer(graph: _Graph, hidden: str, layer: int, config: Mapping[str, Any]) -> str:
    prefix = f"encoder.layer.{layer}"
    attended = _attend(graph, hidden, prefix, int(config["num_attention_heads"]))
    hidden = _add_and_normalize(graph, attended, hidden, f"{prefix}.attention.output", config)
    widened = graph.add("MatMul", [hidden, graph.matrix(f"{prefix}.intermediate.dense.weight")], f"{prefix}.widened")
    activated = graph.add(
        _GELU_OPERATORS[config["hidden_act"]],
        [widened, graph.vector(f"{prefix}.intermediate.dense.bias")],
        f"{prefix}.activated",
        domain=_FUSED,
    )
    return _add_and_normalize(graph, activated, hidden, f"{prefix}.output", config)


def _attend(graph: _Graph, hidden: str, prefix: str, heads: int) -> str:
    parts = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
    weight = np.concatenate([graph.tensor(f"{part}.weight").T for part in parts], axis=1)
    bias = np.concatenate([graph.tensor(f"{part}.bias") for part in parts])
    return graph.add(
        "Attention",
        [
            hidden,
            graph.weight(f"{prefix}.qkv.weight", weight),
            graph.weight(f"{prefix}.qkv.bias", bias),
            "attention_mask",
        ],
        f"{prefix}.attended",
        domain=_FUSED,
        num_heads=heads,
    )


def _add_and_normalize(graph: _Graph, inner: str, skip: str, prefix: str, config: Mapping[str, Any]) -> str:
    projected = graph.add("MatMul", [inner, graph.matrix(f"{prefix}.dense.weight")], f"{prefix}.projected")
    return graph.add(
        "SkipLayerNormalization",
        [
            projected,
            skip,
            graph.vector(f"{prefix}.LayerNorm.weight"),
            graph.vector(f"{prefix}.LayerNorm.bias"),
            graph.vector(f"{prefix}.dense.bias"),
        ],
        f"{prefix}.normalized",
        domain=_FUSED,
        epsilon=_epsilon(config),
    )


def _pool(graph: _Graph, hidden: str, pooling: Pooling) -> str:
    if pooling == "cls":
        return graph.add("Gather", [hidden, graph.constant("first", np.array(0, np.int64))], "pooled", axis=1)
    axis = graph.constant("axis", np.array([1], np.int64))
    mask = graph.add("Cast", ["attention_mask"], "mask", to=1)
    # (batch, 1, length) @ (batch, length, hidden): the sum over real tokens in one product.
    row = graph.add("Unsqueeze", [mask, axis], "mask_row")
    total = graph.add("Squeeze", [graph.add("MatMul", [row, hidden], "totals"), axis], "total")
    count = graph.add("ReduceSum", [mask, axis], "count", keepdims=1)
    return graph.add("Div", [total, count], "pooled")


def _load_weights(weights: bytes) -> dict[str, NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(weights)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise _cannot_build(f"{_WEIGHTS_FILE} cannot be read ({error})") from error
    # Old checkpoints carry the task model's prefix, and TensorFlow's names of the two LayerNorm weights.
    renamed = ((name.removeprefix("bert."), tensor) for name, tensor in tensors.items())
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): (
            tensor.astype(np.float32, copy=False)
        )
        for name, tensor in renamed
        if tensor.dtype in (np.float32, np.float16)
    }


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "bert":
        raise _cannot_build(f"its config.json says model_type {config.get('model_type')!r}, not 'bert'")
    if missing := sorted({"hidden_size", "num_hidden_layers", "num_attention_heads"} - set(config)):
        raise _cannot_build(f"its config.json lacks {', '.join(missing)}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise _cannot_build(f"it has {config['position_embedding_type']!r} positions")
    if config.get("hidden_act") not in _GELU_OPERATORS:
        raise _cannot_build(f"its activation is {config.get('hidden_act')!r}")
    if config.get("is_decoder"):
        raise _cannot_build("it is a decoder")


def _pooling(config: Mapping[str, Any]) -> Pooling:
    """Both spellings of sentence-transformers: a flag per mode, and one `pooling_mode`."""
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    modes = [mode for mode in modes if f"pooling_mode_{mode}" in config]
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    match modes:
        case ["mean_tokens" | "mean"]:
            return "mean"
        case ["cls_token" | "cls"]:
            return "cls"
    raise _cannot_build(f"its pooling is {' + '.join(modes) or 'unknown'}")


def _epsilon(config: Mapping[str, Any]) -> float:
    return float(config.get("layer_norm_eps", 1e-12))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _cannot_build(f"{path} cannot be read ({error.strerror})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise _cannot_build(f"{path} is not JSON ({error})") from error


def _cannot_build(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"this model cannot run on the light engine: {reason}; "
        "install the full one with `pip install 'embedmill[transformers]'` and name the model as local/PATH"
    )
