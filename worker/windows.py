"""Late chunking: which rows of a shard are embedded together, and what is kept of that.

A document's passages stand next to each other in its shard. They are one window, or several where the model cannot take
them together. Windows come from the texts alone, so every attempt makes the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from embedmill.dataset.layout import EMBEDDED, OWED, Window
from embedmill.embedder import BatchLimits, EmbedsTogether

from .packing import window_bounds
from .results import ShardResults


def documents_of(
    ids: Sequence[str], groups: Sequence[str | None], deleted: Sequence[bool | None]
) -> list[tuple[int, ...]]:
    """The rows of each document, in order; rows that stand for something deleted belong to none.

    A group ends at a row of another one, at a deleted row, and where an id comes again: then a newer version of the same
    document begins.
    """
    documents: list[list[int]] = []
    seen: set[str] = set()
    before: str | None = None
    for row, (id_, group, gone) in enumerate(zip(ids, groups, deleted, strict=True)):
        if gone:
            before = None
            continue
        if group is None or group != before or id_ in seen:
            documents.append([])
            seen = set()
        documents[-1].append(row)
        seen.add(id_)
        before = group
    return [tuple(rows) for rows in documents]


class WindowPlan:
    """The windows of one shard. Raises what the embedder's tokenizer raises."""

    def __init__(
        self, documents: Sequence[Sequence[int]], texts: Sequence[str], embedder: EmbedsTogether, *, max_inputs: int
    ) -> None:
        self._documents = documents
        limits = BatchLimits(max_inputs, embedder.window_tokens, padded=False, concurrency=1)
        tokens = embedder.planned_tokens([texts[row] for rows in documents for row in rows])
        self.windows: list[tuple[int, ...]] = []
        start = 0
        for rows in documents:
            counts = tokens[start : start + len(rows)]
            self.windows += [tuple(rows[first:end]) for first, end in window_bounds(counts, limits=limits)]
            start += len(rows)

    def owe_whole(self, results: ShardResults, *, suspects: Collection[int] = ()) -> None:
        """Where a part of a window is owed, owe all of it: a fragment would get other vectors. Failed rows stay failed.

        suspects: rows that may never get a vector; without them, the others are embedded together once.
        """
        for rows in self.windows:
            if all(results.statuses[row] != OWED for row in rows):
                continue
            embedded = [row for row in rows if results.statuses[row] == EMBEDDED]
            others_owed = any(results.statuses[row] == OWED and row not in suspects for row in rows)
            if others_owed or (embedded and tuple(embedded) != results.window_of(embedded[0])):
                results.owe_again(embedded)

    def owed(self, results: ShardResults) -> list[tuple[int, ...]]:
        """The windows that are owed, without the rows that failed."""
        left = (tuple(row for row in rows if results.statuses[row] == OWED) for rows in self.windows)
        return [rows for rows in left if rows]

    def split(self, results: ShardResults) -> tuple[Window, ...]:
        """See `split_documents`."""
        return split_documents(self._documents, results, planned=self.windows)


def split_documents(
    documents: Sequence[Sequence[int]], results: ShardResults, *, planned: Sequence[Sequence[int]] = ()
) -> tuple[Window, ...]:
    """What the marker keeps: the windows of every document that was not embedded whole.

    The rows of a window are those between its first and its last one that are embedded. Of rows that an earlier attempt
    stored, or a former version of the document left behind, the planned window is told.
    """
    window_of = {row: number for number, rows in enumerate(planned) for row in rows}
    made = {row: -1 - number for number, rows in enumerate(results.windows) for row in rows}
    windows: list[Window] = []
    for rows in documents:
        parts: dict[int, list[int]] = {}
        for row in rows:
            if results.statuses[row] == EMBEDDED:
                parts.setdefault(made.get(row, window_of.get(row, 0)), []).append(row)
        if len(parts) > 1:
            windows += sorted(Window(part[0], part[-1] - part[0] + 1) for part in parts.values())
    return tuple(windows)
