"""What stands for a tokenizer and for models: the same text always gives the same tokens, vector and sparse row.

Vectors mean nothing, but they nest as Matryoshka vectors do: before normalisation, fewer dimensions are the first ones
of more. A task changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_PIECE = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")
_SPACE, _LETTER, _MARK = 0, 1, 2
_CLASS_OF_BYTE = bytes(
    _LETTER if re.match(r"\w", chr(byte)) else _SPACE if chr(byte).isspace() else _MARK for byte in range(128)
) + bytes(128)


def pretend_tokens(text: str) -> int:
    """What the pretend tokenizer counts: two framing tokens, and one for every four bytes begun of each word or mark."""
    return 2 + sum((len(piece.encode("utf-8", "replace")) + 3) // 4 for piece in _PIECE.findall(text))


def count_tokens(texts: Sequence[str]) -> list[int]:
    """`pretend_tokens` of each, in one pass over all ASCII texts."""
    plain = [text for text in texts if text.isascii()]
    counted = iter(_count_ascii(plain)) if plain else iter(())
    return [next(counted) if text.isascii() else pretend_tokens(text) for text in texts]


def _count_ascii(texts: Sequence[str]) -> list[int]:
    joined = "\n".join(("", *texts, ""))
    classes = np.frombuffer(joined.encode("ascii").translate(_CLASS_OF_BYTE), dtype=np.uint8)
    letters = classes == _LETTER
    # A word's begin and end alternate, as the joined text begins and ends with a space.
    edges = np.flatnonzero(letters[1:] != letters[:-1])
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    ends = np.cumsum([len(text) + 1 for text in texts])
    in_words = np.concatenate(([0], np.cumsum((lengths + 3) >> 2)))[np.searchsorted(begins, ends)]
    marks = np.searchsorted(np.flatnonzero(classes == _MARK), ends)
    return [int(tokens) for tokens in 2 + np.diff(in_words + marks, prepend=0)]


def pretend_vector(text: str, *, model: str, dimensions: int) -> NDArray[np.float32]:
    """(dimensions,) float32 of length one, decided by the text, the model and the dimensions alone."""
    vector: NDArray[np.float32] = pretend_vectors([text], model=model, dimensions=dimensions)[0]
    return vector


def pretend_vectors(
    texts: Sequence[str], *, model: str, dimensions: int, normalized: bool = True
) -> NDArray[np.float32]:
    """(len(texts), dimensions) float32. Not normalised: each number is between -1 and 1."""
    start = hashlib.shake_128(model.encode() + b"\0")
    noise = bytearray()
    for text in texts:
        state = start.copy()
        state.update(text.encode("utf-8", "replace"))
        noise += state.digest(4 * dimensions)
    raw: NDArray[np.float32] = np.frombuffer(bytes(noise), dtype="<i4").reshape(len(texts), dimensions).astype(
        np.float32
    ) / np.float32(2**31)
    if not normalized:
        return raw
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    vectors: NDArray[np.float32] = raw / np.maximum(lengths, np.float32(1e-30))
    return vectors


def pretend_context(texts: Sequence[str], *, model: str) -> str:
    """What stands for the model where texts are embedded together: any other text among them changes every vector."""
    if len(texts) == 1:
        return model
    together = hashlib.blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=16)
    return f"{model} {together.hexdigest()}"


def pretend_sparse(text: str) -> dict[str, float]:
    """A score above 0 for every distinct word, in lower case: empty for a text without words."""
    words = dict.fromkeys(word.lower() for word in _WORD.findall(text))
    return {
        word: round(0.05 + hashlib.shake_128(word.encode("utf-8", "replace")).digest(1)[0] / 100, 2) for word in words
    }


def encoded(vectors: NDArray[np.float32], embedding_type: str) -> list[object]:
    """The value of `embedding`, row by row: float32 little-endian in base64, sign bits as int8 or uint8, or numbers."""
    if embedding_type == "base64":
        return [base64.b64encode(row).decode() for row in np.ascontiguousarray(vectors, dtype="<f4")]
    if embedding_type in {"binary", "ubinary"}:
        packed = np.packbits(vectors > 0, axis=1)
        shifted = packed.astype(np.int16) - 128 if embedding_type == "binary" else packed
        return list(shifted.tolist())
    return list(vectors.tolist())
