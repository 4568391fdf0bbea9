"""One API key: its limits, its balance and what was counted for it. Two keys are two accounts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .behaviour import Rehearsal
from .limits import SlidingLog, Use, open_window
from .refusals import no_balance, too_many_at_once, too_many_requests, too_many_tokens

_STRANGERS_PER_WINDOW = 600


def account_name(key: str) -> str:
    """What stands for a key in the counters, so that a real one given by mistake is never shown."""
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).hexdigest()


@dataclass(slots=True)
class Counters:
    """Of one key, since `since` (seconds on the simulator's clock).

    requests: all that came; admitted: those that passed the limits; peaks: the most that any window_s seconds held,
    whatever the window is, without the stranger; by_second: tokens admitted in each second.
    """

    since: float
    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    undeclared_fields: Counter[str] = field(default_factory=Counter)
    requests_admitted: int = 0
    tokens_admitted: int = 0
    tokens_billed: int = 0
    texts_embedded: int = 0
    max_concurrency: int = 0
    peak_window_requests: int = 0
    peak_window_tokens: int = 0
    other_client_tokens: int = 0
    by_second: Counter[int] = field(default_factory=Counter)


def merged(parts: Iterable[Counters], *, since: float) -> Counters:
    """Sums; of peaks the highest."""
    total = Counters(since)
    for part in parts:
        for name in Counters.__dataclass_fields__:
            mine, other = getattr(total, name), getattr(part, name)
            if isinstance(mine, Counter):
                mine.update(other)
            elif name.startswith(("max_", "peak_")):
                setattr(total, name, max(mine, other))
            elif name != "since":
                setattr(total, name, mine + other)
    return total


def as_report(counters: Counters, *, now: float, tokens_per_s: float) -> dict[str, object]:
    """For people and benchmarks. tokens_per_s: what the limit allows, 0 for none; then there is no `utilisation`."""
    seconds = max(now - counters.since, 1e-9)
    report: dict[str, object] = {
        "requests": counters.requests,
        "statuses": dict(counters.statuses),
        "ok": counters.statuses["200"],
        "refusals": dict(counters.refusals),
        "faults": dict(counters.faults),
        "undeclared_fields": dict(counters.undeclared_fields),
        "requests_admitted": counters.requests_admitted,
        "tokens_admitted": counters.tokens_admitted,
        "tokens_billed": counters.tokens_billed,
        "texts_embedded": counters.texts_embedded,
        "max_concurrency": counters.max_concurrency,
        "peak_window_requests": counters.peak_window_requests,
        "peak_window_tokens": counters.peak_window_tokens,
        "seconds": round(seconds, 3),
        "tokens_admitted_per_s": round(counters.tokens_admitted / seconds, 1),
    }
    if tokens_per_s:
        report["utilisation"] = round(counters.tokens_admitted / seconds / tokens_per_s, 4)
    if counters.other_client_tokens:
        report["other_client_tokens"] = counters.other_client_tokens
    return report


class Payments:
    """How often each text was paid for, by all keys together."""

    def __init__(self) -> None:
        self._times: dict[bytes, int] = {}
        self._texts_by_times: Counter[int] = Counter()
        self._tokens_again = 0

    def add(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        for text, cost in zip(texts, tokens, strict=True):
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            before = self._times.get(digest, 0)
            self._times[digest] = before + 1
            self._texts_by_times[before + 1] += 1
            if before:
                self._texts_by_times[before] -= 1
                self._tokens_again += cost

    def report(self) -> dict[str, object]:
        """max_per_text: the most payments for one text; tokens_billed_again: for texts that were paid for before."""
        by_times = {str(times): texts for times, texts in sorted(self._texts_by_times.items()) if texts}
        return {
            "distinct_texts": len(self._times),
            "texts_by_payments": by_times,
            "max_per_text": max(map(int, by_times), default=0),
            "tokens_billed_again": self._tokens_again,
        }


class Account:
    """Admission for one key, first seen at `now`. Counters are kept twice: since `began`, and since the last reset."""

    def __init__(self, rehearsal: Rehearsal, *, now: float, began: float, reset: float) -> None:
        self._rehearsal = rehearsal
        self._window = open_window(rehearsal)
        alone = isinstance(self._window, SlidingLog) and not rehearsal.other_client
        self._log = self._window if alone else SlidingLog(rehearsal.window_s)
        self.in_flight = 0
        self.lifetime = Counters(began)
        self.period = Counters(reset)
        self._other_next = now

    def reset(self, now: float) -> None:
        """A new period begins: only its counters, limits go on."""
        self.period = Counters(now)

    def count(self, name: str, key: str, amount: int = 1) -> None:
        for counters in (self.lifetime, self.period):
            getattr(counters, name)[key] += amount

    def add(self, name: str, amount: int = 1) -> None:
        for counters in (self.lifetime, self.period):
            setattr(counters, name, getattr(counters, name) + amount)

    def check_balance(self) -> None:
        """Raises Refused (403)."""
        if 0 < self._rehearsal.no_balance_after <= self.lifetime.tokens_billed:
            raise no_balance()

    def used(self, now: float) -> Use:
        """What counts against the limits at this moment, the stranger's included."""
        self._let_the_other_in(now)
        return self._window.used(now)

    def admit(self, tokens: int, *, now: float) -> None:
        """Takes a request in; `leave` ends it. Raises Refused (429)."""
        limits, used = self._rehearsal, self.used(now)
        refusal = None
        if 0 < limits.concurrency <= self.in_flight:
            refusal = too_many_at_once(self.in_flight, limits.concurrency)
        elif 0 < limits.rpm < used.requests + 1:
            refusal = too_many_requests(used.requests, limits.rpm)
        elif 0 < limits.tpm < used.tokens + tokens:
            refusal = too_many_tokens(used.tokens + tokens, limits.tpm)
        if refusal is not None:
            if limits.count_refused:
                self._take(now, tokens=0)
            raise refusal
        self._take(now, tokens=tokens)
        self.in_flight += 1
        self.add("requests_admitted")
        self.add("tokens_admitted", tokens)
        for counters in (self.lifetime, self.period):
            counters.max_concurrency = max(counters.max_concurrency, self.in_flight)
            counters.by_second[int(now - counters.since)] += tokens

    def leave(self) -> None:
        self.in_flight -= 1

    def _take(self, now: float, *, tokens: int) -> None:
        self._window.add(now, requests=1, tokens=tokens)
        if self._log is not self._window:
            self._log.add(now, requests=1, tokens=tokens)
        held = self._log.used(now)
        for counters in (self.lifetime, self.period):
            counters.peak_window_requests = max(counters.peak_window_requests, int(held.requests))
            counters.peak_window_tokens = max(counters.peak_window_tokens, int(held.tokens))

    def _let_the_other_in(self, now: float) -> None:
        """The stranger takes an even share at even distances and is never refused, so what is left is certain."""
        limits = self._rehearsal
        if not limits.other_client or not (limits.rpm or limits.tpm):
            return
        per_window = limits.other_client * (limits.rpm or _STRANGERS_PER_WINDOW)
        tokens = int(limits.other_client * limits.tpm / per_window)
        # What he took longer than a window ago counts no more.
        self._other_next = max(self._other_next, now - limits.window_s)
        while self._other_next <= now:
            self._window.add(self._other_next, requests=1, tokens=tokens)
            self.add("other_client_tokens", tokens)
            self._other_next += limits.window_s / per_window
