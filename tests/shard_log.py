"""A dataset's shards written as admission and workers would write them, in any history that a test wants."""

from __future__ import annotations

import numpy as np

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED, Failure, Marker
from embedmill.dataset.passages import Passage, ShardOrigin
from worker.embedders.null import hash_vectors

from .datasets import passage


class ShardLog:
    """Writes shards as admission and workers would: each a list of (id, text), text None to delete, `!` to fail at first."""

    def __init__(self, dataset: Dataset, *, job: str = "main") -> None:
        self.dataset = dataset
        self.job = job
        self.versions: dict[str, int] = {}
        self.source: dict[str, str] = {}

    def shard(
        self, *rows: tuple[str, str | None], commit: bool = True, retries: dict[int, tuple[int, int]] | None = None
    ) -> int:
        number = len(self.dataset.admitted())
        passages = [self._passage(id_, text, is_retry=at in (retries or {})) for at, (id_, text) in enumerate(rows)]
        origin = ShardOrigin(number, self.job, retries=retries or {})
        self.dataset.append_passages(number, passages, origin=origin)
        if commit:
            self.commit(number, passages, origin)
        return number

    def commit(self, number: int, passages: list[Passage], origin: ShardOrigin) -> None:
        statuses = np.array(
            [
                DELETED if p.deleted else FAILED if p.text.startswith("!") and row not in origin.retries else EMBEDDED
                for row, p in enumerate(passages)
            ],
            np.uint8,
        )
        vectors = hash_vectors([p.text for p in passages], self.dataset.info.dimensions)
        vectors[statuses != EMBEDDED] = np.nan
        key = layout.documents_key(number)
        objects = {key: self.dataset.describe_object(key)}
        if (statuses == EMBEDDED).any():
            objects[layout.vectors_key(number)] = self.dataset.create_vectors(number, vectors)
        self.dataset.commit(
            Marker(
                number, statuses, self.dataset.info.embedder.fingerprint, "a", "w", now_iso(), billed_tokens=7,
                failures=tuple(
                    Failure(row, p.id, p.version, "gate", "no vector") for row, p in enumerate(passages)
                    if statuses[row] == FAILED
                ),
                retries=origin.retries, objects=objects,
            )
        )  # fmt: skip
        self.dataset.publish_shape()

    def commit_admitted(self, number: int) -> None:
        """Commit a shard that was left owed, or was put aside."""
        table, origin = self.dataset.documents(number)
        rows = [{name: value for name, value in row.items() if name != "job"} for row in table.to_pylist()]
        self.commit(number, [Passage(**row) for row in rows], origin)

    def _passage(self, id_: str, text: str | None, *, is_retry: bool) -> Passage:
        version = self.versions[id_] = self.versions.get(id_, 0) + (0 if is_retry else 1)
        if text is None:
            self.source.pop(id_, None)
        else:
            self.source[id_] = text
        return passage(id_, text or "", version=version, deleted=text is None)
