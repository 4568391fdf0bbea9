"""What was handed to a provider's batch endpoint: an intent before it is sent, then the batch that came of it, then its end.

Four small objects per submission, `submissions/SHARD-NUMBER.KIND.json`, each created exclusively: whoever creates an intent
is the only one who may send it, and whatever a process forgets by dying, the next one reads here. Only an intent whose
request was certainly refused is taken back. They stay when the shard is committed: they name what was paid for.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import CorruptStore, ObjectExists
from .dataset import Dataset, now_iso
from .layout import FORMAT_VERSION, SPEND_FOLDER, check_version, from_json, known, to_json

FOLDER = "submissions"
Kind = Literal["intent", "batch", "held", "end"]
How = Literal["done", "failed", "expired", "cancelled", "never", "discarded"]
"""never: it reached nobody; discarded: a person gave it up; the others are how the provider ended it."""
_NAME = re.compile(r"(\d{8})-(\d{4})\.(intent|batch|held|end)\.json")


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be sent.

    attempt: random, the start of every line's custom_id, so that an output tells whose it is; rows: [start, length] of each
    run of rows; tokens: estimated; key: stands for the API key; api_base: where it goes; before: the provider's batches as
    listed just before, none of which this one can be; most_tokens: the most that it can cost, 0 where the job has no cap.
    """

    shard: int
    number: int
    attempt: str
    model: str
    rows: tuple[tuple[int, int], ...]
    tokens: int
    key: str
    api_base: str
    worker: str
    at: str
    before: tuple[str, ...]
    most_tokens: int = 0

    @property
    def name(self) -> str:
        return f"{self.shard:08d}-{self.number:04d}"

    @property
    def spend_log(self) -> str:
        """Name of the log that has its bill, once that is known."""
        return f"batch-{self.attempt}.log"

    def row_numbers(self) -> list[int]:
        return [row for start, length in self.rows for row in range(start, start + length)]

    def custom_id(self, row: int) -> str:
        return f"{self.attempt}-{row}"

    def row_of(self, custom_id: str) -> int | None:
        """The row that a line of the output is about; None for a line of somebody else's."""
        attempt, _, row = custom_id.rpartition("-")
        return int(row) if attempt == self.attempt and row.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Accepted:
    """by: `answer` of the submission, `match` in the provider's list, or `person`."""

    batch_id: str
    by: str
    at: str


@dataclass(frozen=True, slots=True)
class Held:
    """Nobody can tell what became of it, or what its batch is worth, so a person has to; candidates: batches that it may
    be."""

    reason: str
    candidates: tuple[str, ...]
    at: str


@dataclass(frozen=True, slots=True)
class Ended:
    """tokens: what the provider billed for it, as far as known."""

    how: How
    tokens: int
    reason: str
    at: str


@dataclass(frozen=True, slots=True)
class OpenPlace:
    """What the names of its objects tell of one that has not ended. accepted: its batch is known, from when on its intent
    stays as it is; held: a person has to decide."""

    shard: int
    number: int
    job: str
    accepted: bool
    held: bool


@dataclass(frozen=True, slots=True)
class Submission:
    """All that is known of one."""

    intent: Intent
    accepted: Accepted | None = None
    held: Held | None = None
    ended: Ended | None = None

    @property
    def is_open(self) -> bool:
        return self.ended is None

    @property
    def state(self) -> str:
        """In one word, for people."""
        if self.ended is not None:
            return self.ended.how
        if self.accepted is not None:
            return "accepted"
        return "held" if self.held is not None else "unanswered"


