"""The spend log: what a worker was billed, a line per flush, beside the dataset. It outlives Redis."""

from __future__ import annotations

import json

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import spend_key

from .results import Increment


class SpendLog:
    """Appends to `spend/WORKER.log`. `key_id` stands for the API key that was billed. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset, *, worker: str, key_id: str) -> None:
        self._dataset = dataset
        self._key_id = key_id
        self._key = spend_key(worker)

    def add(self, shard: int, increment: Increment) -> None:
        if increment.empty:
            return
        record = {
            "at": now_iso(),
            "key": self._key_id,
            "shard": shard,
            "passages": len(increment.rows),
            "tokens": increment.billed_tokens,
            "requests": increment.requests,
        }
        self._dataset.store.append(self._key, (json.dumps(record) + "\n").encode())
