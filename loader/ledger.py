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
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.local_folder import local_folder
from embedmill.errors import ConfigurationError, CorruptStore, ObjectExists, StorageError
from embedmill.failpoints import failpoint

_LOCK = "lock"


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
    """The ledger of one target; one loader at a time on this machine, by a lock that dies with its process."""

    def __init__(self, dataset: Dataset, target: LedgerTarget) -> None:
        self._dataset = dataset
        self._store = dataset.store
        self._folder = f"{layout.LOADS_FOLDER}/{target.name}"
        self._target = target
        self._lock: int | None = None

    def open(self) -> None:
        """Take the lock. Raises ConfigurationError when another loader has it."""
        with suppress(ObjectExists):
            self._store.create(f"{self._folder}/target.json", self._target.to_bytes())
        self._lock = _take_lock(self._dataset, self._folder, collection=self._target.collection)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def results(self) -> dict[int, LoadResult]:
        """Every shard that is wholly in the target."""
        shards = layout.numbers(self._store.names(self._folder), suffix=".json")
        found = zip(shards, self._store.read_many([self._key(shard) for shard in shards]), strict=True)
        return {
            shard: LoadResult.from_bytes(data, name=f"{self._store.url}/{self._key(shard)}")
            for shard, data in found
            if data is not None
        }

    def intents(self) -> set[int]:
        """Shards that may be in the target in part."""
        return set(layout.numbers(self._store.names(self._folder), suffix=layout.INTENT_SUFFIX))

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

    def withdraw(self, shard: int) -> None:
        """The shard does not count any more, and nobody will apply it."""
        self._store.delete(self._intent_key(shard))

    def forget(self, shards: Iterable[int]) -> None:
        """Have these shards applied again."""
        for shard in shards:
            self._store.delete(self._key(shard))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}.json"

    def _intent_key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}{layout.INTENT_SUFFIX}"


def _take_lock(dataset: Dataset, folder: str, *, collection: str) -> int:
    path = local_folder(dataset.store, dataset.info.id) / folder / _LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"another loader is loading {dataset.url} into collection {collection}: one is enough, wait for it or stop it"
        ) from error
    return descriptor
