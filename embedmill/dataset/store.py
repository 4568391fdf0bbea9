"""Where a dataset's objects live: what a store must do, and the store of a URL.

Three ways of writing and no other: `create` (exclusive, whole, durable, never changed afterwards), `swap` (compare-and-swap,
for the few small objects that change), `append` (logs). A reader sees an object whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import ConfigurationError
from ..objects import SCHEMES, missing_extra, parse_object_url
from .local_store import LocalStore

Buffer = bytes | bytearray | memoryview


class Store(Protocol):
    """Objects by key; keys are relative and use `/`. Blocking: call it in a thread.

    Every method raises StorageError where the storage refuses or is not to be reached, and ConfigurationError where it
    cannot be what was meant.
    """

    @property
    def url(self) -> str: ...

    @property
    def appends_whole(self) -> bool:
        """Whether an append that fails leaves nothing of itself."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object. Raises CorruptStore when it is missing."""
        ...

    def read_or_none(self, key: str) -> bytes | None: ...

    def read_buffer(self, key: str) -> memoryview | None:
        """The whole object, in memory that the caller may write to; None when it is missing."""
        ...

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Small objects, together where that is faster than one by one."""
        ...

    def open(self, key: str) -> BinaryIO:
        """The object to be read in parts, its end first at best. Raises CorruptStore when it is missing."""
        ...

    def create(self, key: str, parts: Buffer | Sequence[Buffer]) -> None:
        """Create durably, all or nothing. Raises ObjectExists when the key is taken."""
        ...

    def swap(self, key: str, data: bytes, *, expected: bytes | None) -> None:
        """Replace exactly `expected` (None: nothing there). Raises ObjectChanged otherwise."""
        ...

    def append(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Add to the end of a log, whoever else does. A log is read by `read_from` and `read_end` alone."""
        ...

    def read_from(self, key: str, offset: int) -> bytes:
        """What stands behind so many bytes of a log, or of an object; empty when there is nothing."""
        ...

    def read_end(self, key: str, size: int) -> bytes:
        """The last so many bytes of a log, or of an object; all of a shorter one, empty when there is nothing."""
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names of the objects, logs and folders directly below a folder; empty when there is none."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each object and log directly below a folder, by name, in one look; nothing of what is below folders."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Idempotent."""
        ...

    def delete_folder(self, folder: str) -> None:
        """Remove an empty folder, where folders exist; one that is not empty stays."""
        ...


def open_store(url: str) -> Store:
    """The store of a dataset URL. Does not connect. Raises ConfigurationError for one where no dataset can be."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser().absolute())
    if scheme == "file":
        return LocalStore(Path("/" + rest.split("/", 1)[-1] if rest.startswith("localhost/") else rest))
    place = None if scheme in ("http", "https") else parse_object_url(url)
    if place is None:
        known = ", ".join(f"{one}://" for one in SCHEMES if not one.startswith("http"))
        raise ConfigurationError(f"{url}: no dataset can be on {scheme}://; use a folder, or {known}")
    try:
        from .object_store import ObjectStore
    except ImportError:
        raise missing_extra(url) from None
    return ObjectStore(place)
