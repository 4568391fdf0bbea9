"""A dataset in an object store, through obstore: one PUT for an object, with a condition on what was there before.

Nothing is written without a condition, so every PUT carries a token of its own in the object's metadata: when the answer to
one was lost and it is sent again, the token says whether it is our own that stands there. Requests are tried again here,
and not by obstore, which cannot know that.

Objects cannot be appended to, so a log KEY is the parts KEY/00000000, KEY/00000001, ...: the last one is replaced by itself
with more behind it until it is PART_BYTES long, and never changes again after that. In a dataset that was copied from a
folder there is an object KEY, too, which comes before the parts.
"""

from __future__ import annotations

import random
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, cast

import obstore
from obstore import exceptions as obstore_errors

from ..errors import ConfigurationError, CorruptStore, ObjectChanged, ObjectExists, StorageError
from ..object_reader import TAIL_BYTES, ObjectReader
from ..objects import ObjectUrl, advise, explain, first_cause, is_bucket_missing, open_objects, s3_endpoint

if TYPE_CHECKING:
    from obstore import GetResult, PutMode, UpdateVersion

    from .store import Buffer

    Bucket = obstore.store.ObjectStore

PART_BYTES = 64 * 1024
# A first request meets what was mistyped, and should say so soon; later ones ride out a store that is gone for a while.
FIRST_RETRY_S, RETRY_S = 3.0, 30.0
FIRST_TIMEOUT_S, TIMEOUT_S = 15.0, 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_TOKEN = "creation"
_CONDITIONS_KEY = ".conditions"
_TOGETHER = 16
_STATUS = re.compile(r"status code: (\d{3})")
_PASSING = ("408", "409", "425", "429")
_Result = TypeVar("_Result")
# Places of this process that are known to keep conditions.
_checked: set[tuple[str, str]] = set()
_checking = threading.Lock()
_ABSENT = (FileNotFoundError, obstore_errors.NotFoundError)
_DENIED = (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError)
_TAKEN = (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError)


@dataclass(frozen=True, slots=True)
class _LastPart:
    """The end of a log as this process last saw it. number: -1 where there is no part yet."""

    number: int
    data: bytes
    version: UpdateVersion | None


