"""What is inside of a dataset: what it stores, how many rows count, and a look at a random sample of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..token_estimates import TokenEstimator
from .blocks import Block, ShardDocuments, read_block, read_documents
from .dataset import Dataset
from .layout import DOCUMENTS_FOLDER
from .reader import DatasetReader
from .snapshot import Snapshot, look

_SAMPLED_ROWS = 65_536
_SAMPLED_SHARDS = 64
_PROJECTED_ROWS = 5_000
_SCALING_STEPS = 20
_SEED = 20_260_101


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of committed shards as their markers say, and of those that were retired and are not deleted yet."""

    documents_bytes: int
    vectors_bytes: int
    rows: int
    retired_shards: int
    retired_bytes: int


def stored(dataset: Dataset) -> Stored:
    documents = vectors = rows = retired_bytes = 0
    for shard in dataset.committed():
        marker = dataset.marker(shard)
        for key, item in marker.objects.items() if marker else ():
            if key.startswith(DOCUMENTS_FOLDER):
                documents += item.bytes
            else:
                vectors += item.bytes
        rows += marker.rows if marker else 0
    waiting = dataset.retired() & dataset.stored_markers()
    for shard in waiting:
        marker = dataset.marker(shard)
        retired_bytes += sum(item.bytes for item in marker.objects.values()) if marker else 0
    return Stored(documents, vectors, rows, len(waiting), retired_bytes)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Characters of texts of rows that count. rows: how many were looked at."""

    rows: int
    p50: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Estimates, (n,), and what they are based on, in words."""

    values: NDArray[np.float64]
    basis: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows that count, of shards chosen at random, the same ones each time.

    norms and characters: (n,), of each row; tokens: None where nothing was billed. Of some rows, to be projected:
    vectors (m, dimensions) float32, jobs (m,), and where they are among the n.
    """

    max_input_tokens: int
    norms: NDArray[np.float32]
    characters: NDArray[np.int64]
    tokens: Tokens | None
    vectors: NDArray[np.float32]
    jobs: NDArray[np.str_]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.norms)


class Contents:
    """A dataset as it is now, to be looked at. What has to read documents does so when it is asked."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.stored = stored(dataset)

    @cached_property
    def _snapshot(self) -> Snapshot:
        return look(self._dataset)

    @cached_property
    def rows(self) -> int:
        """Rows that count."""
        return len(DatasetReader(self._dataset, self._snapshot))

    def lengths(self) -> Lengths | None:
        """Of a sample, read without vectors; None where no row counts."""
        parts = [_characters(documents) for _, documents in self._documents(("text",))]
        characters = np.concatenate([np.empty(0, np.int64), *parts])
        if not len(characters):
            return None
        p50, p99 = np.percentile(characters, (50, 99), method="inverted_cdf")
        return Lengths(len(characters), int(p50), int(p99), int(characters.max()))

    def sample(self, estimator: TokenEstimator, *, billed: float) -> Sample:
        """One shard in memory at a time, and what is projected. billed: tokens per row, 0 where that is not known."""
        random = np.random.default_rng(_SEED)
        dimensions = self._dataset.info.dimensions
        norms, characters, tokens = [np.empty(0, np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.float64)]
        vectors, jobs = [np.empty((0, dimensions), np.float32)], [np.empty(0, np.str_)]
        places = [np.empty(0, np.int64)]
        share = min(1.0, _PROJECTED_ROWS / max(1, min(self.rows, _SAMPLED_ROWS)))
        begin = 0
        for shard, documents in self._documents(("text", "job")):
            block = read_block(self._dataset, shard, documents)
            values = block.vectors.astype(np.float32)
            norms.append(np.linalg.norm(values, axis=1))
            characters.append(_characters(documents))
            tokens.append(estimator.estimate(_texts(block)))
            chosen = np.flatnonzero(random.random(len(block)) < share)
            vectors.append(values[chosen])
            jobs.append(np.array(block.documents["job"].take(chosen).to_pylist(), dtype=np.str_))
            places.append(begin + chosen)
            begin += len(block)
        return Sample(
            self._dataset.info.embedder.max_input_tokens,
            np.concatenate(norms),
            np.concatenate(characters),
            self._judged(np.concatenate(tokens), estimator, billed),
            np.concatenate(vectors),
            np.concatenate(jobs),
            np.concatenate(places),
        )

    def _judged(self, tokens: NDArray[np.float64], estimator: TokenEstimator, billed: float) -> Tokens | None:
        """As they were learned, or, where nothing was, scaled so that their mean is what a row was billed."""
        if estimator.bills:
            return Tokens(tokens, f"± {estimator.error:.0%} a request")
        if not billed or not len(tokens):
            return None
        # Of a text over the limit no more than the limit is billed, so the factor takes a few steps.
        limit = self._dataset.info.embedder.max_input_tokens or np.inf
        factor = 1.0
        for _ in range(_SCALING_STEPS):
            factor *= billed / float(np.minimum(factor * tokens, limit).mean())
        return Tokens(np.maximum(factor * tokens, 1.0), "scaled to what was billed")

    def _documents(self, columns: tuple[str, ...]) -> Iterator[tuple[int, ShardDocuments]]:
        """Of shards in random order, until there are enough rows. Those without a row that counts are passed over."""
        rows = 0
        order = np.random.default_rng(_SEED).permutation(np.array(self._snapshot.shards, dtype=np.int64))
        for shard in order[:_SAMPLED_SHARDS].tolist():
            documents = read_documents(self._dataset, self._snapshot, shard, columns=columns)
            counted = int(documents.counts.sum())
            if counted:
                yield shard, documents
            rows += counted
            if rows >= _SAMPLED_ROWS:
                return


def _characters(documents: ShardDocuments) -> NDArray[np.int64]:
    texts = documents.table["text"].filter(pa.array(documents.counts))
    return np.asarray(pc.utf8_length(texts)).astype(np.int64)


def _texts(block: Block) -> list[str]:
    return [text or "" for text in block.documents["text"].to_pylist()]
