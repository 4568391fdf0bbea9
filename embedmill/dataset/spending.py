"""What a dataset's spend logs say: what each job, shard and key was billed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ..errors import EmbedmillError
from . import layout
from .dataset import Dataset
from .layout import Marker
from .submissions import Intent, Submissions

_OF_A_BATCH = re.compile(r"batch-[0-9a-f]{16}\.log")
# Some twenty requests; a busy minute takes more, and is read from further back.
_END_BYTES, _FURTHER = 4 * 1024, 8


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
        self._by_batches: Counter[str] = Counter()
        self._beyond: Counter[str] = Counter()

    def charged(self, job: str, *, with_markers: bool = False) -> int:
        """Tokens charged to a job. with_markers: where a marker was billed more than the logs know of its shard, as when a
        log was lost, the marker counts, now and from then on."""
        # Before the logs: these have a shard's lines before its marker is there.
        committed = self._dataset.committed() if with_markers else ()
        for name, line in self._new_lines():
            self._by_job[self._job_of(line)] += line.charged
            if _OF_A_BATCH.fullmatch(name):
                self._by_batches[line.job] += line.charged
            if line.shard is not None:
                self._by_shard[line.shard] += line.charged
        if with_markers:
            self._beyond[job] = self._only_in_markers(job, committed)
        return self._by_job[job] + self._beyond[job]

    def of_batches(self, job: str) -> int:
        """How much of what was returned last batches of the provider's batch endpoint were charged."""
        return self._by_batches[job]

    def has_read(self, name: str) -> bool:
        """Whether a log has a line that is among what was returned last."""
        return self._read.get(name, 0) > 0

    def _new_lines(self) -> Iterator[tuple[str, Spent]]:
        for name, size in self._dataset.store.sizes(layout.SPEND_FOLDER).items():
            begin = self._read.get(name, 0)
            if size <= begin:
                continue
            data = self._dataset.store.read_from(f"{layout.SPEND_FOLDER}/{name}", begin)
            whole = data[: data.rfind(b"\n") + 1]
            self._read[name] = begin + len(whole)
            yield from ((name, line) for line in _parse(whole))

    def _job_of(self, line: Spent) -> str:
        """Lines of earlier releases name the shard only, which may have been put out of the log since."""
        if not line.job and line.shard is not None:
            with suppress(EmbedmillError):
                return self._dataset.admission(line.shard).job
        return line.job

    def _only_in_markers(self, job: str, committed: Iterable[int]) -> int:
        markers = map(self._dataset.marker, committed)
        mine = [marker for marker in markers if marker and self._dataset.admission(marker.shard).job == job]
        return sum(max(0, marker.billed_tokens - self._in_logs(marker)) for marker in mine)

    def _in_logs(self, marker: Marker) -> int:
        """A replacement was billed what the shards were that it replaces."""
        shards = self._dataset.lineage(marker.shard) if marker.replaces else {marker.shard}
        return sum(self._by_shard[shard] for shard in shards)


@dataclass(frozen=True, slots=True)
class Charged:
    """tokens: charged to a job; of_batches: how much of it to batches of the provider's batch endpoint; batches: the most
    that open ones can cost beyond that. abandoned: the most that those can cost which nobody fetches any more, since their
    shards were given up; it is among the other two."""

    tokens: int = 0
    of_batches: int = 0
    batches: int = 0
    abandoned: int = 0


class JobAccount:
    """What the dataset says of one job's money, read on from where it was read before. Blocking; one thread at a time."""

    def __init__(self, dataset: Dataset, job: str) -> None:
        self._dataset = dataset
        self._job = job
        self._logs = SpendLogs(dataset)
        self._submissions = Submissions(dataset)
        self._intents: dict[tuple[int, int], Intent] = {}

    def read(self, *, with_markers: bool = False) -> Charged:
        """with_markers: see `SpendLogs.charged`. A batch is open until its bill is among the tokens: never in neither."""
        # Before the logs: the bill of what ends meanwhile is in these.
        intents = self._open_intents()
        tokens = self._logs.charged(self._job, with_markers=with_markers)
        unbilled = Counter[bool]()
        for one in intents:
            if not self._logs.has_read(one.spend_log):
                # One that was sent before there was a cap has no bound.
                unbilled[self._dataset.marker(one.shard) is not None] += one.most_tokens or one.tokens
        abandoned = unbilled[True]
        return Charged(
            tokens + abandoned, self._logs.of_batches(self._job) + abandoned, unbilled[False], abandoned=abandoned
        )

    def _open_intents(self) -> list[Intent]:
        known, self._intents = self._intents, {}
        found = []
        for place in self._submissions.open_places():
            if place.job != self._job:
                continue
            at = (place.shard, place.number)
            intent = known.get(at) or self._submissions.intent(*at)
            if intent is None:
                continue
            found.append(intent)
            if place.accepted:
                self._intents[at] = intent
        return found


def spend_lines(dataset: Dataset) -> Iterator[Spent]:
    """Every line of every spend log; one that a crash cut short is passed over."""
    for name in dataset.store.names(layout.SPEND_FOLDER):
        yield from _parse(dataset.store.read_from(f"{layout.SPEND_FOLDER}/{name}", 0))


def spent_recently(dataset: Dataset, *, within_s: float = 60.0) -> dict[str, list[tuple[float, int]]]:
    """What the spend logs say that each key was charged in the last `within_s` seconds, by the clock of this machine.

    By key, for each request how many seconds ago, and tokens. Of a long log only the end is read.
    """
    now = datetime.now(tz=UTC)
    found: dict[str, list[tuple[float, int]]] = {}
    for name in dataset.store.names(layout.SPEND_FOLDER):
        for line in _last_lines(dataset, name, since=now - timedelta(seconds=within_s)):
            found.setdefault(line.key, []).append(((now - line.at).total_seconds(), line.charged))
    return found


def _last_lines(dataset: Dataset, name: str, *, since: datetime) -> list[Spent]:
    """Those of a log behind its last one that is older."""
    size = _END_BYTES
    while True:
        data = dataset.store.read_end(f"{layout.SPEND_FOLDER}/{name}", size)
        is_whole = len(data) < size
        found: list[Spent] = []
        for text in reversed(data.splitlines()[0 if is_whole else 1 :]):
            for line in _parse(text):
                if line.at <= since:
                    return found[::-1]
                found.append(line)
        if is_whole:
            return found[::-1]
        size *= _FURTHER


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
