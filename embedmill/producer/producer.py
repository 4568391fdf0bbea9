"""`Producer`, as programs use it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

import anyio

from ..connection import Connection, Unreachable, key_prefix
from ..documents import SourceDocument
from ..errors import ConfigurationError, InputRejected, TransientError
from ..inbox import MAX_DOCUMENT_BYTES, Receipt, check_inbox_name, check_key, encode_document, receipts_key
from ..messages import LANES, NAME, Lane
from .batches import Batches, SplitDocuments, names_of
from .delivery import Delivery, Destination
from .receipts import Receipts, ReceiptTotals

_log = logging.getLogger("embedmill.producer")
_MAX_BATCH_BYTES = 4 * MAX_DOCUMENT_BYTES


class Producer:
    """Pushes documents into the inbox of a dataset; use it as an async context manager, from any number of tasks of one
    event loop.

    redis: a URL, or a Connection, which is then not closed here. job, lane: under which job the documents are admitted,
    and the lane of a job that is new. A batch goes off at `batch_documents` documents or `batch_bytes`, and at the latest
    after `linger_s`. high_water, high_water_bytes: what may wait in the inbox; above it the producer waits.
    max_pending_bytes: what may be kept in memory, above it `add` waits; also the most that the passages of one document may
    take, since late chunking admits them together. confirm=False: a batch is done once Redis has it,
    and what Redis then loses is lost. resend_s: how often to look for what has no receipt and was lost. on_receipt: called
    with each receipt; what it raises ends the producer.

    While Redis is away everything waits, with a warning in the log; when it refuses for good, whoever calls is told. An id
    that is on its way in an earlier batch is not sent again before that one's receipt, nor is a document of which passages
    are; so what was added last is newest, also when Redis loses something in between.
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
        if batch_bytes > _MAX_BATCH_BYTES:
            raise ConfigurationError(f"batch_bytes is {batch_bytes}, the limit is {_MAX_BATCH_BYTES}")
        if not NAME.fullmatch(job):
            raise ConfigurationError(f"job {job!r}: use letters, digits, dots, dashes and underscores, at most 100")
        if lane not in LANES:
            raise ConfigurationError(f"lane {lane!r} is neither live nor bulk")
        self._redis = redis
        self._name = uuid.uuid4().hex
        reply = self._name if confirm else ""
        self._destination = Destination(
            key_prefix(namespace), check_inbox_name(inbox), job, lane, high_water, high_water_bytes, reply
        )
        self._receipts_stream = receipts_key(namespace, self._name)
        self._batch_documents, self._batch_bytes, self._linger_s = batch_documents, batch_bytes, linger_s
        self._resend_s, self._on_receipt = resend_s, on_receipt
        self.receipts = ReceiptTotals()
        self._max_pending_bytes = max_pending_bytes
        self._batches = Batches(max_bytes=max_pending_bytes)
        self._split = SplitDocuments()
        self._adding = anyio.Lock()
        self._stack = AsyncExitStack()
        self._stop: Callable[[], None]
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Producer:
        if self._loop is not None:
            raise ConfigurationError("a Producer is opened once: make another one")
        await self._stack.__aenter__()
        if isinstance(self._redis, Connection):
            connection = self._redis
        else:
            connection = Connection(self._redis)
            self._stack.push_async_callback(connection.aclose)
        await _require_usable(connection)
        delivery = Delivery(connection, self._batches, self._destination)
        parts: list[Callable[[], Awaitable[None]]] = [
            delivery.push_all,
            lambda: self._batches.seal_in_time(self._linger_s),
        ]
        if self._destination.wants_receipts:
            receipts = Receipts(
                connection, self._batches, self.receipts, stream=self._receipts_stream, on_receipt=self._on_receipt
            )
            self._stack.push_async_callback(receipts.forget)
            parts += [receipts.read_all, lambda: delivery.push_lost_again(self._resend_s)]
        group = await self._stack.enter_async_context(anyio.create_task_group())
        for part in parts:
            group.start_soon(self._guard, part)
        self._stop = group.cancel_scope.cancel
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush, unless the body failed: then what is not pushed yet is dropped."""
        try:
            if kind is None:
                await self.flush()
        finally:
            self._batches.fail(ConfigurationError("this Producer is closed: make another one"))
            self._stop()
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
        """Add a document; waits while too much is pending. Cancelled while it waits, nothing was added.

        group: it is a passage of that document; they are added in their order, with the ids GROUP#0, GROUP#1 and so on, and
        all but the last with last=False. Raises InputRejected, in a sentence, for what cannot be admitted;
        ConfigurationError when Redis refuses for good, and outside of the `async with` of this producer.
        With late chunking nothing of a document is admitted before its last passage is there, or another document.
        """
        await self._add(*encode_document(id, text, metadata=metadata, group=group, last=last))

    async def delete(self, id: str) -> None:  # noqa: A002
        """Delete a document, with all of its passages. Raises as `add` does."""
        await self._add(*encode_document(id, deleted=True))

    async def add_batch(self, documents: Iterable[Mapping[str, Any]], *, key: str) -> None:
        """Add documents, each with the fields of docs/wire.md (`id`, `text`, ...), as one batch under a key of your own.

        A key stands for these very documents: whenever it comes again, nothing is admitted again. Raises as `add` does.
        """
        self._require_open()
        key = check_key(key)
        encoded = [encode_document(**_fields_of(document)) for document in documents]
        lines, read = [line for line, _ in encoded], [document for _, document in encoded]
        size = sum(map(_size_of, lines))
        if not lines:
            raise InputRejected(f"the batch {key!r} has no document")
        if size > _MAX_BATCH_BYTES:
            raise InputRejected(f"the batch {key!r} has {size} bytes, the limit is {_MAX_BATCH_BYTES}")
        names, awaited = names_of(read)
        async with self._adding:
            self._batches.seal()
            await self._batches.wait_for_key(key)
            self._split.check_room(read[0], size, max_bytes=self._max_pending_bytes)
            await self._batches.wait_for_room(awaited, size, held_bytes=self._split.held_bytes)
            batch = self._batches.begin(key)
            self._batches.append(batch, lines, names=names, size=size)
            self._batches.seal()
            self._split.note(read, batch, size)

    async def flush(self) -> None:
        """Wait until everything added so far is admitted (with confirm=False: is in Redis). Raises ConfigurationError."""
        self._require_open()
        await self._batches.wait_for_all()

    @property
    def pending_bytes(self) -> int:
        """Bytes that are kept because nobody has confirmed them yet."""
        return self._batches.bytes

    async def _add(self, line: str, document: SourceDocument) -> None:
        self._require_open()
        size = _size_of(line)
        names, awaited = names_of([document])
        batches = self._batches
        async with self._adding:
            self._split.check(document)
            self._split.check_room(document, size, max_bytes=self._max_pending_bytes)
            if batches.open is not None and batches.open.bytes + size > self._batch_bytes:
                batches.seal()
            await batches.wait_for_room(awaited, size, held_bytes=self._split.held_bytes)
            batch = batches.open or batches.begin(f"{self._name}/{batches.begun + 1}")
            batches.append(batch, [line], names=names, size=size)
            self._split.note([document], batch, size)
            if len(batch.lines) >= self._batch_documents or batch.bytes >= self._batch_bytes:
                batches.seal()

    def _require_open(self) -> None:
        if self._loop is None:
            raise ConfigurationError("this Producer is not open: use it as in `async with Producer(...) as producer:`")
        self._batches.raise_trouble()
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError("this Producer was opened in another event loop: make one in each loop")

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        """What ends a part is told to whoever calls next."""
        try:
            await part()
        except Exception as error:
            self._batches.fail(error)


def _size_of(line: str) -> int:
    return len(line.encode()) + 1


def _fields_of(document: object) -> dict[str, Any]:
    """The arguments of `encode_document`. Raises InputRejected."""
    if not isinstance(document, Mapping):
        raise InputRejected(f"a document is a mapping of its fields, not {type(document).__name__}")
    unknown = document.keys() - {"id", "text", "metadata", "deleted", "group", "last"}
    if unknown:
        raise InputRejected(
            f"unknown field {min(map(str, unknown))!r:.80}: what describes a document goes into metadata"
        )
    return {"id": None, **document}


async def _require_usable(connection: Connection) -> None:
    """Raises ConfigurationError for a server that refuses us, or may drop what waits in it. One that is away comes back."""
    try:
        policy = (await connection.check()).get("maxmemory_policy", "noeviction")
    except (TransientError, Unreachable) as error:
        _log.warning("%s; what is added meanwhile is pushed when it is back", error)
        return
    if policy != "noeviction":
        raise ConfigurationError(
            f"Redis may evict keys (maxmemory-policy {policy}), and documents with them: set it to noeviction"
        )
