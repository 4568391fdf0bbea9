"""A provider's batch endpoint that is a folder, so that it outlives whoever submits; and the embedder that has it."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from embedmill.embedder import Embedding, Role
from worker.batch_endpoint import BatchLine, BatchStatus
from worker.embedders.null import NullEmbedder, hash_vectors

_TAKES_S = 0.3


class FolderBatches:
    """null/DIMENSIONS in batches, each a file of texts by custom_id that is done some time after it was written."""

    model, key_id, api_base = "null", "k", "folder"
    max_lines, max_bytes = 10_000, 2**20

    def __init__(self, folder: Path, dimensions: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._dimensions = folder, dimensions

    async def submit(self, texts: Mapping[str, str]) -> BatchStatus:
        path = self._folder / f"{uuid.uuid4().hex}.json"
        path.with_suffix(".new").write_text(json.dumps(dict(texts)))
        path.with_suffix(".new").rename(path)
        return self._status(path)

    async def status(self, batch_id: str) -> BatchStatus | None:
        path = self._folder / f"{batch_id}.json"
        return self._status(path) if path.exists() else None

    async def cancel(self, batch_id: str) -> BatchStatus | None:
        """Too late: what was submitted is worked off."""
        return await self.status(batch_id)

    async def recent(self) -> tuple[Sequence[BatchStatus], bool]:
        return [self._status(path) for path in self._folder.glob("*.json")], True

    async def output(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        texts = json.loads((self._folder / f"{batch_id}.json").read_text())
        for custom_id, text in texts.items():
            yield BatchLine(custom_id, hash_vectors([text], self._dimensions)[0])

    async def errors(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        for line in ():
            yield line

    async def aclose(self) -> None:
        """Nothing to release."""

    def _status(self, path: Path) -> BatchStatus:
        lines = len(json.loads(path.read_text()))
        done = time.time() - path.stat().st_mtime >= _TAKES_S
        return BatchStatus(
            path.stem, "completed" if done else "processing", self.model,
            total=lines, completed=lines if done else 0, failed=0, tokens=lines if done else 0, has_errors=False, error="",
        )  # fmt: skip


class BatchedEmbedder(NullEmbedder):
    """null/DIMENSIONS whose batches are in a folder. What it is asked for otherwise is noted, a line for each passage."""

    def __init__(self, dimensions: int, folder: Path, sent: Path) -> None:
        super().__init__(dimensions)
        self._folder, self._sent = folder, sent

    def batch_endpoint(self, key: str = "") -> FolderBatches:
        return FolderBatches(self._folder, self.spec.dimensions)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        with self._sent.open("a") as file:
            file.write("".join(f"{text}\n" for text in texts))
        return await super().embed(texts, role=role)


def submitted(folder: Path) -> Counter[str]:
    """How often each text went into a batch."""
    return Counter(text for path in folder.glob("*.json") for text in json.loads(path.read_text()).values())
