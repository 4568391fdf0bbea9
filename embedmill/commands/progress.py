"""How a run shows itself: a live bar on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LIVE_EVERY_S = 0.25
_PLAIN_EVERY_S = 5.0
_BAR_CELLS = 28


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a run stands. Passages: of the dataset, earlier runs included. total: None while the sources are being read
    and cannot be estimated; fresh: embedded in this run; loaded: rows in Milvus, None without it."""

    done: int
    total: int | None
    estimated: bool
    fresh: int
    failed: int
    tokens: int
    loaded: int | None
    trouble: str


class Pace:
    """Passages and tokens per second over the last half minute. Time enters as an argument."""

    def __init__(self, *, span_s: float = 30.0) -> None:
        self._span_s = span_s
        self._points: list[tuple[float, int, int]] = []

    def note(self, now_s: float, *, passages: int, tokens: int) -> None:
        self._points.append((now_s, passages, tokens))
        while len(self._points) > 2 and now_s - self._points[1][0] > self._span_s:
            self._points.pop(0)

    @property
    def rates(self) -> tuple[float, float]:
        """(passages/s, tokens/s)."""
        if len(self._points) < 2:
            return 0.0, 0.0
        (t0, p0, k0), (t1, p1, k1) = self._points[0], self._points[-1]
        seconds = max(t1 - t0, 1e-9)
        return (p1 - p0) / seconds, (k1 - k0) / seconds


async def show(read: Callable[[], Snapshot], *, quiet: bool = False) -> None:
    """Show what `read` says until cancelled."""
    pace = Pace()
    console = Console(file=sys.stderr)
    if quiet:
        await anyio.sleep_forever()
    elif console.is_terminal:
        with _live(console) as update:
            while True:
                update(_table(_noted(read(), pace), pace))
                await anyio.sleep(_LIVE_EVERY_S)
    else:
        _noted(read(), pace)
        while True:
            await anyio.sleep(_PLAIN_EVERY_S)
            print(plain_line(_noted(read(), pace), pace), file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def telling(*loggers: str) -> Iterator[None]:
    """Show what these loggers warn of, each as a line on stderr, unless -v shows it already."""
    teller = _Teller(logging.WARNING)
    quiet = [logger for logger in map(logging.getLogger, loggers) if not logger.isEnabledFor(logging.WARNING)]
    for logger in quiet:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(teller)
    try:
        yield
    finally:
        for logger in quiet:
            logger.removeHandler(teller)
            logger.propagate = True
            logger.setLevel(logging.NOTSET)


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"embedmill: {record.getMessage()}", err=True)


def plain_line(snapshot: Snapshot, pace: Pace) -> str:
    """For example: 1,200 of 3,000 passages (40 %), 45 passages/s, 6,100 tokens/s, 40 s left."""
    passages_s, tokens_s = pace.rates
    parts = [_progress_words(snapshot), f"{passages_s:,.0f} passages/s", f"{tokens_s:,.0f} tokens/s"]
    left = _left(snapshot, passages_s)
    if left:
        parts.append(f"{left} left")
    if snapshot.loaded is not None:
        parts.append(f"{snapshot.loaded:,} in Milvus")
    if snapshot.failed:
        parts.append(f"{snapshot.failed:,} failed")
    if snapshot.trouble:
        parts.append(snapshot.trouble)
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


def _noted(snapshot: Snapshot, pace: Pace) -> Snapshot:
    pace.note(time.monotonic(), passages=snapshot.fresh, tokens=snapshot.tokens)
    return snapshot


def _progress_words(snapshot: Snapshot) -> str:
    if snapshot.total is None:
        return f"{snapshot.done:,} passages"
    about = "about " if snapshot.estimated else ""
    percent = 100 * snapshot.done / snapshot.total if snapshot.total else 100
    return f"{snapshot.done:,} of {about}{snapshot.total:,} passages ({percent:.0f} %)"


def _left(snapshot: Snapshot, passages_s: float) -> str:
    if snapshot.total is None or passages_s <= 0 or snapshot.total <= snapshot.done:
        return ""
    return duration((snapshot.total - snapshot.done) / passages_s)


def _table(snapshot: Snapshot, pace: Pace) -> Table:
    table = Table.grid(padding=(0, 1))
    share = snapshot.done / snapshot.total if snapshot.total else 0.0
    filled = min(_BAR_CELLS, int(share * _BAR_CELLS))
    bar = Text("━" * filled, style="green") + Text("━" * (_BAR_CELLS - filled), style="bright_black")
    table.add_row(bar, plain_line(snapshot, pace))
    return table


@contextmanager
def _live(console: Console) -> Iterator[Callable[[Table], None]]:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda table: live.update(table, refresh=True)


def size_words(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
