"""`--max-tokens`: the most that a job may be billed in all, kept in its record, where every worker reads it."""

from __future__ import annotations

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
    caps = {name: tokens for name, tokens in job.caps.items() if name != "max_tokens"}
    return replace(job, caps={**caps, "max_tokens": max_tokens} if max_tokens else {})


def at_cap(dataset: Dataset, job: Job) -> CapReached | None:
    """Why nothing can be sent for a job, if it has reached its cap: it was stopped there, or it was billed as much."""
    if not job.max_tokens:
        return None
    spent = spent_of(dataset, job.id)
    if not job.has_reached_cap and spent < job.max_tokens:
        return None
    return CapReached(cap_reached_words(job.id, limit=job.max_tokens, spent=spent), limit=job.max_tokens)


def spent_of(dataset: Dataset, job: str) -> int:
    """Tokens that count against the cap of a job: what it was billed, and estimates for requests whose answer was lost."""
    return SpendLogs(dataset).charged(job, with_markers=True)
