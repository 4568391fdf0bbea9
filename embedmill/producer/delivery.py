"""Batches into the inbox: one after the other, so that the stream has the order of adding, and again what Redis has lost."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from ..connection import Connection
from ..errors import TransientError
from ..failpoints import afailpoint
from ..inbox import INBOX_VERSION
from ..messages import Lane
from .batches import Batch, Batches

_log = logging.getLogger("embedmill.producer")
_FULL_WAIT_S = (0.05, 0.5)
TROUBLE_WAIT_S = (0.5, 2.0)
_KEYS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Destination:
    """An inbox, what may wait in it, and what is said of each batch. reply: where receipts go; empty, there are none."""

    prefix: str
    inbox: str
    job: str
    lane: Lane
    high_water: int
    high_water_bytes: int
    reply: str

    @property
    def wants_receipts(self) -> bool:
        return bool(self.reply)


class Delivery:
    """Pushes what is to be pushed. A batch without receipts is finished once Redis has it."""

    def __init__(self, connection: Connection, batches: Batches, destination: Destination) -> None:
        self._connection = connection
        self._batches = batches
        self._to = destination

    async def push_all(self) -> None:
        while True:
            if not self._batches.to_push:
                await self._batches.wait_for_change()
                continue
            batch = self._batches.to_push.popleft()
            if not self._batches.is_pending(batch):
                continue
            await self._push(batch)
            batch.pushed = True
            await afailpoint("producer.after_push")
            if not self._to.wants_receipts:
                self._batches.finish(batch)

    async def push_lost_again(self, every_s: float) -> None:
        """What neither has its receipt nor waits in the inbox."""
        while True:
            await anyio.sleep(every_s)
            waiting = [batch for batch in self._batches.pending.values() if batch.pushed]
            for start in range(0, len(waiting), _KEYS_AT_ONCE):
                await self._look_for(waiting[start : start + _KEYS_AT_ONCE])

    async def _push(self, batch: Batch) -> None:
        to = self._to
        fields = ["v", INBOX_VERSION, "key", batch.key, "job", to.job, "lane", to.lane]
        fields += ["reply", to.reply] if to.wants_receipts else []
        fields += ["documents", "\n".join(batch.lines)]
        arguments = [to.inbox, to.high_water, to.high_water_bytes, batch.key, batch.bytes, *fields]
        while True:
            try:
                state, *_ = await self._connection.script("embedmill/push", [to.prefix], arguments)
            except TransientError as error:
                _log.warning("pushing into %s: %s; trying on", to.inbox, error)
                await anyio.sleep(random.uniform(*TROUBLE_WAIT_S))
                continue
            if int(state) >= 0:
                return
            await anyio.sleep(random.uniform(*_FULL_WAIT_S))

    async def _look_for(self, batches: Sequence[Batch]) -> None:
        keys = [batch.key for batch in batches]
        try:
            reply = await self._connection.script("embedmill/missing", [self._to.prefix], [self._to.inbox, *keys])
        except TransientError as error:
            _log.warning("looking for batches in %s: %s; trying on", self._to.inbox, error)
            return
        missing = set(reply)
        for batch in sorted(batches, key=lambda batch: batch.order):
            if batch.key in missing and self._batches.is_pending(batch):
                self._batches.push(batch)
