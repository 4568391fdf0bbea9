"""What "per minute" can mean: three windows, each with O(1) amortised work per request. No clock: time is an argument.

- sliding: what was admitted in the last `window_s` seconds counts. The strictest reading, and the default.
- fixed: a window opens with the first request after the last one closed, and its counts vanish as a whole when it ends;
  so two quotas fit closely around an end.
- bucket: permits flow back continuously, quota / `window_s` each second, up to one window's quota at rest; so a burst of a
  whole quota and another one spread over the window fit into the first window.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from .behaviour import Rehearsal


class Use(NamedTuple):
    """Requests and tokens that count at a moment."""

    requests: float
    tokens: float


class Window(Protocol):
    """Counts what was admitted. `now` in seconds, never smaller than before."""

    def used(self, now: float) -> Use: ...

    def add(self, now: float, *, requests: int, tokens: int) -> None: ...


class SlidingLog:
    """Everything admitted in the last window_s seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._log: deque[tuple[float, int, int]] = deque()
        self._requests = self._tokens = 0

    def used(self, now: float) -> Use:
        expired = now - self._window_s
        while self._log and self._log[0][0] <= expired:
            _, requests, tokens = self._log.popleft()
            self._requests -= requests
            self._tokens -= tokens
        return Use(self._requests, self._tokens)

    def add(self, now: float, *, requests: int, tokens: int) -> None:
        self._log.append((now, requests, tokens))
        self._requests += requests
        self._tokens += tokens


class FixedWindow:
    """Everything admitted since the window opened; the first request after its end opens the next."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._closes = float("-inf")
        self._requests = self._tokens = 0

    def used(self, now: float) -> Use:
        return Use(self._requests, self._tokens) if now < self._closes else Use(0, 0)

    def add(self, now: float, *, requests: int, tokens: int) -> None:
        if now >= self._closes:
            self._closes = now + self._window_s
            self._requests = self._tokens = 0
        self._requests += requests
        self._tokens += tokens


class TokenBucket:
    """What is missing from a bucket that holds one quota and is refilled evenly. A quota of 0 is no limit."""

    def __init__(self, window_s: float, *, rpm: int, tpm: int) -> None:
        self._requests_per_s, self._tokens_per_s = rpm / window_s, tpm / window_s
        self._missing = Use(0.0, 0.0)
        self._at = 0.0

    def used(self, now: float) -> Use:
        elapsed, self._at = now - self._at, now
        self._missing = Use(
            max(0.0, self._missing.requests - elapsed * self._requests_per_s),
            max(0.0, self._missing.tokens - elapsed * self._tokens_per_s),
        )
        return self._missing

    def add(self, now: float, *, requests: int, tokens: int) -> None:
        missing = self.used(now)
        self._missing = Use(missing.requests + requests, missing.tokens + tokens)


def open_window(rehearsal: Rehearsal) -> Window:
    if rehearsal.window == "fixed":
        return FixedWindow(rehearsal.window_s)
    if rehearsal.window == "bucket":
        return TokenBucket(rehearsal.window_s, rpm=rehearsal.rpm, tpm=rehearsal.tpm)
    return SlidingLog(rehearsal.window_s)
