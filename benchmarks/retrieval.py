"""What a ranking is worth against relevance judgements. Pure.

For one query with relevant documents R, and ranks from 1:

    nDCG@k    DCG / ideal DCG, where DCG = sum over the relevant ranks r <= k of 1 / log2(r + 1), and the ideal ranking has
              min(|R|, k) relevant documents in front (binary gains)
    recall@k  relevant documents in the first k / |R|
    MRR@k     1 / the first relevant rank, 0 when that is beyond k

Each is averaged over the queries that have relevant documents. A relevant document that the corpus lacks counts as missed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2


@dataclass(frozen=True, slots=True)
class Quality:
    """Averages over `queries` queries, each from 0 to 1."""

    queries: int
    ndcg_at_10: float
    recall_at_100: float
    mrr_at_10: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate(rankings: Mapping[str, Sequence[str]], *, relevant: Mapping[str, Collection[str]]) -> Quality:
    """rankings: per query the ids, best first; relevant: per query the ids that answer it.

    A query without a ranking scores zero. Raises ValueError when no query has relevant documents, or a ranking names a
    document twice.
    """
    judged = [(rankings.get(query, ()), frozenset(ids)) for query, ids in relevant.items() if ids]
    if not judged:
        raise ValueError("no query has a relevant document")
    if any(len(set(ranking)) != len(ranking) for ranking, _ in judged):
        raise ValueError("a ranking names a document twice")
    count = len(judged)
    return Quality(
        count,
        sum(ndcg(ranking, relevant=ids, depth=10) for ranking, ids in judged) / count,
        sum(recall(ranking, relevant=ids, depth=100) for ranking, ids in judged) / count,
        sum(reciprocal_rank(ranking, relevant=ids, depth=10) for ranking, ids in judged) / count,
    )


def ndcg(ranking: Sequence[str], *, relevant: Collection[str], depth: int) -> float:
    gained = sum(1 / log2(rank + 1) for rank in _relevant_ranks(ranking, relevant=relevant, depth=depth))
    ideal = sum(1 / log2(rank + 1) for rank in range(1, min(len(relevant), depth) + 1))
    return gained / ideal


def recall(ranking: Sequence[str], *, relevant: Collection[str], depth: int) -> float:
    return len(_relevant_ranks(ranking, relevant=relevant, depth=depth)) / len(relevant)


def reciprocal_rank(ranking: Sequence[str], *, relevant: Collection[str], depth: int) -> float:
    ranks = _relevant_ranks(ranking, relevant=relevant, depth=depth)
    return 1 / ranks[0] if ranks else 0.0


def _relevant_ranks(ranking: Sequence[str], *, relevant: Collection[str], depth: int) -> list[int]:
    return [rank for rank, id_ in enumerate(ranking[:depth], start=1) if id_ in relevant]
