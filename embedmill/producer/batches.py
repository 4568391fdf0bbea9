"""What a producer keeps in memory: batches from the first document that is added until their receipt is here. No I/O.

Names: a document has its own id, and a passage that of its document as well. A name is on its way while a batch that has
it is pending, that is sealed and without a receipt. What is added later waits for it: else a server that loses the
earlier batch would have it pushed again behind the later one, and what is older would be newest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import anyio

from ..documents import SourceDocument
from ..errors import InputRejected
from ..inbox import passage_number


@dataclass(slots=True, eq=False)
class Batch:
    """Lines of one message. order: its place among the batches; since: when it was begun; pushed: Redis has had it."""

    key: str
    order: int
    since: float
    lines: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    bytes: int = 0
    pushed: bool = False


class Batches:
    """All of them, and the trouble that ends the producer, which is raised to whoever waits here."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.open: Batch | None = None
        self.to_push: deque[Batch] = deque()
        self.pending: dict[str, Batch] = {}
        self.bytes = 0
        self.begun = 0
        self._on_the_way: Counter[str] = Counter()
        self._trouble: Exception | None = None
        self._changed = anyio.Event()

    def begin(self, key: str) -> Batch:
        """Open a batch; the one before is sealed."""
        self.seal()
        self.begun += 1
        self.open = Batch(key, self.begun, anyio.current_time())
        self._notify()
        return self.open

    def append(self, batch: Batch, lines: Iterable[str], *, names: AbstractSet[str], size: int) -> None:
        """To a batch that is open. size: of the lines, each with its end."""
        batch.lines.extend(lines)
        batch.names |= names
        batch.bytes += size
        self.bytes += size

    def seal(self) -> None:
        """Hand the open batch over to be pushed, if there is one."""
        batch, self.open = self.open, None
        if batch is None:
            return
        self.pending[batch.key] = batch
        self._on_the_way.update(batch.names)
        self.push(batch)

    def push(self, batch: Batch) -> None:
        """It is to be pushed, behind those that are already."""
        batch.pushed = False
        self.to_push.append(batch)
        self._notify()

    def is_pending(self, batch: Batch) -> bool:
        return self.pending.get(batch.key) is batch

    def finish(self, batch: Batch) -> None:
        """It needs no memory any more."""
        del self.pending[batch.key]
        for name in batch.names:
            self._on_the_way[name] -= 1
            if not self._on_the_way[name]:
                del self._on_the_way[name]
        self.bytes -= batch.bytes
        self._notify()

    def fail(self, error: Exception) -> None:
        """Nothing goes on: who waits here, or calls later, is told. The first error stays."""
        self._trouble = self._trouble or error
        self._notify()

    def raise_trouble(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    async def wait_for_change(self) -> None:
        await self._changed.wait()

    async def seal_in_time(self, linger_s: float) -> None:
        """Seal what has been open for so long, until cancelled."""
        while True:
            batch = self.open
            if batch is None:
                await self.wait_for_change()
                continue
            await anyio.sleep(max(0.0, batch.since + linger_s - anyio.current_time()))
            if self.open is batch:
                self.seal()

    async def wait_for_room(self, names: AbstractSet[str], size: int, *, held_bytes: int) -> None:
        """Until there is memory for `size` bytes more, and none of the names is on its way.

        held_bytes: of what is kept, for how many nobody need wait: their receipts may come only after these bytes.
        """
        self.raise_trouble()
        while True:
            too_much = self.bytes > held_bytes and self.bytes + size > self._max_bytes
            if not too_much and self._on_the_way.keys().isdisjoint(names):
                return
            if too_much:
                self.seal()
            await self.wait_for_change()
            self.raise_trouble()

    async def wait_for_key(self, key: str) -> None:
        """Until no batch with this key is pending."""
        while key in self.pending:
            self.raise_trouble()
            await self.wait_for_change()

    async def wait_for_all(self) -> None:
        """Until what was added so far is finished."""
        self.seal()
        upto = self.begun
        while any(batch.order <= upto for batch in self.pending.values()):
            self.raise_trouble()
            await self.wait_for_change()
        self.raise_trouble()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


class SplitDocuments:
    """Which passage comes next of each document whose last passage was not added yet, and what waits for that one.

    held_bytes: of the batches with the document that was added last, when that goes on. With late chunking they have no
    receipts before its last passage is there, or another document.
    """

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._held: str | None = None
        self.held_bytes = 0

    def check(self, document: SourceDocument) -> None:
        """Raises InputRejected for a passage that does not follow the one before.

        A message that ends inside of a document has to end at a known place: what admission does not find up to the last
        passage's number is removed with the old version.
        """
        number = passage_number(document)
        if document.group is None or number in (0, self._next.get(document.group, 0)):
            return
        raise InputRejected(
            f"document {document.id!r} cannot be pushed: passages are added in their order, each but the last with"
            f" last=False; the next one is {document.group}#{self._next.get(document.group, 0)}"
        )

    def check_room(self, first: SourceDocument, size: int, *, max_bytes: int) -> None:
        """Raises InputRejected when a document goes on with it that cannot be kept in memory whole.

        size: of it and what is added with it.
        """
        if self._goes_on_with(first) and self.held_bytes + size > max_bytes:
            raise InputRejected(
                f"document {first.id!r} cannot be pushed: the passages of {first.group!r} up to this one take more than"
                f" max_pending_bytes, {max_bytes:,}, and may have to be kept until the last one is admitted: raise it"
            )

    def note(self, documents: Sequence[SourceDocument], batch: Batch, size: int) -> None:
        """They were added to a batch, with so many bytes. What stands in it before a first passage waits with that one."""
        goes_on = self._goes_on_with(documents[0])
        for document in documents:
            if document.group is None or document.last:
                self._next.pop(document_of(document), None)
            else:
                self._next[document.group] = passage_number(document) + 1
        last = documents[-1]
        begun, self._held = self._held, None if last.last else last.group
        if self._held is None:
            self.held_bytes = 0
        else:
            self.held_bytes = self.held_bytes + size if goes_on and self._held == begun else batch.bytes

    def _goes_on_with(self, document: SourceDocument) -> bool:
        return self._held is not None and document.group == self._held and passage_number(document) > 0


def document_of(document: SourceDocument) -> str:
    """The id of the document that it is, or is a passage of."""
    return document.id if document.group is None else document.group


def names_of(documents: Iterable[SourceDocument]) -> tuple[set[str], set[str]]:
    """All of their names, and those that must not be on their way: passages that continue a document do not wait for it."""
    names: set[str] = set()
    awaited: set[str] = set()
    for document in documents:
        names |= {document.id, document_of(document)}
        awaited.add(document.id)
        if passage_number(document) == 0:
            awaited.add(document_of(document))
    return names, awaited
