"""The bytes of a source: a file of this machine, or an object of a store, which is read by ranges.

Both are opened for reading as often as needed, can be sought, and have a `stamp` that changes when the content does.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigurationError
from ..object_reader import ObjectReader
from ..objects import ObjectUrl, explained
from .fields import printable

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore

BUFFER_BYTES = 1024 * 1024
RANGE_BYTES = 4 * 1024 * 1024


class SourceFile(Protocol):
    """path: for its extensions; label: the short name that ids and places carry; stamp: for the push key."""

    name: str
    path: Path
    label: str
    size_bytes: int
    stamp: tuple[object, ...]

    def open(self) -> io.BufferedReader:
        """A buffered, seekable reader. Raises ConfigurationError when there is none any more."""
        ...


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.name = name
        self.path = path
        self.label = printable(path.name)
        status = path.stat()
        self.size_bytes = status.st_size
        self.stamp: tuple[object, ...] = (printable(str(path)), status.st_size, status.st_mtime_ns)

    def open(self) -> io.BufferedReader:
        try:
            return io.BufferedReader(self.path.open("rb", buffering=0), BUFFER_BYTES)
        except OSError as error:
            raise ConfigurationError(f"{self.name}: cannot be opened: {error.strerror}") from None


class ObjectFile:
    """An object of a store. Its readers hold one range of RANGE_BYTES in memory."""

    def __init__(self, store: ObjectStore, meta: ObjectMeta, *, url: ObjectUrl) -> None:
        self.name = url.url
        self.path = Path(meta["path"])
        self.label = printable(self.path.name)
        self.size_bytes = meta["size"]
        self.stamp: tuple[object, ...] = stamp_object(meta, url=url)
        self._store = store
        self._meta = meta
        self._url = url

    def open(self) -> io.BufferedReader:
        raw = ObjectReader(self._meta["size"], b"", get=self._get)
        return io.BufferedReader(raw, RANGE_BYTES)

    def _get(self, start: int, end: int) -> memoryview:
        """All of one version. Raises what `explained` raises."""
        with explained(self._url):
            import obstore

            options: GetOptions = {"range": (start, end)}
            # A weak tag never equals itself where a precondition is checked.
            if (tag := self._meta["e_tag"]) and not tag.startswith("W/"):
                options["if_match"] = tag
            found = obstore.get(self._store, self._meta["path"], options=options)
            return memoryview(found.bytes())


def stamp_object(meta: ObjectMeta, *, url: ObjectUrl) -> tuple[object, ...]:
    """What names this content: the store's own tag, or where it has none, the time of change."""
    return (url.root, meta["path"], meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())
