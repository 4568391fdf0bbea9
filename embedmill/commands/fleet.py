"""What a queue and its workers say of themselves: the backlog by job, who works, how fast, and what their keys may send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scheduler.key_budgets import KeyBudget, read_budgets
from scheduler.queue import InboxDepth, JobDepth, Queue, WorkerReport

from ..messages import job_key
from .progress import duration

_OLD_AFTER_SPANS = 2


@dataclass(frozen=True, slots=True)
class Fleet:
    """One look at a queue: its jobs, its workers, its inboxes, and the budgets of the API keys."""

    jobs: Sequence[JobDepth]
    workers: Sequence[WorkerReport]
    inboxes: Sequence[InboxDepth] = ()
    budgets: Sequence[KeyBudget] = ()

    @property
    def leased(self) -> int:
        return sum(job.leased for job in self.jobs)

    def backlog(self) -> dict[str, int | float]:
        """What there is to do now, for autoscaling: paused jobs do not count, leased tasks do."""
        going = [job for job in self.jobs if not job.paused]
        return {
            "tasks": sum(job.tasks for job in going),
            "passages": sum(job.rows for job in going),
            "tokens": sum(job.tokens for job in going),
            "oldest_s": round(max((job.oldest_s for job in going), default=0.0), 1),
            "leased": sum(job.leased for job in going),
            "workers": len(self.workers),
        }


@dataclass(frozen=True, slots=True)
class Rates:
    """What all workers do together, and one by one (by owner), for what is looked at: passages/s and tokens/s."""

    passages_s: float = 0.0
    tokens_s: float = 0.0
    by_owner: Mapping[str, tuple[float, float]] = field(default_factory=dict)


async def look_at(queue: Queue, *, dataset_id: str | None = None, job: str | None = None) -> Fleet:
    """The jobs of the queue, or those of one dataset, or one job; the workers and the keys are everybody's."""
    jobs = [
        depth for depth in await queue.jobs() if dataset_id in (None, depth.dataset_id) and job in (None, depth.job)
    ]
    inboxes = [inbox for inbox in await queue.inboxes() if dataset_id in (None, inbox.dataset_id)]
    budgets = await read_budgets(queue.connection, namespace=queue.namespace)
    return Fleet(jobs, await queue.workers(), inboxes, budgets)


def rates_of(fleet: Fleet, *, dataset_id: str | None = None, job: str | None = None) -> Rates:
    """The last minute of all work, of that for one dataset, or for one job of it, as the workers report it."""
    by_owner = {worker.owner: _recent_rate(worker, dataset_id, job) for worker in fleet.workers}
    return Rates(sum(p for p, _ in by_owner.values()), sum(t for _, t in by_owner.values()), by_owner)


def time_left(passages: int, rates: Rates) -> str:
    """In words; empty where nothing moves."""
    return duration(passages / rates.passages_s) if passages and rates.passages_s > 0 else ""


def fleet_lines(fleet: Fleet, rates: Rates) -> Iterator[str]:
    """The queue, its jobs and its workers, for people."""
    backlog = fleet.backlog()
    delayed = sum(job.delayed for job in fleet.jobs)
    ready = sum(job.ready for job in fleet.jobs)
    yield f"  queue       {ready:,} ready, {fleet.leased:,} leased, {delayed:,} delayed"
    if backlog["tasks"]:
        oldest = f", the oldest for {duration(backlog['oldest_s'])}" if backlog["oldest_s"] else ""
        yield f"  backlog     {backlog['passages']:,} passages, about {backlog['tokens']:,} tokens{oldest}"
    several = len({job.dataset_id for job in fleet.jobs}) > 1
    for job in fleet.jobs:
        words = f"{job.ready:,} ready, {job.leased:,} leased, {job.delayed:,} delayed, {job.rows:,} passages"
        place = f" of {job.dataset}" if several else ""
        yield f"  job         {job.job}{place} ({job.lane or 'bulk'}{', paused' if job.paused else ''}): {words}"
    for inbox in fleet.inboxes:
        served = f"admitted into {inbox.dataset}" if inbox.is_served else "no scheduler admits it"
        if inbox.messages or inbox.is_served:
            yield f"  inbox       {inbox.name}: {inbox.messages:,} messages wait, {served}"
    yield f"  workers     {len(fleet.workers):,}, {rate_words(rates)}"
    for worker in fleet.workers:
        yield f"              {worker_words(worker, rates)}"
    for budget in fleet.budgets:
        yield f"  key         {budget.key_id}: {budget_words(budget)}"


def rate_words(rates: Rates) -> str:
    return f"{rates.passages_s:,.1f} passages/s, {60 * rates.tokens_s:,.0f} tokens/min"


