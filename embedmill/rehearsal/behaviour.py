"""How a rehearsal behaves: limits, latency, account and the chance of every fault.

A field's help is kept beside it, and the command makes its options from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

WindowMode = Literal["sliding", "fixed", "bucket"]


def _chance(help_text: str) -> Any:
    return field(default=0.0, metadata={"chance": help_text})


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The simulator's settings; each key has limits, balance and counters of its own.

    rpm, tpm, concurrency: limits of a key, 0 for none; window: what "per minute" means (see `limits`); window_s: how long
    a "minute" is; other_client: the share of a key's requests and tokens that a stranger asks for, evenly spread;
    count_refused: refused requests use up the requests of the window, too; retry_after: seconds that a 429 announces,
    None for no header, as the real one; limit_headers: X-RateLimit-Remaining-*.
    latency_ms, jitter_ms: mean and standard deviation of the time that an answer takes; ms_per_1k_tokens comes on top.
    max_inputs: of one request; undeclared_fields: "ignored" as the description of 2026 has it, or "refused" (422) as
    in 2025; bare_sparse: rows of sparse models without `index`, the other shape that the description allows.
    bad_key: refuse every key; bad_key_marker: refuse keys that hold it; no_balance_after: tokens after which an account is
    empty, 0 for never; reject_marker: a text that holds it is refused.
    batch_s: time that a batch job takes; batch_keep_s: time that its output is kept.
    All others are probabilities per request, per batch or per line. `seed` makes a sequence of faults repeatable.
    """

    rpm: int = 0
    tpm: int = 0
    concurrency: int = 0
    window: WindowMode = "sliding"
    window_s: float = 60.0
    other_client: float = 0.0
    count_refused: bool = False
    retry_after: float | None = None
    limit_headers: bool = True
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    ms_per_1k_tokens: float = 0.0
    seed: int = 0
    max_inputs: int = 512
    undeclared_fields: Literal["ignored", "refused"] = "ignored"
    bare_sparse: bool = False
    bad_key: bool = False
    bad_key_marker: str = ""
    no_balance_after: int = 0
    reject_marker: str = ""
    batch_s: float = 2.0
    batch_keep_s: float = 86_400.0

    error_500: float = _chance("an internal error")
    error_502: float = _chance("an HTML page of a proxy, 502")
    error_503: float = _chance("an overload")
    error_504: float = _chance("a timeout on the other side, billed")
    request_429: float = _chance("a refusal for the rate of requests")
    token_429: float = _chance("a refusal for the rate of tokens")
    concurrency_429: float = _chance("a refusal for concurrency")
    ip_429: float = _chance("a refusal for the rate of the address")
    burst_429: float = _chance("five refusals for the rate of tokens in a row")
    drop_before: float = _chance("a connection reset before the work")
    drop_after: float = _chance("a connection reset after it: billed, no answer")
    hang: float = _chance("no answer until the client gives up, billed")
    truncated_body: float = _chance("half an answer, billed")
    html_200: float = _chance("an HTML page with status 200")
    error_200: float = _chance("an error's body with status 200")
    missing_row: float = _chance("a vector too few")
    extra_row: float = _chance("a vector too many")
    duplicate_index: float = _chance("an index given twice")
    nan_row: float = _chance("a vector that is not numbers")
    zero_row: float = _chance("a vector of zeros")
    same_vectors: float = _chance("one vector for all texts")

    shuffle: float = _chance("rows in another order, with the right indexes")
    batch_lost_answer: float = _chance("a batch that was accepted, and the answer lost")
    batch_failed: float = _chance("a batch job that fails as a whole")
    batch_expired: float = _chance("a batch job that expires unfinished")
    batch_line_error: float = _chance("an error for a line of a batch")


CHANCES: dict[str, str] = {
    each.name: each.metadata["chance"] for each in fields(Rehearsal) if "chance" in each.metadata
}
_DRAWN_APART = {"shuffle", "batch_lost_answer", "batch_failed", "batch_expired", "batch_line_error"}
# At most one of these befalls a request.
FAULTS = tuple(name for name in CHANCES if name not in _DRAWN_APART)
