"""Inbox batches that made no row, since nothing in them was new: a line each, with the key and the last record taken.

A batch that comes again must not be judged again: what was no news then may be older than the log by now. A line that a
crash cut short is passed over; lines begin with a new line, so that the next one is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable


def encode_rowless(batches: Iterable[tuple[str, int]]) -> bytes:
    """What is appended, all at once."""
    lines = (json.dumps({"key": key, "record": record}) for key, record in batches)
    return "".join(f"\n{line}\n" for line in lines).encode()


def decode_rowless(data: bytes) -> tuple[list[tuple[str, int]], int]:
    """Batches as (key, record), and how many bytes that were: up to the end of the last line."""
    size = data.rfind(b"\n") + 1
    found = []
    for line in data[:size].splitlines():
        try:
            batch = json.loads(line)
            found.append((str(batch["key"]), int(batch["record"])))
        except (ValueError, TypeError, KeyError):
            continue
    return found, size
