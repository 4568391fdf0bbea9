"""A dataset in a folder. Durable by fsync, exclusive by hard link; what is seen under its name is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np

from ..errors import CorruptStore, ObjectChanged, ObjectExists, StorageError

if TYPE_CHECKING:
    from .store import Buffer

_TEMPORARY = ".tmp"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStore:
    """A folder. Durable by fsync of the file and of its folder; exclusive by hard link.

    anchor: an object without which nothing is made here any more: a mount that is gone leaves an empty folder in its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.anchor: str | None = None

    @property
    def url(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        return self.root / key

    @property
    def appends_whole(self) -> bool:
        return False

    def read(self, key: str) -> bytes:
        data = self.read_or_none(key)
        if data is None:
            raise CorruptStore(f"{self.path(key)} is missing")
        return data

    def read_or_none(self, key: str) -> bytes | None:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _refuse("read", self.path(key), error)

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.read_or_none(key) for key in keys]

    def read_buffer(self, key: str) -> memoryview | None:
        try:
            with self.path(key).open("rb", buffering=0) as file:
                # Not a bytearray: that would be filled with zeros first.
                buffer = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8).data
                size = 0
                while size < len(buffer) and (read := file.readinto(buffer[size:])):
                    size += read
                return buffer[:size]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _refuse("read", self.path(key), error)

    def open(self, key: str) -> BinaryIO:
        try:
            return self.path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptStore(f"{self.path(key)} is missing") from None
        except OSError as error:
            _refuse("read", self.path(key), error)

    def create(self, key: str, parts: Buffer | Sequence[Buffer]) -> None:
        path = self.path(key)
        try:
            temporary = self._write_temporary(path, parts)
            try:
                self._publish(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
        except OSError as error:
            _refuse("write", path, error)

    def swap(self, key: str, data: bytes, *, expected: bytes | None) -> None:
        path = self.path(key)
        try:
            with self._locked():
                if self.read_or_none(key) != expected:
                    raise ObjectChanged(f"{path} was changed by somebody else")
                temporary = self._write_temporary(path, data)
                try:
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
                _sync_folder(path.parent)
        except OSError as error:
            _refuse("write", path, error)

    def append(self, key: str, data: bytes, *, durable: bool = False) -> None:
        path = self.path(key)
        try:
            self._make_folders(path.parent)
            descriptor = os.open(_parts_of(path)[-1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                if durable:
                    os.fsync(descriptor)
                    _sync_folder(path.parent)
            finally:
                os.close(descriptor)
        except OSError as error:
            _refuse("write", path, error)

    def read_from(self, key: str, offset: int) -> bytes:
        path = self.path(key)
        try:
            found = []
            for part in _parts_of(path):
                size = part.stat().st_size
                if size > offset:
                    with part.open("rb") as file:
                        file.seek(offset)
                        found.append(file.read())
                        size = offset + len(found[-1])
                offset = max(0, offset - size)
            return b"".join(found)
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            _refuse("read", path, error)

    def read_end(self, key: str, size: int) -> bytes:
        path = self.path(key)
        try:
            end = sum(part.stat().st_size for part in _parts_of(path))
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as error:
            _refuse("read", path, error)
        return self.read_from(key, max(0, end - size))[-size:]

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(e.name for e in os.scandir(self.path(folder)) if not e.name.endswith(_TEMPORARY))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            _refuse("list", self.path(folder), error)

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            return {
                name: sum(part.stat().st_size for part in _parts_of(self.path(folder) / name))
                for name in self.names(folder)
            }
        except OSError as error:
            _refuse("list", self.path(folder), error)

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def delete(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            _refuse("delete", self.path(key), error)

    def delete_folder(self, folder: str) -> None:
        with suppress(OSError):
            self.path(folder).rmdir()

    def sweep(self, *, older_than_s: float) -> int:
        """Remove what killed writers left half-written; how many there were."""
        limit = time.time() - older_than_s
        removed = 0
        for path in self.root.rglob(f".*{_TEMPORARY}"):
            try:
                if path.stat().st_mtime < limit:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def _write_temporary(self, path: Path, parts: Buffer | Sequence[Buffer]) -> Path:
        self._make_folders(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
        buffers = [parts] if isinstance(parts, (bytes, bytearray, memoryview)) else parts
        try:
            with temporary.open("xb") as file:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _make_folders(self, folder: Path) -> None:
        """Like mkdir -p, and each new folder durable in the one that holds it."""
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        if missing and self.anchor is not None and not self.exists(self.anchor):
            raise StorageError(f"{self.path(self.anchor)} is gone: was its disk unmounted, or the folder moved away?")
        folder.mkdir(parents=True, exist_ok=True)
        for part in missing:
            _sync_folder(part.parent)

    def _publish(self, temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise ObjectExists(f"{path} exists already") from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self._locked():
                if path.exists():
                    raise ObjectExists(f"{path} exists already") from error
                temporary.rename(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._make_folders(self.root)
        with (self.root / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _parts_of(path: Path) -> list[Path]:
    """The files of a log: one, but where the dataset was copied from an object store, which keeps logs in parts."""
    return sorted(part for part in path.iterdir() if part.name.isdecimal()) if path.is_dir() else [path]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(verb: str, path: Path, error: OSError) -> NoReturn:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StorageError(f"cannot {verb} {path}: {reason}; free some space and run the same command again") from error
    raise StorageError(f"cannot {verb} {path}: {reason}; see to the path and its permissions") from error