class ObjectStore:
    """A prefix of a bucket. bucket: instead of the one that the URL names.

    Raises ConfigurationError while nothing has ever answered and the reason is no passing one, StorageError after that.
    """

    def __init__(self, url: ObjectUrl, *, bucket: Bucket | None = None) -> None:
        self._place = url
        self._prefix = url.key.strip("/")
        if self._prefix and any(part in ("", ".", "..") for part in self._prefix.split("/")):
            raise ConfigurationError(f"{url.url}: a prefix has no empty parts, and no `.` or `..`")
        self._opening = bucket or open_objects(url, retries=0, timeout_s=FIRST_TIMEOUT_S)
        self._bucket = bucket or open_objects(url, retries=0, timeout_s=TIMEOUT_S)
        self._has_answered = False
        self._is_bucket_there = False
        self._appending: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._last_parts: dict[str, _LastPart] = {}
        self._whole_logs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"{self._place.root}/{self._prefix}" if self._prefix else self._place.root

    @property
    def appends_whole(self) -> bool:
        return True

    def read(self, key: str) -> bytes:
        data = self.read_or_none(key)
        if data is None:
            self._miss(key)
        return data

    def read_or_none(self, key: str) -> bytes | None:
        found = self._get(key)
        return None if found is None else found[0]

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return self._together(self.read_or_none, keys)

    def read_buffer(self, key: str) -> memoryview | None:
        data = self.read_or_none(key)
        return None if data is None else memoryview(bytearray(data))

    def open(self, key: str) -> BinaryIO:
        """Its end is read at once, the rest by ranges when it is asked for."""

        def read_tail(bucket: Bucket) -> tuple[int, bytes]:
            if self._place.scheme == "az":
                # Azure has no ranges that count from the end.
                size = obstore.head(bucket, self._path(key))["size"]
                begin = max(0, size - TAIL_BYTES)
                return size, bytes(obstore.get_range(bucket, self._path(key), start=begin, end=size))
            found = obstore.get(bucket, self._path(key), options={"range": {"suffix": TAIL_BYTES}})
            return found.meta["size"], bytes(found.bytes())

        found = self._ask("read", key, read_tail)
        if found is None:
            self._miss(key)
        size, tail = found
        return cast("BinaryIO", ObjectReader(size, tail, get=lambda begin, end: self._range((key, begin, end))))

    def create(self, key: str, parts: Buffer | Sequence[Buffer]) -> None:
        data = parts if isinstance(parts, (bytes, bytearray, memoryview)) else b"".join(parts)
        if self._put(key, memoryview(data).cast("B"), "create") is None:
            raise ObjectExists(f"{self._name(key)} exists already")

    def swap(self, key: str, data: bytes, *, expected: bytes | None) -> None:
        mode: PutMode | None = "create"
        if expected is not None:
            found = self._get(key)
            mode = found[1] if found is not None and found[0] == expected else None
        if mode is None or self._put(key, data, mode) is None:
            raise ObjectChanged(f"{self._name(key)} was changed by somebody else")

    def append(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Durable always: what this process appends next replaces the part that it has in memory, by one PUT."""
        with self._appending[key]:
            pause_s = _FIRST_PAUSE_S / 4
            while not self._append_once(key, data):
                # Somebody else appended to the same log.
                time.sleep(random.uniform(0, pause_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def read_from(self, key: str, offset: int) -> bytes:
        return self._read_log(key, self._whole_log(key), self._parts(key), offset)

    def read_end(self, key: str, size: int) -> bytes:
        whole, parts = self._whole_log(key), self._parts(key)
        end = len(whole) + sum(part_size for _, part_size in parts)
        return self._read_log(key, whole, parts, max(0, end - size))

    def names(self, folder: str) -> list[str]:
        path = self._path(folder)
        listed = self._list(folder)
        inside = len(path) + 1 if path else 0
        found = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        return sorted(one[inside:] for one in found if len(one) > inside)

    def sizes(self, folder: str) -> dict[str, int]:
        path = self._path(folder)

        def list_all(bucket: Bucket) -> list[Mapping[str, Any]]:
            return [meta for block in obstore.list(bucket, path or None) for meta in block]

        found: defaultdict[str, int] = defaultdict(int)
        for meta in self._ask("list", folder, list_all) or []:
            name, _, part = meta["path"].removeprefix(path).lstrip("/").partition("/")
            if not part or part.isdecimal():
                found[name] += meta["size"]
        return dict(sorted(found.items()))

    def exists(self, key: str) -> bool:
        if self._ask("read", key, lambda bucket: obstore.head(bucket, self._path(key))) is not None:
            return True
        if not self._is_bucket_there:
            # A HEAD does not say whether it is the bucket that is missing.
            self._list(".")
        return False

    def delete(self, key: str) -> None:
        self._ask("delete", key, lambda bucket: obstore.delete(bucket, self._path(key)))

    def delete_folder(self, folder: str) -> None:
        """There are no folders."""

    def _whole_log(self, key: str) -> bytes:
        """What stands before the parts of a log. It never changes, and there mostly is nothing."""
        if key not in self._whole_logs:
            self._whole_logs[key] = self.read_or_none(key) or b""
        return self._whole_logs[key]

    def _read_log(self, key: str, whole: bytes, parts: Sequence[tuple[str, int]], offset: int) -> bytes:
        begin, wanted = len(whole), []
        for name, size in parts:
            if begin + size > offset:
                wanted.append((f"{key}/{name}", max(0, offset - begin), size))
            begin += size
        return b"".join([whole[offset:], *self._together(self._range, wanted)])

    def _append_once(self, key: str, data: bytes) -> bool:
        last = self._last_parts.get(key) or self._find_last_part(key)
        if last.version is not None and len(last.data) < PART_BYTES:
            number, data, mode = last.number, last.data + data, cast("PutMode", last.version)
        else:
            number, mode = last.number + 1, "create"
        version = self._put(f"{key}/{number:08d}", data, mode)
        if version is None:
            self._last_parts.pop(key, None)
            return False
        self._last_parts[key] = _LastPart(number, data, version)
        return True

    def _find_last_part(self, key: str) -> _LastPart:
        parts = self._parts(key)
        found = self._get(f"{key}/{parts[-1][0]}") if parts else None
        return _LastPart(-1, b"", None) if found is None else _LastPart(int(parts[-1][0]), *found)

    def _parts(self, key: str) -> list[tuple[str, int]]:
        """Name and size of each part of a log, in order."""
        found = ((meta["path"].rpartition("/")[2], meta["size"]) for meta in self._list(key)["objects"])
        return sorted((name, size) for name, size in found if name.isdecimal())

    def _put(self, key: str, data: Buffer, mode: PutMode) -> UpdateVersion | None:
        """Write where the condition holds, and the version that stands there now; None where it does not."""
        self._check_conditions()
        return self._put_anyway(key, data, mode)

    def _put_anyway(self, key: str, data: Buffer, mode: PutMode) -> UpdateVersion | None:
        token = uuid.uuid4().hex

        def put(bucket: Bucket) -> UpdateVersion | None:
            try:
                done = obstore.put(
                    bucket, self._path(key), data, mode=mode, attributes={_TOKEN: token}, use_multipart=False
                )
            except _TAKEN as error:
                # Whether by somebody else, or by our own PUT whose answer was lost: S3 also says so, with a 409, where two
                # are being written and neither is there yet.
                there = self._look(bucket, key)
                if there is None and mode == "create":
                    raise _Contended(first_cause(str(error))) from error
                is_ours = there is not None and there.attributes.get(_TOKEN) == token
                return _version(there.meta) if there is not None and is_ours else None
            return _version(done)

        return self._ask("write", key, put)

    def _look(self, bucket: Bucket, key: str) -> GetResult | None:
        try:
            return obstore.get(bucket, self._path(key), options={"head": True})
        except _ABSENT:
            return None

    def _check_conditions(self) -> None:
        """See once that the store keeps conditions: one that passes over them would have two writers of one shard.

        Amazon, Google and Azure do; of what else speaks S3, not everything does. Raises ConfigurationError.
        """
        endpoint = s3_endpoint()
        if self._place.scheme != "s3" or endpoint is None or self._bucket is self._opening:
            return
        with _checking:
            if (endpoint, self.url) not in _checked:
                taken = [self._put_anyway(_CONDITIONS_KEY, b"", "create") for _ in range(2)][-1]
                changed = self._put_anyway(_CONDITIONS_KEY, b"", {"e_tag": '"0"'})
                if taken is not None or changed is not None:
                    raise ConfigurationError(
                        f"{self.url}: this store passes over If-None-Match or If-Match, so that two writers would overwrite "
                        "each other unseen; datasets need a store that has conditional PUT, or a folder"
                    )
                _checked.add((endpoint, self.url))

    def _get(self, key: str) -> tuple[bytes, UpdateVersion] | None:
        def get(bucket: Bucket) -> tuple[bytes, UpdateVersion]:
            found = obstore.get(bucket, self._path(key))
            return bytes(found.bytes()), _version(found.meta)

        return self._ask("read", key, get)

    def _range(self, wanted: tuple[str, int, int]) -> bytes:
        key, begin, end = wanted
        data = self._ask(
            "read", key, lambda bucket: bytes(obstore.get_range(bucket, self._path(key), start=begin, end=end))
        )
        if data is None:
            self._miss(key)
        return data

    def _list(self, folder: str) -> Mapping[str, Any]:
        path = self._path(folder.removeprefix("."))
        found = self._ask("list", folder, lambda bucket: obstore.list_with_delimiter(bucket, path or None))
        return {"common_prefixes": [], "objects": []} if found is None else found

    def _together(self, act: Callable[[Any], _Result], values: Sequence[Any]) -> list[_Result]:
        if len(values) < 2:
            return list(map(act, values))
        with ThreadPoolExecutor(min(_TOGETHER, len(values))) as pool:
            return list(pool.map(act, values))

    def _ask(self, verb: str, key: str, call: Callable[[Bucket], _Result]) -> _Result | None:
        """What a request answers, None where there is no such object. Tried again as long as the reason may pass."""
        begin, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            is_first = not self._has_answered
            try:
                result = call(self._opening if is_first else self._bucket)
            except _ABSENT as error:
                if is_bucket_missing(error) or verb == "write":
                    raise self._no_bucket() from None
                self._has_answered = True
                return None
            except _DENIED:
                raise self._refusal(f"cannot {verb} {self._name(key)}: access denied{advise(self._place)}") from None
            except obstore_errors.NotSupportedError as error:
                raise ConfigurationError(f"cannot {verb} {self._name(key)}: {first_cause(str(error))}") from None
            except (obstore_errors.BaseError, OSError, ValueError, _Contended) as error:
                if is_bucket_missing(error):
                    raise self._no_bucket() from None
                said = explain(error, url=self._place)
                if is_first and isinstance(said, ConfigurationError):
                    raise said from None
                if is_first and _is_final(error):
                    raise ConfigurationError(f"cannot {verb} {self._name(key)}: {first_cause(str(error))}") from None
                waited_s = time.monotonic() - begin
                if _is_final(error) or waited_s + pause_s > (FIRST_RETRY_S if is_first else RETRY_S):
                    cause = first_cause(str(error))
                    raise StorageError(
                        f"cannot {verb} {self._name(key)}: {cause}; nothing is lost, the same command goes on"
                    ) from None
                time.sleep(random.uniform(pause_s / 2, pause_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._has_answered = True
                self._is_bucket_there |= verb == "list"
                return result

    def _no_bucket(self) -> ConfigurationError:
        return ConfigurationError(f"{self._place.root}: no such bucket")

    def _refusal(self, message: str) -> ConfigurationError | StorageError:
        """While nothing ever answered, it is what was typed or set that is wrong."""
        return StorageError(message) if self._has_answered else ConfigurationError(message)

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _miss(self, key: str) -> NoReturn:
        raise CorruptStore(f"{self._name(key)} is missing")


class _Contended(OSError):
    """Somebody else is writing the object just now."""


def _version(found: Mapping[str, Any]) -> UpdateVersion:
    """What a condition names: S3 and Azure go by the tag, Google by the version."""
    return cast("UpdateVersion", {name: found[name] for name in ("e_tag", "version") if found[name] is not None})


def _is_final(error: Exception) -> bool:
    """Whether asking again would be answered the same."""
    said = first_cause(str(error))
    status = _STATUS.search(said)
    if status is not None:
        return status[1][0] in "34" and status[1] not in _PASSING
    # A redirect is how S3 says that a bucket is in another region.
    return isinstance(error, ValueError) or "redirect" in said
