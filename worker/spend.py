"""The spend log: what a worker was billed, a line for each request, beside the dataset. It outlives Redis."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import spend_key
from embedmill.errors import StorageError
from scheduler.caps import Cap, Hold

_log = logging.getLogger("embedmill.worker")


class SpendLog:
    """Appends what one job was billed to `spend/WORKER.log`. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset, *, worker: str, job: str) -> None:
        self._dataset = dataset
        self._job = job
        self._key = spend_key(worker)
        self._unwritten: deque[bytes] = deque()

    def add(
        self, *, key: str, tokens: int, unknown_tokens: int = 0, shard: int | None = None, passages: int = 0
    ) -> None:
        """Note what a request was billed to a key, or may have been; shard: None where it was for none.

        What cannot be written now goes with the next line: the storage says soon enough what it lacks, and an answer that
        was paid for is not lost for it.
        """
        record = {
            "at": now_iso(),
            "key": key,
            "job": self._job,
            "shard": shard,
            "passages": passages,
            "tokens": tokens,
            "requests": 1,
            **({"unknown_tokens": unknown_tokens} if unknown_tokens else {}),
        }
        self._unwritten.append((json.dumps(record) + "\n").encode())
        # Each line is taken by one thread, whoever comes first.
        lines: list[bytes] = []
        with suppress(IndexError):
            while True:
                lines.append(self._unwritten.popleft())
        try:
            self._dataset.store.append(self._key, b"".join(lines))
        except StorageError as error:
            self._unwritten.extendleft(reversed(lines))
            _log.warning("what a request cost was not noted yet: %s", error)


class LoggedCap:
    """A job's cap whose every request is in the spend log before the cap is told: who loses the account reads it there.

    shard: for which the requests are, None for those that are for none.
    """

    def __init__(self, cap: Cap, log: SpendLog, *, shard: int | None) -> None:
        self._cap = cap
        self._log = log
        self._shard = shard

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        """See `Cap.reserve`."""
        async with self._cap.reserve(texts, est_tokens=est_tokens) as hold:
            try:
                yield hold
            finally:
                if hold.grant is not None and (hold.billed_tokens or hold.unknown_tokens):
                    note = partial(
                        self._log.add,
                        key=hold.grant.key_id,
                        tokens=hold.billed_tokens,
                        unknown_tokens=hold.unknown_tokens,
                        shard=self._shard,
                        passages=len(texts) if hold.billed_tokens else 0,
                    )
                    with anyio.CancelScope(shield=True):
                        await to_thread.run_sync(note)
