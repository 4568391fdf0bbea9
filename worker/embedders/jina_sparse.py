"""Jina's sparse model: an answer is weights of tokens for each text, checked as vectors are before anyone uses them.

The description allows two shapes: rows with their `index`, and bare rows in the order of the texts. Both are read. It does
not say that a text has any token; one that has Latin letters or digits must have, since the model reads English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmill.embedder import BatchLimits, Embedding
from embedmill.errors import OutcomeUnknown
from embedmill.models import find_sparse_model
from embedmill.sparse import sparse_row

from ..gate import may_all_be_cut
from .jina import JinaEmbedder

# Whether the marks around a text are billed is not described.
_CUT_BILL_SHARE = 0.9
_WORD = re.compile(r"[a-z0-9]+")


class JinaSparseEmbedder(JinaEmbedder):
    """`JinaEmbedder` for models that make weights of tokens: vectors are (n,) object, a `sparse_row` for each text."""

    _find_model = staticmethod(find_sparse_model)

    @property
    def limits(self) -> BatchLimits:
        """No text goes alone: nothing says that it was cut."""
        return replace(super().limits, alone_tokens=0)

    def _parsed(self, body: bytes, texts: Sequence[str]) -> Embedding:
        weights, billed = parse_weights(body, rows=len(texts))
        rows = [_checked(one, text, row=row) for row, (one, text) in enumerate(zip(weights, texts, strict=True))]
        # Texts that were all cut may differ only behind the cut, and each of them was billed up to it.
        cut_bill = _CUT_BILL_SHARE * self.spec.max_input_tokens * len(texts)
        all_cut = billed >= cut_bill and may_all_be_cut(texts, self.spec)
        if not all_cut and all(np.array_equal(row, rows[0]) for row in rows):
            # The model knows no capitals, and little but words.
            different = len({frozenset(_WORD.findall(text.lower())) for text in texts})
            if different > 2:
                raise OutcomeUnknown(f"the answer cannot be used: {different} different texts got the same weights")
        vectors = np.empty(len(rows), np.object_)
        # A list of rows of one length would be taken for a matrix.
        for row, entries in enumerate(rows):
            vectors[row] = entries
        return Embedding(vectors=cast("NDArray[np.float32]", vectors), billed_tokens=billed)

    def _options(self, task: str | None) -> dict[str, str | int | bool | None]:
        return {"task": task}


class _Usage(msgspec.Struct):
    total_tokens: int


class _Item(msgspec.Struct):
    index: int
    embedding: dict[str, float]


class _Indexed(msgspec.Struct):
    data: list[_Item]
    usage: _Usage


class _Bare(msgspec.Struct):
    data: list[dict[str, float]]
    usage: _Usage


_INDEXED, _BARE = msgspec.json.Decoder(_Indexed), msgspec.json.Decoder(_Bare)


def parse_weights(body: bytes, *, rows: int) -> tuple[list[dict[str, float]], int]:
    """The answer to `rows` texts: token -> weight for each, and the tokens billed.

    Raises OutcomeUnknown for anything that is not exactly that.
    """
    answer = _decoded(body)
    billed = answer.usage.total_tokens
    if billed < 0:
        raise OutcomeUnknown(f"the answer says that {billed} tokens were billed")
    if len(answer.data) != rows:
        raise OutcomeUnknown(f"the answer has {len(answer.data)} sparse vectors for {rows} texts")
    if isinstance(answer, _Bare):
        return answer.data, billed
    placed = {item.index: item.embedding for item in answer.data}
    if placed.keys() != set(range(rows)):
        raise OutcomeUnknown(f"the answer has a second or impossible `index` among those of {rows} texts")
    return [placed[row] for row in range(rows)], billed


def _decoded(body: bytes) -> _Indexed | _Bare:
    """No answer fits both: what `embedding` names is weights in one, and would be a weight in the other."""
    try:
        return _INDEXED.decode(body)
    except msgspec.MsgspecError as error:
        indexed = error
    try:
        return _BARE.decode(body)
    except msgspec.MsgspecError as error:
        raise OutcomeUnknown(
            f"the answer is not what Jina's API promises: {indexed}; and as rows without index: {error}"
        ) from error


def _checked(weights: Mapping[str, float], text: str, *, row: int) -> NDArray[np.void]:
    entries = sparse_row(weights)
    if not entries.size and _WORD.search(text.lower()):
        raise OutcomeUnknown(
            f"the answer cannot be used: text {row} of its request has words, and no token got a weight"
        )
    if not ((entries["weight"] > 0) & np.isfinite(entries["weight"])).all():
        raise OutcomeUnknown(
            f"the answer cannot be used: text {row} of its request has a weight that is no number above 0"
        )
    return entries
