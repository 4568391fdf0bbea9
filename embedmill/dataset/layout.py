"""Names and records of a dataset: where each object lives, and what its JSON says. Pure: no I/O.

Every record carries the format version; a reader refuses a newer one with a sentence instead of guessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..embedder import EmbedderSpec
from ..errors import ConfigurationError, CorruptStore
from ..messages import NAME

FORMAT = "embedmill-dataset"
FORMAT_VERSION = 1
DEFAULT_SHARD_ROWS = 4096
DEFAULT_CHUNK_ROWS = 256

DATASET_KEY = "dataset.json"
ZARR_GROUP_KEY = "vectors.zarr/zarr.json"
ZARR_ARRAY_KEY = "vectors.zarr/vectors/zarr.json"
DOCUMENTS_FOLDER = "documents"
COMMITS_FOLDER = "commits"
RETIREMENTS_FOLDER = "retirements"
JOBS_FOLDER = "jobs"
SPEND_FOLDER = "spend"
CHECKPOINTS_FOLDER = "checkpoints"
LOADS_FOLDER = "loads"
INTENT_SUFFIX = ".intent.json"
DROPPED_KEY = "dead/dropped.jsonl"
TOKENS_KEY = "tokens.json"
BATCHES_KEY = "batches.jsonl"

JobState = Literal["running", "paused", "cancelled"]
JobMode = Literal["direct", "batch"]
StoppedBy = Literal["", "user", "worker"]
TooLong = Literal["truncate", "split", "fail"]
"""What becomes of a passage over the model's limit: cut by the provider, split at admission, or a dead letter."""
Status = Literal["owed", "embedded", "failed", "deleted", "cancelled"]
STATUSES: tuple[Status, ...] = ("owed", "embedded", "failed", "deleted", "cancelled")
_SPEC_FIELDS = {field.name for field in fields(EmbedderSpec)}
OWED, EMBEDDED, FAILED, DELETED, CANCELLED = range(len(STATUSES))


def documents_key(shard: int) -> str:
    return f"{DOCUMENTS_FOLDER}/{shard:08d}.parquet"


def vectors_key(shard: int) -> str:
    return f"vectors.zarr/vectors/c/{shard}/0"


def commit_key(shard: int) -> str:
    return f"{COMMITS_FOLDER}/{shard:08d}.json"


def checkpoints_folder(shard: int) -> str:
    return f"{CHECKPOINTS_FOLDER}/{shard:08d}"


def job_key(job: str) -> str:
    """Raises ConfigurationError for what is no job's name, and would lead out of the folder."""
    if not NAME.fullmatch(job):
        raise ConfigurationError(
            f"{job!r:.120} is no job's name: use letters, digits, dots, dashes and underscores, at most 100"
        )
    return f"{JOBS_FOLDER}/{job}.json"


def job_names(names: Sequence[str]) -> list[str]:
    """Jobs of object names like `main.json`; other names are not ours and are passed over."""
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [stem for stem in stems if NAME.fullmatch(stem)]


def retirement_key(number: int) -> str:
    return f"{RETIREMENTS_FOLDER}/{number:08d}.json"


def spend_key(worker: str) -> str:
    return f"{SPEND_FOLDER}/{worker}.log"


def numbers(names: Sequence[str], *, suffix: str) -> list[int]:
    """Shard numbers of object names like `00000042.json`; other names are not ours and are passed over."""
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return [int(stem) for stem in stems if stem.isdecimal()]


def to_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()