class Submissions:
    """The submissions of a dataset. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._store = dataset.store

    def of_shard(self, shard: int) -> list[Submission]:
        """In the order in which they were meant."""
        return self._read(place for place in self._places() if place[0] == shard)

    def of_shards(self, shards: Iterable[int]) -> list[Submission]:
        wanted = set(shards)
        return self._read(place for place in self._places() if place[0] in wanted)

    def has(self, shard: int) -> bool:
        """Whether anything of a shard was ever sent. Without reading it."""
        return any(of == shard for of, _ in self._places())

    def last_number(self, shard: int) -> int:
        """0 where nothing was ever sent. To be asked before what is known is read."""
        return max((number for of, number in self._places() if of == shard), default=0)

    def open_places(self) -> list[OpenPlace]:
        """Without reading any of them."""
        return [
            OpenPlace(shard, number, self._dataset.admission(shard).job, "batch" in kinds, "held" in kinds)
            for (shard, number), kinds in self._places().items()
            if "intent" in kinds and "end" not in kinds
        ]

    def open_of(self, job: str) -> list[OpenPlace]:
        """Those of the shards that a job owes: nobody fetches the others."""
        mine = (place for place in self.open_places() if place.job == job)
        return [place for place in mine if self._dataset.marker(place.shard) is None]

    def intent(self, shard: int, number: int) -> Intent | None:
        """None where it was withdrawn."""
        found: Intent | None = self._record(Intent, shard, number, "intent")
        return found

    def batch_ids(self) -> set[str]:
        """Every batch that is known to be that of some submission."""
        places = (place for place, kinds in self._places().items() if "batch" in kinds)
        return {one.accepted.batch_id for one in self._read(places) if one.accepted is not None}

    def intend(
        self,
        shard: int,
        rows: Sequence[int],
        *,
        number: int,
        model: str,
        tokens: int,
        key: str,
        api_base: str,
        worker: str,
        before: Iterable[str],
        most_tokens: int = 0,
    ) -> Intent:
        """Note, durably, what is about to be sent. number: the next one after what was known when it was decided.

        Raises ObjectExists when somebody else was faster: then what was decided may be wrong.
        """
        intent = Intent(
            shard, number, uuid.uuid4().hex[:16], model, _runs(rows), tokens, key, api_base, worker, now_iso(),
            tuple(before), most_tokens,
        )  # fmt: skip
        self._create(intent, "intent", asdict(intent))
        return intent

    def withdraw(self, intent: Intent) -> None:
        """It was certainly refused: as if it had never been meant."""
        self._store.delete(_key(intent.shard, intent.number, "intent"))

    def accept(self, intent: Intent, batch_id: str, *, by: str) -> None:
        """Raises ObjectExists when another batch is known to be it; the same one again changes nothing."""
        try:
            self._create(intent, "batch", asdict(Accepted(batch_id, by, now_iso())))
        except ObjectExists:
            there = self._record(Accepted, intent.shard, intent.number, "batch")
            if there is None or there.batch_id != batch_id:
                raise

    def hold(self, intent: Intent, reason: str, *, candidates: Iterable[str] = ()) -> None:
        """For a person to decide. Who held it first is who said why."""
        with suppress(ObjectExists):
            self._create(intent, "held", asdict(Held(reason, tuple(candidates), now_iso())))

    def unhold(self, intent: Intent) -> None:
        """There is nothing to decide any more."""
        self._store.delete(_key(intent.shard, intent.number, "held"))

    def end(self, intent: Intent, how: How, *, tokens: int = 0, reason: str = "") -> bool:
        """However often it is said, the first end counts; whether it was this one."""
        try:
            self._create(intent, "end", asdict(Ended(how, tokens, reason, now_iso())))
        except ObjectExists:
            return False
        return True

    def spend(self, intent: Intent, batch_id: str, *, job: str, tokens: int, unknown_tokens: int = 0) -> None:
        """Note what a batch was billed, or may have been: in a log of its own, so that two who fetch one write one line."""
        record = {
            "at": now_iso(),
            # Not the key's own name: what batches cost leaves its tokens per minute alone.
            "key": f"{intent.key}/batch",
            "job": job,
            "shard": intent.shard,
            "passages": 0,
            "tokens": tokens,
            "requests": 1,
            **({"unknown_tokens": unknown_tokens} if unknown_tokens else {}),
            "batch": batch_id,
        }
        with suppress(ObjectExists):
            self._store.create(f"{SPEND_FOLDER}/{intent.spend_log}", (json.dumps(record) + "\n").encode())

    def _places(self) -> dict[tuple[int, int], set[str]]:
        """Kinds of objects by (shard, number)."""
        places: dict[tuple[int, int], set[str]] = {}
        for name in self._store.names(FOLDER):
            if match := _NAME.fullmatch(name):
                places.setdefault((int(match[1]), int(match[2])), set()).add(match[3])
        return places

    def _read(self, places: Iterable[tuple[int, int]]) -> list[Submission]:
        found = []
        for shard, number in sorted(places):
            intent = self._record(Intent, shard, number, "intent")
            # Somebody may just have withdrawn it.
            if intent is not None:
                found.append(
                    Submission(
                        intent,
                        self._record(Accepted, shard, number, "batch"),
                        self._record(Held, shard, number, "held"),
                        self._record(Ended, shard, number, "end"),
                    )
                )
        return found

    def _record(self, kind: type[Any], shard: int, number: int, of: Kind) -> Any:
        key = _key(shard, number, of)
        data = self._store.read_or_none(key)
        if data is None:
            return None
        name = f"{self._dataset.url}/{key}"
        record = from_json(data, name=name)
        check_version(record, name=name)
        try:
            values = {field: _tuples(value) for field, value in known(kind, record).items()}
            return kind(**values)
        except (TypeError, ValueError) as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error

    def _create(self, intent: Intent, kind: Kind, record: dict[str, Any]) -> None:
        key = _key(intent.shard, intent.number, kind)
        self._store.create(key, to_json({"format_version": FORMAT_VERSION, **record}))


def _key(shard: int, number: int, kind: Kind) -> str:
    return f"{FOLDER}/{shard:08d}-{number:04d}.{kind}.json"


def _runs(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[start, length] of each run of neighbours in ascending rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
