"""What travels through Redis: references, never texts. JSON with a version, so that other languages can speak it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import ConfigurationError

WIRE_VERSION = 1
Lane = Literal["live", "bulk"]
LANES: tuple[Lane, ...] = ("live", "bulk")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
"""What a job, an inbox or a stream of receipts can be called: each becomes a part of a file's name or of a key."""


def job_key(dataset_id: str, job: str) -> str:
    """A job by its name in its dataset."""
    return f"{dataset_id}:{job}"


def dead_letter_key(dataset: str, shard: int, row: int) -> str:
    """A dead letter by the place of its passage."""
    return f"{dataset}#{shard}/{row}"


@dataclass(frozen=True, slots=True)
class Task:
    """Embed one admitted shard. `dataset` is where the worker opens it, `fingerprint` whose vectors it takes."""

    dataset: str
    dataset_id: str
    shard: int
    job: str
    rows: int
    text_bytes: int
    lane: Lane = "bulk"
    fingerprint: str = ""

    @property
    def id(self) -> str:
        """One task per shard, whoever enqueues it."""
        return f"{self.dataset_id}:{self.shard}"

    @property
    def job_key(self) -> str:
        return job_key(self.dataset_id, self.job)

    @property
    def cost(self) -> int:
        """Estimated tokens, by which jobs take turns."""
        return max(1, self.text_bytes // 4)

    def to_json(self) -> str:
        return json.dumps({"v": WIRE_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: str) -> Task:
        return cls(**_body(data))


@dataclass(frozen=True, slots=True)
class Announcement:
    """A shard was committed: a hint for loaders; the marker in the dataset is the rule."""

    dataset: str
    dataset_id: str
    shard: int

    def to_json(self) -> str:
        return json.dumps({"v": WIRE_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: str) -> Announcement:
        return cls(**_body(data))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A passage that cannot be embedded, and why. Its text stays in the dataset, at (shard, row)."""

    dataset: str
    job: str
    id: str
    version: int
    shard: int
    row: int
    code: str
    cause: str

    @property
    def key(self) -> str:
        return dead_letter_key(self.dataset, self.shard, self.row)

    def to_json(self) -> str:
        return json.dumps({"v": WIRE_VERSION, **asdict(self)}, ensure_ascii=False)


def _body(data: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    version = record.pop("v", None)
    if version != WIRE_VERSION:
        raise ConfigurationError(
            f"a message of version {version} is in the queue, and this embedmill speaks {WIRE_VERSION}: use one release"
        )
    return record
