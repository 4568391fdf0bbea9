"""The body of a 200: rows as the contract shapes them, with the faults that spoil them."""

from __future__ import annotations

import json
import random

import numpy as np

from .contract import EmbeddingRequest
from .refusals import internal_error
from .vectors import encoded, pretend_context, pretend_sparse, pretend_vectors


def answer(request: EmbeddingRequest, *, fault: str | None, shuffle_seed: int | None, bare_sparse: bool) -> bytes:
    """JSON."""
    if fault == "error_200":
        return internal_error().body
    data = _rows(request, fault)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(data)
    rows = [row["embedding"] for row in data] if request.sparse and bare_sparse else data
    body = {"model": request.model, "object": "list", "usage": usage(request), "data": rows}
    return json.dumps(body, separators=(",", ":")).encode()


def usage(request: EmbeddingRequest) -> dict[str, int]:
    total = request.total_tokens
    if request.sparse:
        return {"total_tokens": total, "input_tokens": total, "output_tokens": 0}
    return {"total_tokens": total, "prompt_tokens": total}


def embeddings(request: EmbeddingRequest, *, fault: str | None = None) -> list[object]:
    """The value of `embedding` for each text.

    Several embedding types: an object with a value for each. The description allows the list and does not say what is
    answered.
    """
    if request.sparse:
        return _spoiled_sparse([pretend_sparse(text) for text in request.texts], fault)
    vectors = pretend_vectors(
        request.texts,
        model=pretend_context(request.texts, model=request.model) if request.together else request.model,
        dimensions=request.dimensions,
        normalized=request.normalized,
    )
    if fault == "nan_row":
        vectors = vectors.copy()
        vectors[-1] = np.nan
    elif fault == "zero_row":
        vectors = vectors.copy()
        vectors[-1] = 0
    elif fault == "same_vectors":
        vectors = np.repeat(vectors[:1], len(vectors), axis=0)
    kinds = [encoded(vectors, kind) for kind in request.encodings]
    if len(kinds) == 1:
        return kinds[0]
    return [dict(zip(request.encodings, values, strict=True)) for values in zip(*kinds, strict=True)]


def _spoiled_sparse(rows: list[dict[str, float]], fault: str | None) -> list[object]:
    if fault == "nan_row":
        rows[-1] = dict.fromkeys(rows[-1], float("nan"))
    elif fault == "zero_row":
        rows[-1] = {}
    elif fault == "same_vectors":
        rows = rows[:1] * len(rows)
    return list(rows)


def _rows(request: EmbeddingRequest, fault: str | None) -> list[dict[str, object]]:
    data: list[dict[str, object]] = [
        {"object": "embedding", "index": index, "embedding": value}
        for index, value in enumerate(embeddings(request, fault=fault))
    ]
    if fault == "missing_row":
        data.pop()
    elif fault == "extra_row":
        data.append({**data[-1], "index": len(data)})
    elif fault == "duplicate_index":
        data[-1]["index"] = 0 if len(data) > 1 else 1
    return data
