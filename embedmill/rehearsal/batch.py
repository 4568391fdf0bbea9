"""The batch endpoint: jobs that take their time, fail in lines or as a whole, and expire.

A job's state follows from the clock whenever somebody looks, so there is no task behind it. A line is billed when it is
processed. Not in the description, and so a guess: the lines of the output and error files (the shape of OpenAI's batch
files, whose input format the description follows), what cancelling a finished job answers (the job as it is), and that a
cancelled job has no output. The description has `input_url` and `webhook_url`, too; a rehearsal fetches and calls nobody.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from .accounts import Account
from .answers import embeddings, usage
from .behaviour import Rehearsal
from .contract import CONTRACTS, EmbeddingRequest, check_choice, check_dimensions, check_flag, parse_body
from .faults import Dice
from .refusals import input_too_long, invalid, not_found
from .vectors import count_tokens

MODELS = ("jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small")
TASKS = ("retrieval", "text-matching", "clustering", "classification")
MAX_INLINE_LINES = 10_000
_PENDING_SHARE = 0.1
_OPEN = frozenset({"pending", "processing"})
Bill = Callable[[Account, Sequence[str], Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class _Line:
    """An input line, and the error that it will end with."""

    custom_id: str
    text: str
    tokens: int
    error: dict[str, str] | None


@dataclass(slots=True)
class _Job:
    """fate: its last state unless it is cancelled; done: lines processed so far; seconds on the simulator's clock."""

    batch_id: str
    model: str
    dimensions: int
    normalized: bool
    lines: list[_Line]
    fate: str
    began: float
    created: datetime
    account: Account
    status: str = "pending"
    done: int = 0
    ended: float | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"completed": 0, "failed": 0, "total_tokens": 0})