def from_json(data: bytes, *, name: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise CorruptStore(f"{name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise CorruptStore(f"{name} is not a JSON object")
    return record


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """`dataset.json`: what the whole dataset has in common, fixed when it is created."""

    id: str
    created_at: str
    embedder: EmbedderSpec
    dtype: str = "float32"
    shard_rows: int = DEFAULT_SHARD_ROWS
    chunk_rows: int = DEFAULT_CHUNK_ROWS

    @property
    def dimensions(self) -> int:
        return self.embedder.dimensions

    def to_bytes(self) -> bytes:
        return to_json(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "id": self.id,
                "requires": [],
                "created_at": self.created_at,
                "embedder": self.embedder.as_dict(),
                "fingerprint": self.embedder.fingerprint,
                "dimensions": self.dimensions,
                "dtype": self.dtype,
                "shard_rows": self.shard_rows,
                "chunk_rows": self.chunk_rows,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> DatasetInfo:
        record = from_json(data, name=name)
        if record.get("format") != FORMAT:
            raise ConfigurationError(f"{name} does not describe an embedmill dataset")
        check_version(record, name=name)
        _refuse_unknown(record, name=name)
        try:
            embedder = EmbedderSpec(**record["embedder"])
            info = cls(
                id=record["id"],
                created_at=record["created_at"],
                embedder=embedder,
                dtype=record["dtype"],
                shard_rows=record["shard_rows"],
                chunk_rows=record["chunk_rows"],
            )
        except (KeyError, TypeError) as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error
        if embedder.fingerprint != record.get("fingerprint"):
            raise CorruptStore(f"{name} was edited: its fingerprint is not that of its embedder")
        return info


def known(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What this release knows of a record. Fields that others added are passed over: what must not be is in `requires`."""
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in record.items() if key in names}


def check_version(record: Mapping[str, Any], *, name: str) -> None:
    version = record.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CorruptStore(f"{name} has no format version")
    if version > FORMAT_VERSION:
        raise ConfigurationError(
            f"{name} has format version {version}, and this embedmill reads up to {FORMAT_VERSION}: upgrade embedmill"
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one row has no vector: the dead letter's content."""

    row: int
    id: str
    version: int
    code: str
    cause: str

    def as_dict(self) -> dict[str, Any]:
        return {"row": self.row, "id": self.id, "version": self.version, "code": self.code, "cause": self.cause}


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """Late chunking: a document was embedded in several requests, and this is one: its embedded rows from `first_row` on."""

    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Size and crc32c (8 hex digits) of a stored object. values_crc32c: of a shard's values alone; empty for other objects,
    and in markers of the first release."""

    bytes: int
    crc32c: str
    values_crc32c: str = ""

    def as_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"bytes": self.bytes, "crc32c": self.crc32c}
        return {**record, "values_crc32c": self.values_crc32c} if self.values_crc32c else record

    def is_met_by(self, found: StoredObject) -> bool:
        """True when what is stored is what was promised here, as far as that was said."""
        return found == (self if self.values_crc32c else replace(self, values_crc32c=found.values_crc32c))


@dataclass(frozen=True, slots=True)
class Marker:
    """`commits/K.json`, written last: from then on the shard is done, and this is what is true of it.

    statuses: (rows,) uint8, positions in STATUSES. billed_tokens: what all attempts together were billed, as far as known.
    retries: row -> (shard, row) of the failure that it tries again; that one does not count any more. windows: of the
    documents that late chunking could not embed whole. replaced: by shard that this one replaces, the crc32c of its marker,
    as far as they were read when this one was written.
    """

    shard: int
    statuses: NDArray[np.uint8]
    fingerprint: str
    attempt: str
    worker: str
    committed_at: str
    billed_tokens: int = 0
    requests: int = 0
    failures: tuple[Failure, ...] = ()
    truncated: tuple[int, ...] = ()
    replaces: tuple[int, ...] = ()
    objects: Mapping[str, StoredObject] = field(default_factory=dict)
    retries: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    windows: tuple[Window, ...] = ()
    replaced: Mapping[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.statuses)

    def count(self, status: int) -> int:
        return int(np.count_nonzero(self.statuses == status))

    def to_bytes(self) -> bytes:
        return to_json(
            {
                "format_version": FORMAT_VERSION,
                "shard": self.shard,
                "rows": self.rows,
                "statuses": [[STATUSES[code], length] for code, length in run_lengths(self.statuses)],
                "failures": [failure.as_dict() for failure in self.failures],
                "truncated": list(self.truncated),
                "replaces": list(self.replaces),
                "replaced": {str(shard): crc32c for shard, crc32c in sorted(self.replaced.items())},
                "retries": [[row, *place] for row, place in sorted(self.retries.items())],
                "windows": [[window.first_row, window.rows] for window in self.windows],
                "billed_tokens": self.billed_tokens,
                "requests": self.requests,
                "fingerprint": self.fingerprint,
                "attempt": self.attempt,
                "worker": self.worker,
                "committed_at": self.committed_at,
                "objects": {key: stored.as_dict() for key, stored in self.objects.items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Marker:
        record = from_json(data, name=name)
        check_version(record, name=name)
        try:
            marker = cls(
                shard=record["shard"],
                statuses=_expand(record["statuses"]),
                fingerprint=record["fingerprint"],
                attempt=record["attempt"],
                worker=record["worker"],
                committed_at=record["committed_at"],
                billed_tokens=record["billed_tokens"],
                requests=record["requests"],
                failures=tuple(Failure(**known(Failure, failure)) for failure in record["failures"]),
                truncated=tuple(record["truncated"]),
                replaces=tuple(record["replaces"]),
                retries={row: (shard, old_row) for row, shard, old_row in record.get("retries", [])},
                objects={key: StoredObject(**known(StoredObject, value)) for key, value in record["objects"].items()},
                windows=tuple(Window(first_row, rows) for first_row, rows in record.get("windows", [])),
                replaced={int(shard): str(crc32c) for shard, crc32c in record.get("replaced", {}).items()},
            )
            rows = record["rows"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error
        if marker.rows != rows:
            raise CorruptStore(f"{name} says {rows} rows and gives the status of {marker.rows}")
        return marker


@dataclass(frozen=True, slots=True)
class Job:
    """`jobs/JOB.json`: what was asked for, and whether it goes on. Changed by compare-and-swap only.

    mode: how its passages are sent, one request after the other or through the provider's batch endpoint;
    stopped_by: who paused or cancelled it; a worker does so for want of balance, and then `run` and `push` start it again.
    too_long: what becomes of a passage over the model's limit;
    caps: `max_tokens`, the most that it may be billed in all, and `reached`, the cap at which it was last stopped,
    `begun`, 1 once anything may have been paid for under a cap.
    """

    id: str
    lane: Literal["live", "bulk"] = "bulk"
    state: JobState = "running"
    reason: str = ""
    sources: tuple[str, ...] = ()
    caps: Mapping[str, int] = field(default_factory=dict)
    created_at: str = ""
    stopped_by: StoppedBy = ""
    mode: JobMode = "direct"
    too_long: TooLong = "truncate"

    @property
    def max_tokens(self) -> int:
        """0 for no cap."""
        return self.caps.get("max_tokens", 0)

    @property
    def has_reached_cap(self) -> bool:
        """It was stopped at its cap, and the cap is no larger now."""
        return 0 < self.max_tokens <= self.caps.get("reached", 0)

    def to_bytes(self) -> bytes:
        return to_json(
            {
                "format_version": FORMAT_VERSION,
                "id": self.id,
                "lane": self.lane,
                "mode": self.mode,
                "too_long": self.too_long,
                "state": self.state,
                "reason": self.reason,
                "stopped_by": self.stopped_by,
                "sources": list(self.sources),
                "caps": dict(self.caps),
                "created_at": self.created_at,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Job:
        record = from_json(data, name=name)
        check_version(record, name=name)
        try:
            job = replace(cls(**known(cls, record)), sources=tuple(record["sources"]))
        except (KeyError, TypeError) as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error
        if not isinstance(job.caps, dict) or any(type(cap) is not int or cap < 0 for cap in job.caps.values()):
            raise CorruptStore(f"{name} has caps that are no numbers of tokens")
        return job


@dataclass(frozen=True, slots=True)
class Retirement:
    """`retirements/N.json`: old shards and what replaces them, switched by the creation of this object.

    dropped: how many accepted (id, version) the retired shards had and the replacements do not, since a higher version
    overrules them or they were erased; job: whose they were.
    """

    retired: tuple[int, ...]
    replacements: tuple[int, ...]
    reason: str
    created_at: str
    job: str = ""
    dropped: int = 0

    def to_bytes(self) -> bytes:
        return to_json(
            {
                "format_version": FORMAT_VERSION,
                "retired": list(self.retired),
                "replacements": list(self.replacements),
                "reason": self.reason,
                "created_at": self.created_at,
                "job": self.job,
                "dropped": self.dropped,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Retirement:
        record = from_json(data, name=name)
        check_version(record, name=name)
        try:
            return cls(
                tuple(record["retired"]),
                tuple(record["replacements"]),
                record["reason"],
                record["created_at"],
                record["job"],
                record["dropped"],
            )
        except (KeyError, TypeError) as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error


def _refuse_unknown(record: Mapping[str, Any], *, name: str) -> None:
    """A dataset that needs what a later release brought must not be read without it."""
    requires, embedder = record.get("requires"), record.get("embedder")
    if not isinstance(requires, list) or not isinstance(embedder, dict):
        raise CorruptStore(f"{name} is incomplete: it has no list `requires`, or no embedder")
    unknown = [*map(str, requires), *set(embedder).difference(_SPEC_FIELDS)]
    if unknown:
        raise ConfigurationError(f"{name} uses what this embedmill does not know ({', '.join(unknown)}): upgrade it")


def run_lengths(codes: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(value, length) of each run."""
    if not len(codes):
        return []
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
    lengths = np.diff(np.r_[starts, len(codes)])
    return [(int(codes[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


def _expand(runs: Sequence[tuple[Status, int]]) -> NDArray[np.uint8]:
    codes = [STATUSES.index(status) for status, _ in runs]
    return np.repeat(np.array(codes, dtype=np.uint8), [length for _, length in runs])
