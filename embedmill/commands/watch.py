"""`embedmill status --watch`: the same, again and again: a live view on a terminal, a line per look elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import anyio
from anyio import to_thread
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scheduler.queue import Queue

from ..dataset.dataset import Dataset
from ..dataset.summary import DatasetSummary, summarize
from ..errors import TransientError
from .fleet import Fleet, Rates, look_at, rate_words, rates_of, time_left, trouble_words
from .progress import duration
from .services import until_signal

_SUMMARY_EVERY_S = 5.0
_SHOWN_WORKERS = 12


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found. summary: None without a dataset; fleet: None without a queue; trouble: why a part is old."""

    title: str
    summary: DatasetSummary | None
    fleet: Fleet | None
    rates: Rates
    trouble: str = ""

    @property
    def owed(self) -> int:
        if self.summary is not None:
            return self.summary.owed
        return int(self.fleet.backlog()["passages"]) if self.fleet else 0


async def watch(dataset: Dataset | None, queue: Queue | None, *, job: str | None, every_s: float) -> None:
    """Show what there is to see, on stdout, until SIGINT or SIGTERM."""
    stopping = anyio.Event()
    with _display() as show:
        async with until_signal(stopping.set):
            watcher = _Watcher(dataset, queue, job=job)
            while not stopping.is_set():
                show(await watcher.look())
                with anyio.move_on_after(every_s):
                    await stopping.wait()


class _Watcher:
    """Looks at the queue each time, and at the dataset every few seconds: counting it reads more."""

    def __init__(self, dataset: Dataset | None, queue: Queue | None, *, job: str | None) -> None:
        self._dataset = dataset
        self._queue = queue
        self._job = job
        self._summary: DatasetSummary | None = None
        self._summary_at_s = float("-inf")
        self._fleet: Fleet | None = None
        self._rates = Rates()

    async def look(self) -> Look:
        if self._dataset is not None and time.monotonic() - self._summary_at_s >= _SUMMARY_EVERY_S:
            self._summary = await to_thread.run_sync(partial(summarize, self._dataset, job=self._job))
            self._summary_at_s = time.monotonic()
        trouble = ""
        if self._queue is not None:
            try:
                dataset_id = self._dataset.info.id if self._dataset else None
                self._fleet = await look_at(self._queue, dataset_id=dataset_id, job=self._job)
                self._rates = rates_of(self._fleet, dataset_id=dataset_id, job=self._job)
            except TransientError as error:
                trouble = str(error)
        title = place_words(self._dataset, self._job) if self._dataset else "queue"
        return Look(title, self._summary, self._fleet, self._rates, trouble)


def place_words(dataset: Dataset, job: str | None) -> str:
    """What is looked at: a dataset, or one job of it."""
    return f"{dataset.url}, job {job}" if job else dataset.url


def plain_line(look: Look) -> str:
    """For example: ./wiki: 1,200 of 3,000 passages, 0 failed; 2 ready, 1 leased, 0 delayed; 3 workers, 45.0 passages/s."""
    parts = []
    if look.summary is not None:
        s = look.summary
        parts.append(f"{s.admitted - s.owed:,} of {s.admitted:,} passages, {s.failed_words}")
    if look.fleet is not None:
        jobs = look.fleet.jobs
        ready, delayed = sum(job.ready for job in jobs), sum(job.delayed for job in jobs)
        parts.append(f"{ready:,} ready, {look.fleet.leased:,} leased, {delayed:,} delayed")
        parts.append(f"{len(look.fleet.workers):,} workers, {rate_words(look.rates)}")
        for budget in look.fleet.budgets:
            parts += [f"key {budget.key_id} {words}" for words in trouble_words(budget)]
    left = time_left(look.owed, look.rates)
    if left:
        parts.append(f"{left} left")
    if look.trouble:
        parts.append(look.trouble)
    return f"{look.title}: {'; '.join(parts)}"


def live_view(look: Look) -> RenderableType:
    """The whole view: how far the dataset is, the jobs of the queue, the workers."""
    parts: list[RenderableType] = [Text(look.title, style="bold")]
    if look.summary is not None:
        parts.append(_progress(look.summary, time_left(look.owed, look.rates)))
    if look.fleet is not None:
        backlog = look.fleet.backlog()
        words = f"{backlog['passages']:,} passages, about {backlog['tokens']:,} tokens to do; {rate_words(look.rates)}"
        parts += [Text(), Text(words), Text(), _jobs(look.fleet), Text(), _workers(look.fleet, look.rates)]
        if look.fleet.budgets:
            parts += [Text(), _keys(look.fleet)]
    if look.trouble:
        parts.append(Text(look.trouble, style="yellow"))
    return Group(*parts)


def _progress(summary: DatasetSummary, left: str) -> Table:
    done = summary.admitted - summary.owed
    percent = 100 * done / summary.admitted if summary.admitted else 100
    words = [f"{done:,} of {summary.admitted:,} passages ({percent:.0f} %)", summary.failed_words]
    if summary.cancelled:
        words.append(f"{summary.cancelled:,} cancelled")
    if left:
        words.append(f"{left} left")
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=max(1, summary.admitted), completed=done, width=28), ", ".join(words))
    return grid


def _jobs(fleet: Fleet) -> Table:
    table = _table("job", "lane", "ready", "leased", "delayed", "passages", "tokens", "oldest", "")
    for job in fleet.jobs:
        oldest = duration(job.oldest_s) if job.ready else ""
        counts = (f"{n:,}" for n in (job.ready, job.leased, job.delayed, job.rows, job.tokens))
        row = (job.job, job.lane, *counts, oldest, "paused" if job.paused else "")
        table.add_row(*map(Text, row))
    if not fleet.jobs:
        table.add_row(Text("none", style="dim"))
    return table


def _workers(fleet: Fleet, rates: Rates) -> Table:
    table = _table("worker", "holds", "passages/s", "tokens/min", "seen", "")
    for worker in fleet.workers[:_SHOWN_WORKERS]:
        passages_s, tokens_s = rates.by_owner.get(worker.owner, (0.0, 0.0))
        holds, trouble = worker.record.get("holds", 0), str(worker.record.get("last_trouble", ""))
        numbers = (f"{holds}", f"{passages_s:,.1f}", f"{60 * tokens_s:,.0f}", f"{worker.age_s:.0f} s ago")
        table.add_row(*map(Text, (worker.owner, *numbers, trouble)))
    if not fleet.workers:
        table.add_row(Text("none", style="dim"))
    elif len(fleet.workers) > _SHOWN_WORKERS:
        table.add_row(Text(f"and {len(fleet.workers) - _SHOWN_WORKERS:,} more", style="dim"))
    return table


def _keys(fleet: Fleet) -> Table:
    table = _table("key", "tokens", "of", "requests", "of", "at a time", "of", "")
    for budget in fleet.budgets:
        limits = budget.limits
        counts = (budget.tokens, limits.tokens, budget.requests, limits.requests, budget.permits, budget.most_permits)
        numbers = (f"{count:,}" if count or not place % 2 else "-" for place, count in enumerate(counts))
        table.add_row(*map(Text, (budget.key_id, *numbers, "; ".join(trouble_words(budget)))))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        right = number > 0 and name not in ("lane", "")
        table.add_column(name, justify="right" if right else "left", overflow="ellipsis", no_wrap=True)
    return table


@contextmanager
def _display() -> Iterator[Callable[[Look], None]]:
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        yield lambda look: print(plain_line(look), flush=True)  # noqa: T201
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        yield lambda look: live.update(live_view(look), refresh=True)
