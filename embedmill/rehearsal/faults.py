"""Which fault befalls a request, by a seeded chance, and what the faults that refuse it answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import refusals
from .behaviour import FAULTS, Rehearsal
from .refusals import Refused

_BURST = 5
_RPM, _TPM, _CONCURRENCY = 500, 1_000_000, 50
# The work of these is done and billed, whatever arrives.
BILLED_REFUSALS = frozenset({"error_504"})


class Dice:
    """All chances of one simulator, in one sequence that the seed decides."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._random = random.Random(rehearsal.seed)
        self._chances = [(name, getattr(rehearsal, name)) for name in FAULTS if getattr(rehearsal, name)]
        self._burst_left = 0

    def fault(self) -> str | None:
        """At most one of `FAULTS`."""
        if self._burst_left:
            self._burst_left -= 1
            return "burst_429"
        draw = self._random.random()
        for name, chance in self._chances:
            draw -= chance
            if draw < 0:
                self._burst_left = _BURST - 1 if name == "burst_429" else 0
                return name
        return None

    def chance(self, name: str) -> bool:
        """Whether the fault of this name, which is drawn apart, happens."""
        chance = getattr(self._rehearsal, name)
        return bool(chance) and self._random.random() < chance

    def latency_s(self, tokens: int) -> float:
        limits = self._rehearsal
        mean = limits.latency_ms + limits.ms_per_1k_tokens * tokens / 1000
        return max(0.0, self._random.gauss(mean, limits.jitter_ms) if limits.jitter_ms else mean) / 1000

    def seed(self) -> int:
        return self._random.getrandbits(32)


def refusal_of(fault: str | None, rehearsal: Rehearsal, *, tokens: int) -> Refused | None:
    """What a fault answers, or None for those that do not refuse. A limit that is not set is named as a usual one."""
    rpm, tpm = rehearsal.rpm or _RPM, rehearsal.tpm or _TPM
    at_once = rehearsal.concurrency or _CONCURRENCY
    answers: dict[str | None, Callable[[], Refused]] = {
        "error_500": refusals.internal_error,
        "error_502": refusals.bad_gateway,
        "error_503": refusals.unavailable,
        "error_504": refusals.timed_out,
        "request_429": lambda: refusals.too_many_requests(rpm, rpm),
        "token_429": lambda: refusals.too_many_tokens(tpm + tokens, tpm),
        "burst_429": lambda: refusals.too_many_tokens(tpm + tokens, tpm),
        "concurrency_429": lambda: refusals.too_many_at_once(at_once, at_once),
        "ip_429": refusals.too_many_from_address,
        "html_200": refusals.login_page,
    }
    answer = answers.get(fault)
    return answer() if answer else None
