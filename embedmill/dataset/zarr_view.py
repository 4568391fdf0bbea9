"""The vector array as zarr-python opens it, through the dataset's own store, with the shape of a snapshot. Read-only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from . import layout
from .store import Store as DatasetStore
from .store import open_store
from .zarr_metadata import raise_shape

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

_FOLDER = "vectors.zarr"


def open_vectors(store: DatasetStore, *, rows: int) -> zarr.Array[Any]:
    """The array of the dataset in `store`, with at least so many rows: what is published may lag behind what counts."""
    return zarr.open_array(_VectorStore(store, rows), path="vectors", mode="r", zarr_format=3)


class _VectorStore(Store):
    """`vectors.zarr` of a dataset. Picklable: it opens its place again."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, store: DatasetStore, rows: int) -> None:
        super().__init__(read_only=True)
        self._url = store.url
        self._rows = rows
        self._store = store

    def __reduce__(self) -> tuple[Callable[[str, int], _VectorStore], tuple[str, int]]:
        return _reopened, (self._url, self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _VectorStore) and (self._url, self._rows) == (other._url, other._rows)

    def __hash__(self) -> int:
        return hash((self._url, self._rows))

    def __repr__(self) -> str:
        return f"{self._url}/{_FOLDER}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        data = await asyncio.to_thread(self._read, f"{_FOLDER}/{key}", byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._store.exists, f"{_FOLDER}/{key}")

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for folder in ("", "vectors", "vectors/c"):
            async for name in self.list_dir(folder):
                key = f"{folder}/{name}".lstrip("/") + ("/0" if folder == "vectors/c" else "")
                if key not in ("vectors", "vectors/c") and key.startswith(prefix):
                    yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self._store.names, f"{_FOLDER}/{prefix}".rstrip("/")):
            yield name

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        if wanted is None:
            data = self._store.read_or_none(key)
            if key == layout.ZARR_ARRAY_KEY and data is not None:
                return raise_shape(data, rows=self._rows, name=f"{self._url}/{key}") or data
            return data
        if not self._store.exists(key):
            return None
        with self._store.open(key) as file:
            match wanted:
                case RangeByteRequest():
                    file.seek(wanted.start)
                    return file.read(wanted.end - wanted.start)
                case OffsetByteRequest():
                    file.seek(wanted.offset)
                case SuffixByteRequest():
                    file.seek(0, 2)
                    file.seek(max(0, file.tell() - wanted.suffix))
            return file.read()


def _reopened(url: str, rows: int) -> _VectorStore:
    return _VectorStore(open_store(url), rows)
