"""The only fake part of a trial: the null embedder, made slow enough to be killed at work, and mortal.

It notes every request before it is sent and after it is answered, in a file that outlives the process. What a provider
would bill is what was sent: requests that were in flight at a kill count as work done.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import anyio

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import InputRejected
from worker.embedders.null import NullEmbedder

from .workload import POISON

CONCURRENCY = 2


class MortalEmbedder:
    """Vectors of the null embedder after `delay_s` a request. The poison kills the process, or is refused when `calm`."""

    def __init__(self, *, dimensions: int, inputs: int, delay_s: float, log: Path, calm: bool) -> None:
        self._null = NullEmbedder(dimensions)
        self._inputs = inputs
        self._delay_s = delay_s
        self._calm = calm
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    @property
    def spec(self) -> EmbedderSpec:
        return self._null.spec

    @property
    def limits(self) -> BatchLimits:
        return replace(self._null.limits, max_inputs=self._inputs, concurrency=CONCURRENCY)

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._null.estimate_tokens(texts)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        poisoned = POISON in texts
        self._note("sent", texts, poisoned=poisoned)
        if poisoned and self._calm:
            raise InputRejected("the poison")
        if poisoned:
            os.kill(os.getpid(), signal.SIGKILL)
        await anyio.sleep(self._delay_s)
        embedding = await self._null.embed(texts, role=role)
        self._note("answered", texts, poisoned=False)
        return embedding

    async def aclose(self) -> None:
        os.close(self._log)

    def _note(self, what: str, texts: Sequence[str], *, poisoned: bool) -> None:
        record = {"what": what, "pid": os.getpid(), "poisoned": poisoned, "texts": [digest(text) for text in texts]}
        os.write(self._log, (json.dumps(record) + "\n").encode())


def digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(slots=True)
class Requests:
    """How often each text was sent and answered, read from the log as it grows."""

    log: Path
    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    poisoned: list[list[str]] = field(default_factory=list)
    processes: set[int] = field(default_factory=set)
    _position: int = 0

    def read(self) -> None:
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self._position)
            # The last line may be half written.
            whole, _, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            record = json.loads(line)
            getattr(self, record["what"]).update(record["texts"])
            self.processes.add(record["pid"])
            if record["poisoned"]:
                self.poisoned.append(record["texts"])

    @property
    def sent_again(self) -> int:
        """Passages sent beyond the first time each."""
        return self.sent.total() - len(self.sent)

    @property
    def answered_again(self) -> int:
        return self.answered.total() - len(self.answered)
