"""`--max-tokens`: the most that a job may be billed in all, kept in its record, where every worker reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from scheduler.caps import cap_reached_words

from ..dataset.dataset import Dataset
from ..dataset.layout import Job
from ..dataset.spending import SpendLogs
from ..errors import CapReached


def with_cap(job: Job, max_tokens: int | None) -> Job:
    """The record with this cap. None leaves it as it is, 0 takes it away."""
    if max_tokens is None:
        return job
    lifted = {name: value for name, value in job.caps.items() if name not in ("max_tokens", "reached")}
    return replace(job, caps={**job.caps, "max_tokens": max_tokens} if max_tokens else lifted)


def at_cap(dataset: Dataset, job: Job) -> CapReached | None:
    """Why nothing can be sent for a job, if it has reached its cap: it was stopped there, or it was billed as much."""
    if not job.max_tokens:
        return None
    spent = spent_of(dataset, [job])[job.id]
    if not job.has_reached_cap and spent < job.max_tokens:
        return None
    return CapReached(cap_reached_words(job.id, limit=job.max_tokens, spent=spent), limit=job.max_tokens)


def spent_of(dataset: Dataset, jobs: Iterable[Job]) -> dict[str, int]:
    """By job, of those that have a cap, tokens that count against it: what it was billed, and estimates for requests whose
    answer was lost."""
    logs = SpendLogs(dataset)
    return {job.id: logs.charged(job.id, with_markers=True) for job in jobs if job.max_tokens}
