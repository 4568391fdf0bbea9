"""Receipts: what became of the batches of one producer, read from a stream of its own.

What was read is removed from the stream, so it is always read from its beginning, also when a server that lost its data
counts its entries anew.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import anyio

from ..connection import Connection
from ..errors import EmbedmillError, TransientError
from ..inbox import Receipt
from .batches import Batches
from .delivery import TROUBLE_WAIT_S

_log = logging.getLogger("embedmill.producer")
_POLL_S = 2.0
_READ_AT_ONCE = 1000
_FORGET_WITHIN_S = 1.0
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


class Receipts:
    """Finishes the batches that have a receipt. on_receipt: called with each; what it raises ends the producer."""

    def __init__(
        self,
        connection: Connection,
        batches: Batches,
        totals: ReceiptTotals,
        *,
        stream: str,
        on_receipt: Callable[[Receipt], None] | None,
    ) -> None:
        self._connection = connection
        self._batches = batches
        self._totals = totals
        self._stream = stream
        self._on_receipt = on_receipt
        self._seen = False

    async def read_all(self) -> None:
        while True:
            await self._connection.wait_for_entry(self._stream, "0", timeout_s=_POLL_S, most=1)
            try:
                await self._take()
            except TransientError as error:
                _log.warning("waiting for receipts in %s: %s; trying on", self._stream, error)
                await anyio.sleep(random.uniform(*TROUBLE_WAIT_S))

    async def forget(self) -> None:
        """Remove the stream, where receipts came; when that fails it goes by itself, a day after the last one."""
        if not self._seen:
            return
        with anyio.move_on_after(_FORGET_WITHIN_S, shield=True):
            try:
                await self._connection.command("DEL", self._stream)
            except EmbedmillError as error:
                _log.debug("%s stays: %s", self._stream, error)

    async def _take(self) -> None:
        entries = await self._connection.command("XRANGE", self._stream, "-", "+", "COUNT", _READ_AT_ONCE)
        if not entries:
            return
        self._seen = True
        for _, fields in entries:
            self._take_one(fields or {})
        await self._connection.command("XDEL", self._stream, *(str(entry_id) for entry_id, _ in entries))

    def _take_one(self, fields: Mapping[str, str]) -> None:
        try:
            receipt = Receipt.from_json(fields.get("receipt", ""))
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("an unreadable receipt in %s: %s", self._stream, error)
            return
        batch = self._batches.pending.get(receipt.key)
        if batch is None:
            return
        self._totals.add(receipt)
        self._batches.finish(batch)
        if self._on_receipt is not None:
            self._on_receipt(receipt)