def worker_words(worker: WorkerReport, rates: Rates) -> str:
    passages_s, _ = rates.by_owner.get(worker.owner, (0.0, 0.0))
    trouble = f", {worker.record['last_trouble']}" if worker.record.get("last_trouble") else ""
    holds = int(worker.record.get("holds", 0))
    return f"{worker.owner}: {passages_s:,.1f} passages/s, holds {holds}, seen {worker.age_s:.0f} s ago{trouble}"


def budget_words(budget: KeyBudget) -> str:
    """For example: 1,870,000 of 2,000,000 tokens, 401 of 500 requests in the last minute; 12 of 50 at a time."""
    limits, minute = budget.limits, "minute" if budget.window_s == 60 else f"{budget.window_s:g} s"
    sent = f"{_of(budget.tokens, limits.tokens)} tokens, {_of(budget.requests, limits.requests)} requests"
    parts = [f"{sent} in the last {minute}", f"{_of(budget.permits, budget.most_permits)} at a time"]
    return "; ".join([*parts, *trouble_words(budget)])


def trouble_words(budget: KeyBudget) -> Iterator[str]:
    """What holds a key back beside its configured limits."""
    if budget.closed_s > 0:
        yield f"closed for {duration(max(1, budget.closed_s))}"
    if budget.factor < 0.995:
        yield f"at {budget.factor:.0%} of its pace after refusals"
    learned, configured = asdict(budget.learned), asdict(budget.configured)
    for name, words in (("tokens", "tokens"), ("requests", "requests"), ("concurrency", "at a time")):
        if learned[name] and learned[name] != configured[name]:
            than = f"{configured[name]:,} are configured" if configured[name] else "none is configured"
            yield f"the provider allows {learned[name]:,} {words}, {than}"


def fleet_record(fleet: Fleet, rates: Rates) -> dict[str, Any]:
    """The same for programs."""
    return {
        "backlog": fleet.backlog(),
        "rates": {
            "passages_per_s": round(rates.passages_s, 3),
            "tokens_per_min": round(60 * rates.tokens_s, 1),
        },
        "queue_jobs": [
            {
                "dataset": job.dataset, "job": job.job, "lane": job.lane, "paused": job.paused, "ready": job.ready,
                "leased": job.leased, "delayed": job.delayed, "passages": job.rows, "tokens": job.tokens,
                "oldest_s": round(job.oldest_s, 1),
            }
            for job in fleet.jobs
        ],
        "inboxes": [
            {"name": inbox.name, "messages": inbox.messages, "dataset": inbox.dataset or None, "served": inbox.is_served}
            for inbox in fleet.inboxes
        ],
        "budgets": [_budget_record(budget) for budget in fleet.budgets],
        "workers": [
            {"owner": worker.owner, "age_s": round(worker.age_s, 1), **worker.record} for worker in fleet.workers
        ],
    }  # fmt: skip


def _budget_record(budget: KeyBudget) -> dict[str, Any]:
    return {
        "key_id": budget.key_id,
        "configured": asdict(budget.configured),
        "learned": {name: limit or None for name, limit in asdict(budget.learned).items()},
        "window_s": budget.window_s,
        "last_window": {"requests": budget.requests, "tokens": budget.tokens},
        "ahead": {"requests": budget.later_requests, "tokens": budget.later_tokens},
        "permits": {"held": budget.permits, "live": budget.live_permits, "most": budget.most_permits or None},
        "closed_s": round(budget.closed_s, 1),
        "factor": round(budget.factor, 3),
        "live_asked_s_ago": None if budget.live_s is None else round(budget.live_s, 1),
        "idle_s": round(budget.idle_s, 1),
    }


def _of(used: int, limit: int) -> str:
    return f"{used:,} of {limit:,}" if limit else f"{used:,}"


def _recent_rate(worker: WorkerReport, dataset_id: str | None, job: str | None) -> tuple[float, float]:
    """(passages/s, tokens/s); none of a worker that has not reported for long."""
    seconds = float(worker.record.get("recent_s", 0.0))
    if seconds <= 0 or worker.age_s > _OLD_AFTER_SPANS * seconds:
        return 0.0, 0.0
    done = [counts for key, counts in worker.record.get("recent", {}).items() if _is_of(key, dataset_id, job)]
    return sum(passages for passages, _ in done) / seconds, sum(tokens for _, tokens in done) / seconds


def _is_of(key: str, dataset_id: str | None, job: str | None) -> bool:
    if dataset_id is None:
        return True
    return key.startswith(job_key(dataset_id, "")) if job is None else key == job_key(dataset_id, job)
