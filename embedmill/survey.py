"""What a corpus holds, as far as it was read: counts, tokens, bytes, and how sure they are. Sends nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .dataset.index import DatasetIndex
from .dataset.passages import Passage, ShardOrigin, encode_passages, passages_table
from .documents import Reject, SourceDocument
from .sources import Source

CountTokens = Callable[[Sequence[str]], Sequence[float] | NDArray[np.float64]]
_BLOCK = 512
_PARTS = 20
_KEPT = 4096


@dataclass(slots=True)
class Counts:
    """Of a corpus, or of a part of it. unchanged: passages that the dataset has already; cut: passages over the limit."""

    documents: float = 0
    passages: float = 0
    unchanged: float = 0
    rejected: float = 0
    cut: float = 0
    tokens: float = 0
    text_bytes: float = 0

    def scaled(self, factor: float) -> Counts:
        return Counts(*(getattr(self, name) * factor for name in self.__slots__))

    def add(self, other: Counts) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Survey:
    """What was read of the sources, and what all of them hold.

    whole: the sources were read to their end; total: counts of all sources, extrapolated by bytes unless `whole`; spread:
    relative half-width (two standard errors) of the extrapolation, 0 when whole; document_bytes: of a passage in the
    document log; texts: the first passages, for measuring how fast they are embedded.
    """

    read: Counts
    total: Counts
    whole: bool
    spread: float
    document_bytes: float
    texts: list[str] = field(default_factory=list)


def survey(
    sources: Sequence[Source],
    *,
    count_tokens: CountTokens,
    max_input_tokens: int,
    index: DatasetIndex | None = None,
    sample: int | None = None,
    on_progress: Callable[[Counts], None] = lambda _counts: None,
) -> Survey:
    """Read the sources, each up to its share of `sample` documents where its size is known, else to its end.

    index: of the dataset that they will go to; what it has with the same text is counted as unchanged, without tokens.
    max_input_tokens: 0 for no limit. Blocking. Raises what reading a source raises.
    """
    read, total, whole, variance = Counts(), Counts(), True, 0.0
    kept: list[SourceDocument] = []
    share = None if sample is None else max(1, sample // len(sources))
    for source in sources:
        size = source.total_bytes() or 0
        here, parts, position, at_end = Counts(), [], 0, True
        for block in _blocks(source.read()):
            part = _count(block, count_tokens, max_input_tokens, index)
            position = source.position_bytes(block[-1].cursor)
            parts.append((part.tokens, position))
            here.add(part)
            read.add(part)
            if len(kept) < _KEPT:
                kept.extend(record for record in block if isinstance(record, SourceDocument) and not record.deleted)
            on_progress(read)
            if share is not None and here.documents >= share and 0 < position < size:
                at_end = False
                break
        factor = 1.0 if at_end else size / position
        total.add(here.scaled(factor))
        if not at_end:
            whole = False
            variance += (_relative_error(parts) * here.tokens * factor) ** 2
    spread = math.sqrt(variance) / total.tokens if total.tokens else 0.0
    return Survey(read, total, whole, spread, _document_bytes(kept[:_KEPT]), [d.text for d in kept[:_BLOCK]])


def _blocks(records: Iterator[SourceDocument | Reject]) -> Iterator[list[SourceDocument | Reject]]:
    while block := list(islice(records, _BLOCK)):
        yield block


def _count(
    block: Iterable[SourceDocument | Reject], count_tokens: CountTokens, max_tokens: int, index: DatasetIndex | None
) -> Counts:
    counts = Counts()
    documents = []
    for record in block:
        if isinstance(record, Reject):
            counts.rejected += 1
            continue
        counts.documents += record.last
        if not record.deleted:
            documents.append(record)
    known = index.newest([document.id for document in documents]) if index is not None else {}
    texts = []
    for document in documents:
        counts.passages += 1
        before = known.get(document.id)
        if before is not None and not before.deleted and before.text_hash == document.text_hash:
            counts.unchanged += 1
        else:
            texts.append(document.text)
    tokens = np.asarray(count_tokens(texts), dtype=np.float64) if texts else np.zeros(0)
    if max_tokens:
        counts.cut = float((tokens > max_tokens).sum())
        tokens = np.minimum(tokens, max_tokens)
    counts.tokens = float(tokens.sum())
    counts.text_bytes = float(sum(len(document.text.encode("utf-8", "replace")) for document in documents))
    return counts


def _relative_error(parts: Sequence[tuple[float, int]]) -> float:
    """Two standard errors of the mean of tokens per byte over some twenty stretches; parts: tokens, and where they end."""
    stretches = np.array_split(np.arange(len(parts)), min(_PARTS, len(parts)))
    rates, before = [], 0
    for stretch in stretches:
        end = parts[stretch[-1]][1]
        if end > before:
            rates.append(sum(parts[i][0] for i in stretch) / (end - before))
        before = end
    if len(rates) < 2 or not np.mean(rates):
        return 1.0
    return float(2 * np.std(rates, ddof=1) / math.sqrt(len(rates)) / np.mean(rates))


def _document_bytes(documents: Sequence[SourceDocument]) -> float:
    """Bytes of a passage in the document log, from a shard made of these."""
    if not documents:
        return 0.0
    passages = [Passage(d.id, d.text, d.metadata, 1, d.text_hash, d.metadata_hash, False, d.group) for d in documents]
    return len(encode_passages(passages_table(passages, origin=ShardOrigin(0, "quote")))) / len(documents)
