"""`local/PATH` and `local/HUB-NAME`: any sentence-transformers model, on a GPU when there is one.

The library does the model, its prompts and its pooling; batches are formed outside, by token length, and each is one call.
Its tokenizers are not safe to share between threads: one thread at a time embeds, and counting has a tokenizer of its
own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import ConfigurationError, Overloaded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WEIGHTS = ("*.safetensors", "*.bin")
_SPACE_FILES = ("modules.json", "config.json", "sentence_bert_config.json", "tokenizer.json")
# The names that the library itself tries, in its order.
_PROMPT_NAMES: dict[Role, tuple[str, ...]] = {"document": ("document", "passage", "corpus"), "query": ("query",)}
_CHARACTERS_PER_TOKEN = 32
_NO_LIMIT = 1_000_000


class SentenceTransformerEmbedder:
    """One model in this process. Building it blocks for seconds: do it in a thread where a loop runs.

    name: a folder, or a name on the Hugging Face hub; device: `cuda`, `cpu` and so on, by default CUDA when it is there.

    Raises ConfigurationError when the extra is missing or the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None) -> None:
        self._model = _load(name, device)
        self._on_gpu = self._model.device.type != "cpu"
        self._max_tokens = _max_tokens(self._model)
        self._prompts = {role: _prompt(self._model, role) for role in _PROMPT_NAMES}
        self._count = _token_counter(self._model)
        self._counting = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._spec = EmbedderSpec(
            model=f"local/{_shown_name(name)}",
            dimensions=_dimensions(self._model),
            revision=identify_weights(_folder_of(name)),
            max_input_tokens=self._max_tokens,
            options={"prompt": self._prompts["document"]} if self._prompts["document"] else {},
        )

    @property
    def spec(self) -> EmbedderSpec:
        return self._spec

    @property
    def limits(self) -> BatchLimits:
        # A GPU wants large batches; on a CPU padding costs more than a small batch.
        tokens, inputs = (16_384, 1024) if self._on_gpu else (1024, 256)
        return BatchLimits(max_inputs=inputs, max_tokens=tokens, padded=True, concurrency=2)

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        """Exact: what the model's tokenizer counts, with the document's prompt, at most the model's limit."""
        return [self._clip(count) for count in self._counts(texts, "document")]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """Vectors as the model defines them. Cancelling it waits for the batch that is being computed.

        Raises Overloaded when the GPU has no memory for the batch.
        """
        return await to_thread.run_sync(self._embed, list(texts), role, limiter=self._limiter)

    async def aclose(self) -> None:
        """Nothing to release: the memory goes with the object."""

    def _embed(self, texts: list[str], role: Role) -> Embedding:
        if not texts:
            return Embedding(np.empty((0, self._spec.dimensions), np.float32), 0)
        counts = self._counts(texts, role)
        shortened = [self._shorten(text) for text in texts]
        vectors = self._encode(shortened, role)
        truncated = tuple(
            row
            for row, count in enumerate(counts)
            if self._clip(count) < count or len(shortened[row]) < len(texts[row])
        )
        return Embedding(vectors, sum(map(self._clip, counts)), truncated)

    def _encode(self, texts: list[str], role: Role) -> NDArray[np.float32]:
        import torch

        encode = self._model.encode_query if role == "query" else self._model.encode_document
        try:
            vectors = encode(texts, batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise Overloaded(f"the GPU has no memory for a batch of {len(texts)} texts") from error
        return np.asarray(vectors, dtype=np.float32)

    def _counts(self, texts: Sequence[str], role: Role) -> list[int]:
        prompt = self._prompts[role]
        with self._counting:
            return self._count([prompt + self._shorten(text) for text in texts])

    def _shorten(self, text: str) -> str:
        """Tokenizers read a text whole before they cut it, so a huge one is cut here first."""
        return text[: self._max_tokens * _CHARACTERS_PER_TOKEN] if self._max_tokens else text

    def _clip(self, count: int) -> int:
        return min(count, self._max_tokens) if self._max_tokens else count


def identify_weights(folder: Path | None) -> str:
    """12 hex digits over everything in a model's folder that decides vectors: weights, configuration, tokenizer.

    The files are hashed whole, so equal copies agree wherever they lie. Empty when there is no folder.
    """
    if folder is None:
        return ""
    identity = hashlib.sha256()
    for path in sorted(_space_files(folder)):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        identity.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return identity.hexdigest()[:12]


def _space_files(folder: Path) -> list[Path]:
    # Exports for other runtimes lie in folders of their own, and the library does not read them.
    inside = [path for path in folder.rglob("*") if not {"onnx", "openvino"} & set(path.relative_to(folder).parts)]
    weights: list[Path] = []
    for pattern in _WEIGHTS:
        weights = weights or [path for path in inside if path.match(pattern)]
    return weights + [path for path in inside if path.name in _SPACE_FILES]


def _load(name: str, device: str | None) -> SentenceTransformer:
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigurationError(
            f"local/{name} needs sentence-transformers; install it with `pip install 'embedmill[transformers]'`"
        ) from error
    if _is_path(name) and not _expand(name).is_dir():
        raise ConfigurationError(f"local/{name}: there is no such folder; give one, or a name on the Hugging Face hub")
    silent: Any = transformers_logging
    silent.disable_progress_bar()
    # What goes wrong is said in one line, below.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = str(_expand(name)) if _expand(name).is_dir() else name
    try:
        return SentenceTransformer(source, device=device)
    # Loading raises the errors of four libraries, and of the model's own code; each means that this model does not load.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigurationError(
            f"local/{name} cannot be loaded: {reason[:300]}; is it a sentence-transformers model, and the hub reachable? "
            "A folder is named by its path: --model local/PATH"
        ) from error


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _expand(name: str) -> Path:
    return Path(name).expanduser()


def _shown_name(name: str) -> str:
    """A folder counts by its own name, so that machines that keep it in different places share one vector space."""
    folder = _expand(name)
    return folder.resolve().name if folder.is_dir() else name


def _folder_of(name: str) -> Path | None:
    if _expand(name).is_dir():
        return _expand(name).resolve()
    from huggingface_hub import try_to_load_from_cache

    for file in ("modules.json", "config.json"):
        found = try_to_load_from_cache(name, file, cache_dir=os.environ.get("SENTENCE_TRANSFORMERS_HOME"))
        if isinstance(found, str):
            return Path(found).parent
    return None


def _dimensions(model: SentenceTransformer) -> int:
    # Renamed in sentence-transformers 5.2; the old name warns.
    measure = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return int(measure() or model.encode("", show_progress_bar=False).shape[-1])


def _max_tokens(model: SentenceTransformer) -> int:
    """Where the model cuts a text; 0 when nowhere."""
    limit = model.max_seq_length
    return int(limit) if limit and limit < _NO_LIMIT else 0


def _prompt(model: SentenceTransformer, role: Role) -> str:
    prompts = model.prompts or {}
    names = [*_PROMPT_NAMES[role], *filter(None, [model.default_prompt_name])]
    return next((prompts[name] for name in names if name in prompts), "")


def _token_counter(model: SentenceTransformer) -> Callable[[list[str]], list[int]]:
    """Counts tokens before any cut, special ones included, with a tokenizer of its own."""
    tokenizer: Any = copy.deepcopy(getattr(model, "tokenizer", None))
    if hasattr(tokenizer, "encode_batch"):
        return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    if callable(tokenizer):
        return lambda texts: list(
            map(len, tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"])
        )
    return lambda texts: [len(text) // 4 + 1 for text in texts]
