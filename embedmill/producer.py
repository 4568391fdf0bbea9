"""Documents pushed through Redis by any program, without a dataset or a model at hand.

    async with Producer("redis://localhost:6379/0", inbox="wiki") as producer:
        await producer.add("a", "some text", metadata={"lang": "en"})
        await producer.delete("b")
    print(producer.receipts.admitted)

A batch is kept in memory until its receipt says that the dataset has it. When no receipt comes and the inbox does not have
it either, as after Redis lost its data, it is pushed again under its key; the dataset knows the key: nothing is doubled.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import anyio
from anyio.abc import TaskGroup

from .connection import Connection, key_prefix
from .errors import ConfigurationError, EmbedmillError, InputRejected, TransientError
from .failpoints import afailpoint
from .inbox import (
    INBOX_VERSION,
    MAX_DOCUMENT_BYTES,
    Receipt,
    check_inbox_name,
    check_key,
    encode_document,
    receipts_key,
)
from .messages import Lane

_log = logging.getLogger("embedmill.producer")
_FULL_WAIT_S = (0.05, 0.5)
_TROUBLE_WAIT_S = (0.5, 2.0)
_RECEIPTS_POLL_S = 2.0
_KEPT_REJECTS = 10_000


@dataclass(slots=True)
class ReceiptTotals:
    """Documents by what became of them, over all receipts so far; see `Receipt`.

    rejects: (id or None, reason) of the first 10,000 that were rejected.
    """

    batches: int = 0
    admitted: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0
    repeated: int = 0
    rejected: int = 0
    rejects: list[tuple[str | None, str]] = field(default_factory=list)

    def add(self, receipt: Receipt) -> None:
        self.batches += 1
        for name in ("admitted", "updated", "unchanged", "deleted", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(receipt, name))
        self.rejected += len(receipt.rejected)
        self.rejects.extend(receipt.rejected[: max(0, _KEPT_REJECTS - len(self.rejects))])


@dataclass(slots=True, eq=False)
class _Batch:
    """Lines of one message. order: its place in the sequence of batches; done: its receipt is here, or is not waited for."""

    key: str
    order: int
    lines: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    bytes: int = 0
    since: float = 0.0
    pushed: bool = False
    done: anyio.Event = field(default_factory=anyio.Event)


class Producer:
    """Pushes documents into the inbox of a dataset; use it as an async context manager, from any number of tasks.

    redis: a URL, or a Connection, which is then not closed here. job, lane: under which job the documents are admitted,
    and the lane of a job that is new. A batch goes off at `batch_documents` documents or `batch_bytes`, and at the latest
    after `linger_s`. high_water, high_water_bytes: what may wait in the inbox; above it the producer waits.
    max_pending_bytes: what may be kept in memory; above it `add` waits. confirm=False: a batch is done once Redis has it,
    and what Redis then loses is lost. on_receipt: called with each receipt.

    An id that is on its way in an earlier batch is not sent again before that one's receipt, so what was added last is
    newest, also when Redis loses something in between.
    """

    def __init__(
        self,
        redis: str | Connection,
        *,
        inbox: str,
        namespace: str = "default",
        job: str = "main",
        lane: Lane = "bulk",
        batch_documents: int = 64,
        batch_bytes: int = 256 * 1024,
        linger_s: float = 0.2,
        high_water: int = 10_000,
        high_water_bytes: int = 1024**3,
        max_pending_bytes: int = 64 * 1024**2,
        confirm: bool = True,
        resend_s: float = 5.0,
        on_receipt: Callable[[Receipt], None] | None = None,
    ) -> None:
        if min(batch_documents, batch_bytes, high_water, high_water_bytes, max_pending_bytes) < 1 or resend_s <= 0:
            raise ConfigurationError("the limits of a Producer must be at least 1, and resend_s above 0")
        self._redis = redis
        self._inbox = check_inbox_name(inbox)
        self._job = check_inbox_name(job)
        self._lane = lane
        self._prefix = key_prefix(namespace)
        self._batch_documents, self._batch_bytes, self._linger_s = batch_documents, batch_bytes, linger_s
        self._high_water, self._high_water_bytes = high_water, high_water_bytes
        self._max_pending_bytes = max_pending_bytes
        self._confirm, self._resend_s, self._on_receipt = confirm, resend_s, on_receipt
        self._name = uuid.uuid4().hex
        self._receipts_stream = receipts_key(namespace, self._name)
        self.receipts = ReceiptTotals()
        self._open: _Batch | None = None
        self._to_push: deque[_Batch] = deque()
        self._pending: dict[str, _Batch] = {}
        self._on_the_way: dict[str, _Batch] = {}
        self._pending_bytes = 0
        self._order = 0
        self._trouble: EmbedmillError | None = None
        self._changed = anyio.Event()
        self._adding = anyio.Lock()
        self._stack = AsyncExitStack()
        self._connection: Connection

    async def __aenter__(self) -> Producer:
        await self._stack.__aenter__()
        if isinstance(self._redis, Connection):
            self._connection = self._redis
        else:
            self._connection = Connection(self._redis)
            self._stack.push_async_callback(self._connection.aclose)
        group = await self._stack.enter_async_context(anyio.create_task_group())
        self._start(group)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush, unless the body failed: then what is not pushed yet is dropped."""
        try:
            if kind is None:
                await self.flush()
        finally:
            self._group.cancel_scope.cancel()
            await self._stack.aclose()

    async def add(
        self,
        id: str,  # noqa: A002
        text: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        group: str | None = None,
        last: bool = True,
    ) -> None:
        """Add a document; waits while too much is pending. group, last: it is a passage of a document, see docs/wire.md.

        Raises InputRejected, in a sentence, for what cannot be admitted; ConfigurationError when Redis refuses for good.
        """
        await self._add(id, encode_document(id, text, metadata=metadata, group=group, last=last))

    async def delete(self, id: str) -> None:  # noqa: A002
        """Delete a document, with all of its passages. Raises as `add` does."""
        await self._add(id, encode_document(id, deleted=True))

    async def add_batch(self, documents: Iterable[Mapping[str, Any]], *, key: str) -> None:
        """Add documents, each with the fields of docs/wire.md (`id`, `text`, ...), as one batch under a key of your own.

        A key stands for these very documents: whenever it comes again, nothing is admitted again. Raises as `add` does.
        """
        check_key(key)
        lines, ids = [], set()
        for document in documents:
            fields = dict(document)
            lines.append(encode_document(fields.pop("id", None), fields.pop("text", None), **_known(fields)))
            ids.add(str(document["id"]))
        size = sum(len(line.encode()) + 1 for line in lines)
        if not lines or size > 4 * MAX_DOCUMENT_BYTES:
            raise InputRejected(
                f"the batch {key!r} has {size} bytes: between 1 document and {4 * MAX_DOCUMENT_BYTES} bytes"
            )
        async with self._adding:
            self._seal()
            if key in self._pending:
                await self._pending[key].done.wait()
            await self._make_room(ids, size)
            self._order += 1
            self._open = _Batch(key, self._order, lines, ids, size)
            self._pending_bytes += size
            self._seal()

    async def flush(self) -> None:
        """Wait until everything added so far is admitted (with confirm=False: is in Redis). Raises ConfigurationError."""
        self._seal()
        upto = self._order
        while any(batch.order <= upto for batch in self._pending.values()):
            self._raise_trouble()
            await self._changed.wait()
        self._raise_trouble()

    @property
    def pending_bytes(self) -> int:
        """Bytes that are kept because nobody has confirmed them yet."""
        return self._pending_bytes

    def _start(self, group: TaskGroup) -> None:
        self._group = group
        group.start_soon(self._guard, self._push_all)
        group.start_soon(self._guard, self._watch_linger)
        if self._confirm:
            group.start_soon(self._guard, self._read_receipts)
            group.start_soon(self._guard, self._push_lost_again)

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        """What ends a part is told to whoever calls next."""
        try:
            await part()
        except EmbedmillError as error:
            self._trouble = self._trouble or error
            self._notify()

    async def _add(self, id_: str, line: str) -> None:
        size = len(line.encode()) + 1
        id_ = str(id_)
        async with self._adding:
            if self._open is not None and self._open.bytes + size > self._batch_bytes:
                self._seal()
            await self._make_room({id_}, size)
            if self._open is None:
                self._order += 1
                key = f"{self._name}/{self._order}"
                self._open = _Batch(key, self._order, since=anyio.current_time())
                self._notify()
            self._open.lines.append(line)
            self._open.ids.add(id_)
            self._open.bytes += size
            self._pending_bytes += size
            if len(self._open.lines) >= self._batch_documents or self._open.bytes >= self._batch_bytes:
                self._seal()

    async def _make_room(self, ids: set[str], size: int) -> None:
        """Wait until there is memory for it, and none of the ids is on its way."""
        self._raise_trouble()
        while True:
            earlier = next((self._on_the_way[id_] for id_ in ids if id_ in self._on_the_way), None)
            too_much = self._pending_bytes and self._pending_bytes + size > self._max_pending_bytes
            if earlier is None and not too_much:
                return
            if too_much:
                self._seal()
            await self._changed.wait()
            self._raise_trouble()

    def _seal(self) -> None:
        batch, self._open = self._open, None
        if batch is None:
            return
        self._pending[batch.key] = batch
        self._on_the_way.update(dict.fromkeys(batch.ids, batch))
        self._to_push.append(batch)
        self._notify()

    def _finish(self, batch: _Batch) -> None:
        self._pending.pop(batch.key, None)
        for id_ in batch.ids:
            if self._on_the_way.get(id_) is batch:
                del self._on_the_way[id_]
        self._pending_bytes -= batch.bytes
        batch.done.set()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _raise_trouble(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    async def _watch_linger(self) -> None:
        while True:
            batch = self._open
            if batch is None:
                await self._changed.wait()
                continue
            await anyio.sleep(max(0.0, batch.since + self._linger_s - anyio.current_time()))
            if self._open is batch:
                self._seal()

    async def _push_all(self) -> None:
        """One after the other, so that the stream has the order of adding."""
        while True:
            if not self._to_push:
                await self._changed.wait()
                continue
            batch = self._to_push.popleft()
            if batch.key not in self._pending:
                continue
            await self._push(batch)
            batch.pushed = True
            await afailpoint("producer.after_push")
            if not self._confirm:
                self._finish(batch)

    async def _push(self, batch: _Batch) -> None:
        documents = "\n".join(batch.lines)
        fields = ["v", INBOX_VERSION, "key", batch.key, "job", self._job, "lane", self._lane]
        fields += ["reply", self._name] if self._confirm else []
        arguments = [self._inbox, self._high_water, self._high_water_bytes, batch.key, batch.bytes]
        while True:
            try:
                state, *_ = await self._connection.script(
                    "embedmill/push", [self._prefix], [*arguments, *fields, "documents", documents]
                )
            except TransientError as error:
                _log.warning("pushing into %s: %s; trying on", self._inbox, error)
                await anyio.sleep(random.uniform(*_TROUBLE_WAIT_S))
                continue
            if int(state) >= 0:
                return
            await anyio.sleep(random.uniform(*_FULL_WAIT_S))

    async def _read_receipts(self) -> None:
        after = "0"
        last_from_start = anyio.current_time()
        while True:
            await self._connection.wait_for_entry(self._receipts_stream, after, timeout_s=_RECEIPTS_POLL_S)
            if anyio.current_time() - last_from_start > self._resend_s:
                # A server that lost its data may count its entries from anywhere.
                after, last_from_start = "0", anyio.current_time()
            after = await self._take_receipts(after)

    async def _take_receipts(self, after: str) -> str:
        while True:
            try:
                entries = await self._connection.command(
                    "XRANGE", self._receipts_stream, f"({after}", "+", "COUNT", 1000
                )
            except TransientError as error:
                _log.warning("waiting for receipts of %s: %s; trying on", self._inbox, error)
                await anyio.sleep(random.uniform(*_TROUBLE_WAIT_S))
                continue
            if not entries:
                return after
            after = str(entries[-1][0])
            for _, fields in entries:
                self._take_receipt(fields or {})

    def _take_receipt(self, fields: Mapping[str, str]) -> None:
        try:
            receipt = Receipt.from_json(fields.get("receipt", ""))
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("an unreadable receipt of %s: %s", self._inbox, error)
            return
        batch = self._pending.get(receipt.key)
        if batch is None:
            return
        self.receipts.add(receipt)
        self._finish(batch)
        if self._on_receipt is not None:
            self._on_receipt(receipt)

    async def _push_lost_again(self) -> None:
        while True:
            await anyio.sleep(self._resend_s)
            waiting = [batch for batch in self._pending.values() if batch.pushed]
            for start in range(0, len(waiting), 500):
                await self._look_for(waiting[start : start + 500])

    async def _look_for(self, batches: Sequence[_Batch]) -> None:
        try:
            keys = [batch.key for batch in batches]
            missing = set(await self._connection.script("embedmill/missing", [self._prefix], [self._inbox, *keys]))
        except TransientError as error:
            _log.warning("looking for batches in %s: %s; trying on", self._inbox, error)
            return
        for batch in sorted(batches, key=lambda batch: batch.order):
            if batch.key in missing and batch.key in self._pending:
                batch.pushed = False
                self._to_push.append(batch)
        self._notify()


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    unknown = fields.keys() - {"metadata", "deleted", "group", "last"}
    if unknown:
        raise InputRejected(f"unknown field {min(unknown)!r}: what describes a document goes into its metadata")
    return fields
