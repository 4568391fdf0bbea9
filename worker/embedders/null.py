"""`null/DIMENSIONS`: vectors from a hash of the text, for measuring everything around the model.

A text has the same vector, bit for bit, on every machine, in every run and in every batch; different texts point in
unrelated directions. Only integer arithmetic and correctly rounded operations are used, so no machine rounds differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from anyio import to_thread
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import ConfigurationError

DEFAULT_DIMENSIONS = 64
MAX_DIMENSIONS = 65_536

# The constants of SplitMix64 (Steele, Lea, Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_COMPONENTS_PER_WORD = 4


class NullEmbedder:
    """Embeds nothing, quickly. Raises ConfigurationError for dimensions outside 1 to 65,536."""

    def __init__(self, dimensions: int = DEFAULT_DIMENSIONS) -> None:
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ConfigurationError(f"null/{dimensions}: give dimensions from 1 to {MAX_DIMENSIONS}, as in null/384")
        self._spec = EmbedderSpec(model=f"null/{dimensions}", dimensions=dimensions, revision="1")

    @property
    def spec(self) -> EmbedderSpec:
        return self._spec

    @property
    def limits(self) -> BatchLimits:
        return BatchLimits(max_inputs=2048, max_tokens=1_000_000, padded=False, concurrency=2)

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) // 4 + 1 for text in texts]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """Vectors of unit length; `role` changes nothing, and the estimate is what is billed."""
        vectors = await to_thread.run_sync(hash_vectors, list(texts), self._spec.dimensions)
        return Embedding(vectors, sum(self.estimate_tokens(texts)))

    async def aclose(self) -> None:
        """Nothing to release."""


def hash_vectors(texts: Sequence[str], dimensions: int) -> NDArray[np.float32]:
    """(n, dimensions) float32 of unit length; row i depends on `texts[i]` and on `dimensions` alone."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    seeds = np.frombuffer(digests, "<u8").astype(np.uint64)
    words = _expand(seeds, -(-dimensions // _COMPONENTS_PER_WORD))
    components = words.astype("<u8", copy=False).view("<i2")[:, :dimensions]
    # Odd numbers are never zero, so neither is a vector. Their squares add up exactly in 64 bits.
    odd = components.astype(np.int64) * 2 + 1
    norms = np.sqrt((odd * odd).sum(axis=1, keepdims=True).astype(np.float64))
    vectors: NDArray[np.float32] = (odd / norms).astype(np.float32)
    return vectors


def _expand(seeds: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of SplitMix64 for every seed: (n, count), wrapping at 64 bits."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    state = seeds[:, np.newaxis] + steps
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
