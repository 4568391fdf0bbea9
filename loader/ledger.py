"""What has been loaded into one collection, beside the dataset: `loads/TARGET/`.

An intent is created before the first row of a shard is sent, its result after Milvus has everything, and then the intent
goes. A shard with an intent may be half there, and is applied again: applying is idempotent. TARGET names one creation of
one collection, so that nothing counts for a collection that was dropped and made anew.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from embedmill.dataset import layout
from embedmill.dataset.store import LocalStore, Store
from embedmill.errors import ConfigurationError, CorruptStore, ObjectExists, StorageError
from embedmill.failpoints import failpoint

FOLDER = "loads"
_LOCK = "lock"
_INTENT = ".intent.json"


@dataclass(frozen=True, slots=True)
class LedgerTarget:
    """One creation of one collection. `name` is the folder."""

    name: str
    uri: str
    collection: str
    identity: str

    def to_bytes(self) -> bytes:
        return layout.to_json({"format_version": layout.FORMAT_VERSION, **asdict(self)})


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What applying one shard did, rows by outcome. `marker_crc32c` says of which marker."""

    shard: int
    marker_crc32c: str
    upserted: int
    deleted: int
    superseded: int
    skipped: int
    cut: int
    at: str

    def to_bytes(self) -> bytes:
        return layout.to_json({"format_version": layout.FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> LoadResult:
        record: dict[str, Any] = layout.from_json(data, name=name)
        layout.check_version(record, name=name)
        try:
            return cls(**layout.known(cls, record))
        except TypeError as error:
            raise CorruptStore(f"{name} is incomplete: {error}") from error


class Ledger:
    """The ledger of one target; one loader at a time, by a lock that dies with its process."""

    def __init__(self, store: Store, target: LedgerTarget) -> None:
        self._store = store
        self._folder = f"{FOLDER}/{target.name}"
        self._target = target
        self._lock: int | None = None

    def open(self) -> None:
        """Take the lock. Raises ConfigurationError when another loader has it."""
        with suppress(ObjectExists):
            self._store.create(f"{self._folder}/target.json", self._target.to_bytes())
        if isinstance(self._store, LocalStore):
            self._lock = _take_lock(self._store, f"{self._folder}/{_LOCK}", collection=self._target.collection)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def results(self) -> dict[int, LoadResult]:
        """Every shard that is wholly in the target."""
        shards = layout.numbers(self._store.names(self._folder), suffix=".json")
        return {shard: self._read(self._key(shard)) for shard in shards}

    def intents(self) -> set[int]:
        """Shards that may be in the target in part."""
        return set(layout.numbers(self._store.names(self._folder), suffix=_INTENT))

    def intend(self, shard: int) -> None:
        """Note that rows of the shard are about to be sent."""
        with suppress(ObjectExists):
            record = {"format_version": layout.FORMAT_VERSION, "shard": shard}
            self._store.create(self._intent_key(shard), layout.to_json(record))

    def record(self, result: LoadResult) -> None:
        """Note that the shard is wholly there."""
        key = self._key(result.shard)
        current = self._store.read_or_none(key)
        self._store.swap(key, result.to_bytes(), expected=current)
        failpoint("loader.after_result")
        self._store.delete(self._intent_key(result.shard))

    def forget(self, shards: Iterable[int]) -> None:
        """Have these shards applied again."""
        for shard in shards:
            self._store.delete(self._key(shard))

    def _read(self, key: str) -> LoadResult:
        return LoadResult.from_bytes(self._store.read(key), name=f"{self._store.url}/{key}")

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}.json"

    def _intent_key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}{_INTENT}"


def _take_lock(store: LocalStore, key: str, *, collection: str) -> int:
    path = store.path(key)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"another loader is loading {store.url} into collection {collection}: one is enough, wait for it or stop it"
        ) from error
    return descriptor
