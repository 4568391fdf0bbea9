"""Sources read to their end and admitted, block by block, so that memory stays bounded however large they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from anyio import to_thread

from embedmill.documents import Reject, SourceDocument
from embedmill.errors import ConfigurationError, StorageError
from embedmill.messages import Task
from embedmill.sources.opening import Source
from embedmill.sources.rejects import RejectFile

from .admission import Admitter
from .queue import Queue

_BLOCK_RECORDS = 1024
_BLOCK_BYTES = 8 * 1024 * 1024


class Intake:
    """Reads sources in the order given and enqueues the shards that they fill.

    Rejected records go to a file per source below `rejects`, which a resumed reading continues without repeating itself;
    with `strict` the first of them ends the reading. `limit` bounds the documents that are new or changed; the reading ends
    behind the last of them.
    """

    def __init__(
        self, admitter: Admitter, queue: Queue, *, rejects: Path, limit: int | None = None, strict: bool = False
    ) -> None:
        self._admitter = admitter
        self._queue = queue
        self._rejects = rejects
        self._files: dict[str, RejectFile] = {}
        admitter.on_late_reject = self._keep_late
        self._left = limit
        self._admitted_before = 0
        # A source that is slow, such as standard input, is not waited for beyond the limit where all of it is new.
        self._block_records = _BLOCK_RECORDS if limit is None else min(limit, _BLOCK_RECORDS)
        self._strict = strict
        self._stopped = False
        self._read_bytes: dict[str, int] = {}
        self._total_bytes: int | None = 0
        self.reject_files: dict[Path, int] = {}
        self.remarks: list[str] = []
        self.finished = False

    def stop(self) -> None:
        """Stop reading. The open shard is dropped: what was in it is read again by whoever resumes."""
        self._stopped = True

    @property
    def fraction(self) -> float | None:
        """How much of all sources has been read, 0 to 1; None when their size is unknown."""
        if self.finished:
            return 1.0
        if not self._total_bytes:
            return None
        return min(1.0, sum(self._read_bytes.values()) / self._total_bytes)

    @property
    def rejected(self) -> int:
        return sum(self.reject_files.values())

    async def run(self, sources: Sequence[Source]) -> None:
        """Read everything.

        Raises ConfigurationError for a source that vanished, and with `strict` for a record that is no document;
        StorageError for a full disk and for an object store that does not answer.
        """
        sizes = [source.total_bytes() for source in sources]
        self._total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        keys = {source.push_key for source in sources}
        for source in sources:
            await self._read(source, beside=keys)
        if not self._stopped:
            try:
                await self._queue.enqueue(await to_thread.run_sync(self._admitter.close_shard))
            finally:
                for rejects in self._files.values():
                    await to_thread.run_sync(_close, rejects)
            self.finished = True

    async def _read(self, source: Source, *, beside: set[str]) -> None:
        push_key, after = await to_thread.run_sync(partial(self._admitter.reading, source.push_key, beside=beside))
        rejects = RejectFile(self._rejects / f"{_file_name(source.name)}-{source.push_key[:8]}.jsonl")
        await to_thread.run_sync(rejects.resume, after)
        self._files[push_key] = rejects
        if after is not None:
            self._read_bytes[source.push_key] = source.position_bytes(after)
        records = source.read(after=after)
        try:
            while not self._stopped and self._left != 0:
                block = await to_thread.run_sync(self._take_block, records)
                if not block:
                    break
                await self._admit(push_key, source, block, rejects)
        finally:
            self.remarks.extend(source.remarks())
            await to_thread.run_sync(_close, rejects)
            if rejects.count:
                self.reject_files[rejects.path] = rejects.count

    async def _admit(
        self, push_key: str, source: Source, block: list[SourceDocument | Reject], rejects: RejectFile
    ) -> None:
        def admit() -> list[Task]:
            def keep(new: Sequence[Reject]) -> None:
                if new and self._strict:
                    raise self._refuse(new[0])
                _write(rejects, new)

            return self._admitter.admit(push_key, source.name, block, keep_rejects=keep, enough=self._is_enough).tasks

        await self._queue.enqueue(await to_thread.run_sync(admit))
        if rejects.count:
            self.reject_files[rejects.path] = rejects.count
        self._read_bytes[source.push_key] = source.position_bytes(block[-1].cursor)

    def _keep_late(self, push_key: str, reject: Reject) -> None:
        """Of a source that may have been read to its end."""
        if self._strict:
            raise self._refuse(reject)
        rejects = self._files[push_key]
        _write(rejects, [reject])
        self.reject_files[rejects.path] = rejects.count

    def _take_block(self, records: Iterator[SourceDocument | Reject]) -> list[SourceDocument | Reject]:
        block: list[SourceDocument | Reject] = []
        size = 0
        while len(block) < self._block_records and size < _BLOCK_BYTES:
            record = next(records, None)
            if record is None:
                break
            block.append(record)
            if isinstance(record, SourceDocument):
                size += len(record.text)
        self._block_records = min(_BLOCK_RECORDS, 2 * self._block_records)
        return block

    def _is_enough(self, record: SourceDocument | Reject) -> bool:
        """Whether this record, which was taken, ends the last document that is wanted."""
        if self._left is None or isinstance(record, Reject) or not record.last:
            return False
        admitted = self._admitter.counts.admitted
        self._left -= admitted > self._admitted_before
        self._admitted_before = admitted
        return self._left == 0

    def _refuse(self, reject: Reject) -> ConfigurationError:
        waiting = self._admitter.waiting
        admitted = self._admitter.counts.admitted - waiting["new"] - waiting["updated"]
        return ConfigurationError(
            f"{reject.place}: {reject.reason}; --strict stops here. {admitted:,} passages of this run were admitted before "
            "it and stay: mend the record and run the same command again"
        )


def _file_name(name: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name.rstrip("/").rsplit("/", 1)[-1]).strip("._")
    return stem or "stdin"


def _write(rejects: RejectFile, new: Sequence[Reject]) -> None:
    try:
        for reject in new:
            rejects.add(reject)
        if new:
            rejects.flush()
    except OSError as error:
        raise StorageError(f"cannot write {rejects.path}: {error.strerror}") from error


def _close(rejects: RejectFile) -> None:
    try:
        rejects.close()
    except OSError as error:
        raise StorageError(f"cannot write {rejects.path}: {error.strerror}") from error
