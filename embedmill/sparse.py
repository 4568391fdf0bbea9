"""Sparse vectors: weights of tokens, and the numbers that stand for tokens where a vector has only numbers.

A provider names tokens, Milvus numbers dimensions from 0 to 2^32 - 2, and a vocabulary that would join the two is not
published. So a token's number is a checksum of it, by the rule that Milvus' server has for the terms of its full-text
search: the same token has the same number in every release, process and language, and nothing has to be kept. Two tokens
may share a number; none of the 30,522 of BERT's English vocabulary do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SPARSE_DIMENSIONS = 2**32 - 1
"""Numbers that a token may have, and that a sparse field of Milvus takes."""
ENTRY = np.dtype([("index", "<u4"), ("weight", "<f4")])


def token_index(token: str) -> int:
    """The dimension of a token: CRC-32 (IEEE) of its UTF-8 bytes, modulo 2^32 - 1."""
    return zlib.crc32(token.encode("utf-8", "replace")) % SPARSE_DIMENSIONS


def sparse_row(weights: Mapping[str, float]) -> NDArray[np.void]:
    """(entries,) of `ENTRY`, by ascending index; weights of tokens that share an index are added."""
    indices = np.fromiter(map(token_index, weights), np.uint32, len(weights))
    order = np.argsort(indices)
    row: NDArray[np.void] = np.empty(len(weights), ENTRY)
    row["index"] = indices[order]
    with np.errstate(over="ignore", under="ignore"):
        row["weight"] = np.fromiter(weights.values(), np.float64, len(weights))[order]
    begins = np.flatnonzero(np.diff(row["index"], prepend=-1))
    if len(begins) == len(row):
        return row
    merged: NDArray[np.void] = row[begins]
    merged["weight"] = np.add.reduceat(row["weight"], begins)
    return merged


@dataclass(frozen=True, slots=True, eq=False)
class SparseRows:
    """Sparse vectors in compressed rows (CSR), with the names that scipy gives the parts.

    As a sequence it has a dict {index: weight} for each row, which pymilvus takes for inserting and searching.

    indptr: (n + 1,) int64, row i has the entries from indptr[i] to indptr[i + 1]; indices: (entries,) uint32, ascending
    within a row, see `token_index`; data: (entries,) float32, the weights.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.uint32]
    data: NDArray[np.float32]

    @classmethod
    def joined(cls, rows: Sequence[NDArray[np.void]]) -> SparseRows:
        """Of rows as `sparse_row` makes them."""
        entries = np.concatenate([np.empty(0, ENTRY), *rows])
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=indptr[1:])
        return cls(indptr, entries["index"].copy(), entries["weight"].copy())

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), SPARSE_DIMENSIONS

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> dict[int, float]:
        row = range(len(self))[row]
        begin, end = self.indptr[row], self.indptr[row + 1]
        return dict(zip(self.indices[begin:end].tolist(), self.data[begin:end].tolist(), strict=True))

    def __iter__(self) -> Iterator[dict[int, float]]:
        return (self[row] for row in range(len(self)))

    def to_scipy(self) -> csr_array:
        """The same as scipy's array, which pymilvus' sparse embedding functions return.

        Its rows can be read and handed to pymilvus. What makes rows of its columns, as a product with the transpose of
        another does, takes scipy 32 GiB. Raises ConfigurationError where scipy is not installed.
        """
        try:
            from scipy.sparse import csr_array
        except ImportError:
            raise ConfigurationError("to_scipy needs scipy: pip install scipy") from None
        return csr_array((self.data, self.indices.astype(np.int64), self.indptr), shape=self.shape)
