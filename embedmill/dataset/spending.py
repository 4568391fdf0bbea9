"""What a dataset's spend logs say: what each job, shard and key was billed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import EmbedmillError
from . import layout
from .dataset import Dataset


@dataclass(frozen=True, slots=True)
class Spent:
    """A line of a spend log. job: empty where it does not say; shard: None for a request that was of none.

    unknown_tokens: estimate for requests whose answer was lost, which the provider may have billed.
    """

    at: datetime
    key: str
    job: str
    shard: int | None
    tokens: int
    unknown_tokens: int

    @property
    def charged(self) -> int:
        """What counts against a cap."""
        return self.tokens + self.unknown_tokens


class SpendLogs:
    """The spend logs of one dataset, read on from where they were read before. Blocking; one thread at a time."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._read: dict[str, int] = {}
        self._by_job: Counter[str] = Counter()
        self._by_shard: Counter[int] = Counter()
        self.latest: datetime | None = None
        """When the last request was noted, of what has been read."""

    def charged(self, job: str, *, with_markers: bool = False) -> int:
        """Tokens charged to a job. with_markers: where a marker was billed more than the logs know of its shard, as when a
        log was lost, the marker counts."""
        for line in self._new_lines():
            self._by_job[self._job_of(line)] += line.charged
            self.latest = max(self.latest or line.at, line.at)
            if line.shard is not None:
                self._by_shard[line.shard] += line.charged
        return self._by_job[job] + (self._only_in_markers(job) if with_markers else 0)

    def _new_lines(self) -> Iterator[Spent]:
        for name in self._dataset.store.names(layout.SPEND_FOLDER):
            begin = self._read.get(name, 0)
            data = self._dataset.store.read_from(f"{layout.SPEND_FOLDER}/{name}", begin)
            whole = data[: data.rfind(b"\n") + 1]
            self._read[name] = begin + len(whole)
            yield from _parse(whole)

    def _job_of(self, line: Spent) -> str:
        """Lines of earlier releases name the shard only, which may have been put out of the log since."""
        if not line.job and line.shard is not None:
            with suppress(EmbedmillError):
                return self._dataset.admission(line.shard).job
        return line.job

    def _only_in_markers(self, job: str) -> int:
        markers = (self._dataset.marker(shard) for shard in self._dataset.committed())
        mine = [marker for marker in markers if marker and self._dataset.admission(marker.shard).job == job]
        return sum(max(0, marker.billed_tokens - self._by_shard[marker.shard]) for marker in mine)


def spend_lines(dataset: Dataset) -> Iterator[Spent]:
    """Every line of every spend log; one that a crash cut short is passed over."""
    for name in dataset.store.names(layout.SPEND_FOLDER):
        yield from _parse(dataset.store.read(f"{layout.SPEND_FOLDER}/{name}"))


def spent_recently(dataset: Dataset, *, key_id: str, within_s: float = 60.0) -> int:
    """Tokens that the spend logs say one key was charged in the last `within_s` seconds, by the clock of this machine."""
    now = datetime.now(tz=UTC)
    lines = (line for line in spend_lines(dataset) if line.key == key_id)
    return sum(line.charged for line in lines if (now - line.at).total_seconds() < within_s)


def _parse(data: bytes) -> Iterator[Spent]:
    for text in data.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(text)
            line = Spent(
                at=datetime.fromisoformat(record["at"]),
                key=str(record.get("key", "")),
                job=str(record.get("job", "")),
                shard=record.get("shard"),
                tokens=_count(record["tokens"]),
                unknown_tokens=_count(record.get("unknown_tokens", 0)),
            )
            if line.at.tzinfo is not None and (line.shard is None or type(line.shard) is int):
                yield line


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"no number of tokens: {value!r}")
    return value
