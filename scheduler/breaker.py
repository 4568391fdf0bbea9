"""Whether a provider may be asked at all: it fails for long, and the whole fleet leaves it alone together.

Open, nothing is sent for 5 seconds, then one request of the fleet is the probe; each that fails doubles the time, up to a
minute, and one that goes well closes the breaker. Redis decides, by its own clock. While all is well nothing is asked
but once in five seconds, and nothing is told: failures are, with how many requests went well before them, and the
first one that goes well after them.
"""

from __future__ import annotations

import hashlib
import logging
import random
import uuid
from typing import Literal

import anyio

from embedmill.connection import Connection, key_prefix
from embedmill.errors import Overloaded

log = logging.getLogger("embedmill.breaker")

Health = Literal["good", "failed", "unclear"]
"""What the end of a request says of its provider; unclear: a refusal for rate or of the key, or nothing at all."""

FIRST_S, LONGEST_S = 5.0, 60.0
_PROBE_S = 20.0
_LOOK_EVERY_S = 5.0
_NOTE_WITHIN_S = 5.0
_CLOSED, _PROBE = 0, 2
_MOST_UNTOLD = 20


class Breaker:
    """The breaker of one key at one address, shared by everybody with the same `namespace`.

    first_s, longest_s: for how long nothing is sent; probe_s: after which the probe of a process that died is another's,
    unless `keep` is called more often.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str,
        key_id: str,
        api_base: str,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        probe_s: float = _PROBE_S,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        self._connection = connection
        self._shown = f"{api_base} with key {key_id}"
        place = hashlib.blake2b(api_base.encode(), digest_size=4, person=b"embedmill").hexdigest()
        self._keys = [f"{key_prefix(namespace)}:breaker:{key_id}:{place}"]
        self._first_ms, self._longest_ms, self._probe_ms = (int(s * 1000) for s in (first_s, longest_s, probe_s))
        self._look_every_s = look_every_s
        self._teller = uuid.uuid4().hex
        self._looked_at = self._told_at = float("-inf")
        self._untold = 0
        self._troubled = False
        self._probe = ""
        self._last_failure = ""
        self._turn = anyio.Lock()
        self._changed = anyio.Event()
        self.is_open = False

    @property
    def trouble(self) -> str:
        """For people; empty while all is well."""
        if not self.is_open:
            return ""
        cause = f": {self._last_failure}" if self._last_failure else ""
        return f"{self._shown} fails again and again, and nothing is sent until a probe goes well{cause}"

    async def admit(self) -> str:
        """Wait while nothing is to be sent; what the request is to be told with: its op as the probe, else "".

        Raises Overloaded without Redis.
        """
        if self._known_closed():
            return ""
        # Only one task of this process asks at a time, the others wait for what it learns.
        async with self._turn:
            while True:
                if self._known_closed():
                    return ""
                op = uuid.uuid4().hex
                self._changed = anyio.Event()
                said, number = await self._connection.script(
                    "scheduler/breaker_pass", self._keys, [op, self._probe_ms, self._longest_ms]
                )
                self._looked_at = anyio.current_time()
                if said == _CLOSED:
                    self._troubled = self._troubled or bool(number)
                    self._become(is_open=False)
                    return ""
                self._become(is_open=True)
                if said == _PROBE:
                    self._probe = op
                    return op
                # The jitter keeps the workers of a fleet from asking in step.
                with anyio.move_on_after(number / 1000 + random.uniform(0, 0.1)):
                    await self._changed.wait()

    async def note(self, op: str, health: Health, *, said: str = "") -> None:
        """How a request ended that was admitted as `op`. Never raises: what Redis is not told it learns from the next."""
        if not op and health == "unclear":
            return
        now = anyio.current_time()
        if not op and health == "good" and not self._troubled and not self._due_to_tell(now):
            self._untold = min(_MOST_UNTOLD, self._untold + 1)
            return
        self._last_failure = said or self._last_failure
        untold, self._untold, self._told_at = self._untold, 0, now
        arguments = [op, health, untold, self._first_ms, self._longest_ms, self._teller]
        self._troubled = health == "failed"
        if op == self._probe:
            self._probe = ""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_NOTE_WITHIN_S):
            try:
                is_open, _ = await self._connection.script("scheduler/breaker_note", self._keys, arguments)
            except Overloaded:
                log.warning("could not tell the fleet how a request to %s ended", self._shown)
            else:
                self._looked_at = anyio.current_time()
                self._become(is_open=bool(is_open))

    async def keep(self) -> None:
        """The probe of this process is still under way."""
        if self._probe:
            arguments = [self._probe, self._probe_ms, self._longest_ms]
            try:
                await self._connection.script("scheduler/breaker_pass", self._keys, arguments)
            except Overloaded as error:
                log.warning("a probe was not kept: %s", error)

    def _due_to_tell(self, now: float) -> bool:
        """Whether to tell again that requests go well. Who sends a single one, to try the key, has no say."""
        return now - self._told_at >= self._look_every_s and (self._untold > 0 or self._told_at > float("-inf"))

    def _known_closed(self) -> bool:
        return not self.is_open and anyio.current_time() - self._looked_at < self._look_every_s

    def _become(self, *, is_open: bool) -> None:
        if is_open == self.is_open:
            return
        self.is_open = is_open
        self._changed.set()
        if is_open:
            log.warning("%s", self.trouble)
        else:
            self._untold, self._told_at = 0, float("-inf")
            log.warning("%s answers again", self._shown)