class BatchDesk:
    """All jobs of a simulator, of every key. `now`: seconds on the simulator's clock."""

    def __init__(self, rehearsal: Rehearsal, dice: Dice, bill: Bill) -> None:
        self._rehearsal = rehearsal
        self._dice = dice
        self._bill = bill
        self._jobs: dict[str, _Job] = {}

    def submit(self, raw: bytes, account: Account, *, now: float) -> str:
        """The id of the job. Raises Refused (422)."""
        body = parse_body(raw)
        _check(body)
        drawn = (fate for fate in ("failed", "expired") if self._dice.chance(f"batch_{fate}"))
        model = body["model"]
        job = _Job(
            batch_id=f"batch_{uuid.uuid4().hex[:24]}",
            model=model,
            dimensions=int(body.get("dimensions") or CONTRACTS[model].native_dimensions),
            normalized=body.get("normalized") is not False,
            lines=[self._line(line, model) for line in body["input"]],
            fate=next(drawn, "completed"),
            began=now,
            created=datetime.now(UTC),
            account=account,
        )
        self._jobs[job.batch_id] = job
        return job.batch_id

    def settle(self, now: float) -> None:
        """Bring every job to this moment, so that counters are true."""
        for job in self._jobs.values():
            self._advance(job, now)

    def states(self) -> dict[str, int]:
        """How many jobs are in which state."""
        return dict(Counter(job.status for job in self._jobs.values()))

    def status(self, batch_id: str, account: Account, *, now: float, origin: str) -> dict[str, object]:
        """A BatchStatus. Raises Refused (404) for a job of another key, too."""
        return self._shown(self._find(batch_id, account, now=now), origin=origin)

    def recent(self, account: Account, *, limit: int, now: float, origin: str) -> list[dict[str, object]]:
        """The key's jobs, the newest first."""
        self.settle(now)
        mine = [job for job in reversed(self._jobs.values()) if job.account is account]
        return [self._shown(job, origin=origin) for job in mine[:limit]]

    def cancel(self, batch_id: str, account: Account, *, now: float, origin: str) -> dict[str, object]:
        """What was processed before stays billed. A job that has ended stays as it is."""
        job = self._find(batch_id, account, now=now)
        if job.status in _OPEN:
            job.status, job.ended = "cancelled", now
        return self._shown(job, origin=origin)

    def output(self, batch_id: str, account: Account, *, now: float) -> Iterator[bytes]:
        """JSON lines of what was embedded. Raises Refused (404) where there is no output."""
        job = self._finished(batch_id, account, now=now)
        return (self._output_line(job, line) for line in job.lines if line.error is None)

    def errors(self, batch_id: str, account: Account, *, now: float) -> Iterator[bytes]:
        """JSON lines of what failed. Raises Refused (404) where there is no output."""
        job = self._finished(batch_id, account, now=now)
        return (
            _json_line({"custom_id": line.custom_id, "response": None, "error": line.error})
            for line in job.lines
            if line.error is not None
        )

    def _find(self, batch_id: str, account: Account, *, now: float) -> _Job:
        job = self._jobs.get(batch_id)
        if job is None or job.account is not account:
            raise not_found("batch", batch_id)
        self._advance(job, now)
        return job

    def _finished(self, batch_id: str, account: Account, *, now: float) -> _Job:
        job = self._find(batch_id, account, now=now)
        if job.status != "completed":
            raise not_found("batch output", batch_id)
        return job

    def _line(self, line: dict[str, Any], model: str) -> _Line:
        body = line.get("body")
        text = body.get("input") if isinstance(body, dict) else None
        custom_id = line.get("custom_id")
        if not isinstance(custom_id, str) or not isinstance(text, str):
            return _Line(
                str(custom_id), "", 0, {"code": "422", "message": "custom_id and body.input should be strings"}
            )
        tokens, limit = count_tokens([text])[0], CONTRACTS[model].max_tokens
        if tokens > limit:
            refused = input_too_long(limit)
            return _Line(custom_id, text, 0, {"code": refused.kind, "message": str(refused)})
        marker = self._rehearsal.reject_marker
        if marker and marker in text:
            return _Line(custom_id, text, 0, {"code": "422", "message": "Input cannot be processed"})
        if self._dice.chance("batch_line_error"):
            return _Line(custom_id, text, 0, {"code": "INTERNAL_ERROR", "message": "An unexpected error occurred."})
        return _Line(custom_id, text, tokens, None)

    def _advance(self, job: _Job, now: float) -> None:
        if job.status == "completed" and now - job.began >= self._rehearsal.batch_keep_s:
            job.status, job.lines = "expired", []
        if job.status not in _OPEN:
            return
        share = (now - job.began) / self._rehearsal.batch_s if self._rehearsal.batch_s else 1.0
        if share >= _PENDING_SHARE:
            job.status = "processing"
            # A job that ends badly does so halfway.
            last = len(job.lines) if job.fate == "completed" else len(job.lines) // 2
            self._process(job, min(last, int(len(job.lines) * share)))
        if share >= 1:
            job.status, job.ended = job.fate, job.began + self._rehearsal.batch_s

    def _process(self, job: _Job, upto: int) -> None:
        fresh = job.lines[job.done : upto]
        good = [line for line in fresh if line.error is None]
        job.done = max(job.done, upto)
        job.counts["completed"] += len(good)
        job.counts["failed"] += len(fresh) - len(good)
        job.counts["total_tokens"] += sum(line.tokens for line in good)
        self._bill(job.account, [line.text for line in good], [line.tokens for line in good])

    def _shown(self, job: _Job, *, origin: str) -> dict[str, object]:
        there = job.status == "completed"
        place = f"{origin}/v1/batch/{job.batch_id}"
        ended = job.created + timedelta(seconds=job.ended - job.began) if job.ended is not None else None
        failed = "The batch failed: an unexpected error occurred." if job.status == "failed" else None
        return {
            "batch_id": job.batch_id,
            "status": job.status,
            "model": job.model,
            "created_at": _iso(job.created),
            "completed_at": _iso(ended) if ended and there else None,
            "expires_at": _iso(job.created + timedelta(seconds=self._rehearsal.batch_keep_s)),
            "output_url": f"{place}/output" if there else None,
            "error_file_url": f"{place}/errors" if there and job.counts["failed"] else None,
            "stats": {
                "total": len(job.lines) or sum(map(job.counts.__getitem__, ("completed", "failed"))),
                **job.counts,
            },
            "error": failed,
        }

    def _output_line(self, job: _Job, line: _Line) -> bytes:
        request = EmbeddingRequest(
            model=job.model,
            texts=[line.text],
            tokens=[line.tokens],
            dimensions=job.dimensions,
            encodings=("float",),
            normalized=job.normalized,
            undeclared=(),
        )
        data = [{"object": "embedding", "index": 0, "embedding": embeddings(request)[0]}]
        body = {"model": job.model, "object": "list", "usage": usage(request), "data": data}
        answered = {"status_code": 200, "request_id": uuid.uuid4().hex[:16], "body": body}
        return _json_line({"custom_id": line.custom_id, "response": answered, "error": None})


def _check(body: dict[str, Any]) -> None:
    model, lines = body.get("model"), body.get("input")
    if model not in MODELS:
        raise invalid("model", f"Input should be {' or '.join(map(repr, MODELS))}", "literal_error", model)
    check_choice(body.get("task"), TASKS, "task")
    check_dimensions(body.get("dimensions"), 1024, "batch")
    check_flag(body.get("normalized"), "normalized")
    if lines is None and body.get("input_url") is not None:
        raise invalid("input_url", "The rehearsal takes inline `input` only: it fetches nothing", "value_error")
    if lines is None:
        raise invalid("input", "Either input_url or input must be provided", "value_error")
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise invalid("input", "Input should be a valid list of dictionaries", "list_type")
    if not 0 < len(lines) <= MAX_INLINE_LINES:
        raise invalid("input", f"List should have 1 to {MAX_INLINE_LINES} items", "too_long")


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json_line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
