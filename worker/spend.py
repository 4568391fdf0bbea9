"""The spend log: what a worker was billed, a line for each request, beside the dataset. It outlives Redis."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice

import anyio
from anyio import to_thread

from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import spend_key
from embedmill.errors import StorageError
from scheduler.caps import Cap, Hold, Room

_log = logging.getLogger("embedmill.worker")


class SpendFile:
    """Lines for `spend/WORKER.log` of one dataset, in their order; one that cannot be written now goes with the next."""

    def __init__(self, dataset: Dataset, *, worker: str) -> None:
        self._store = dataset.store
        self._key = spend_key(worker)
        self._unwritten: deque[bytes] = deque()
        self._is_torn = False
        self._writing = anyio.Lock()

    def put(self, line: bytes) -> None:
        """To be written by the next `flush`."""
        self._unwritten.append(line)

    async def write(self) -> None:
        """Write what was put, one thread at a time; shielded."""
        with anyio.CancelScope(shield=True):
            async with self._writing:
                # Who had the lock before may have written it all.
                if self._unwritten:
                    await to_thread.run_sync(self.flush)

    def flush(self) -> None:
        """Write what was put, as far as the storage lets: it says soon enough what it lacks, and an answer that was paid
        for is not lost for it. Blocking; one thread at a time."""
        while self._unwritten:
            # Where a write may fail in the middle, one line at a time: none is written twice.
            count = len(self._unwritten) if self._store.appends_whole else 1
            lines = b"".join(islice(self._unwritten, count))
            try:
                # A write that failed may have left half a line, which no reader takes for one.
                self._store.append(self._key, b"\n" + lines if self._is_torn else lines)
            except StorageError as error:
                self._is_torn = True
                _log.warning("what a request cost was not noted yet: %s", error)
                return
            self._is_torn = False
            for _ in range(count):
                self._unwritten.popleft()


class SpendLog:
    """What one job was billed. file: shared by the jobs of one dataset; without it, its own."""

    def __init__(self, dataset: Dataset, *, worker: str, job: str, file: SpendFile | None = None) -> None:
        self._job = job
        self._file = file or SpendFile(dataset, worker=worker)

    def add(
        self, *, key: str, tokens: int, unknown_tokens: int = 0, shard: int | None = None, passages: int = 0
    ) -> None:
        """Note what a request was billed to a key, or may have been; shard: None where it was for none. Blocking; one
        thread at a time."""
        self._put(key=key, tokens=tokens, unknown_tokens=unknown_tokens, shard=shard, passages=passages)
        self._file.flush()

    async def note(self, hold: Hold, *, shard: int | None, passages: int) -> None:
        """The same of a request that has ended, where it cost anything."""
        if hold.grant is None or not (hold.billed_tokens or hold.unknown_tokens):
            return
        self._put(
            key=hold.grant.key_id,
            tokens=hold.billed_tokens,
            unknown_tokens=hold.unknown_tokens,
            shard=shard,
            passages=passages if hold.billed_tokens else 0,
        )
        await self._file.write()

    def _put(self, *, key: str, tokens: int, unknown_tokens: int, shard: int | None, passages: int) -> None:
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
        self._file.put((json.dumps(record) + "\n").encode())


class SpendFiles:
    """The files of one worker: one per dataset, however often its shards are tried."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._files: dict[tuple[str, str], SpendFile] = {}

    def log(self, dataset: Dataset, job: str) -> SpendLog:
        place = (dataset.info.id, dataset.url)
        if place not in self._files:
            self._files[place] = SpendFile(dataset, worker=self._worker)
        return SpendLog(dataset, worker=self._worker, job=job, file=self._files[place])

    async def write(self) -> None:
        """Write what could not be written before."""
        for file in self._files.values():
            await file.write()


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
                await self._log.note(hold, shard=self._shard, passages=len(texts))

    def set_aside(self, texts: Sequence[str]) -> AbstractAsyncContextManager[Hold]:
        """See `Cap.set_aside`. The bill of a batch has a log of its own."""
        return self._cap.set_aside(texts)

    async def room(self) -> Room:
        """See `Cap.room`."""
        return await self._cap.room()
