"""An object of a store as a file that can be sought: its end is there at once, the rest comes by ranges.

A Parquet file says at its end what is where, so a footer costs one request.
"""

from __future__ import annotations

import io
from collections.abc import Callable

TAIL_BYTES = 64 * 1024


class ObjectReader(io.RawIOBase):
    """size: of the object, whose last bytes are `tail`; get: the bytes from one place to before another."""

    def __init__(self, size: int, tail: bytes, *, get: Callable[[int, int], bytes | memoryview]) -> None:
        self._size = size
        self._tail = tail
        self._get = get
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        begin = self._position
        end = min(begin + len(buffer), self._size)
        if end <= begin:
            return 0
        tail_begin = self._size - len(self._tail)
        inside = begin >= tail_begin
        data = self._tail[begin - tail_begin : end - tail_begin] if inside else self._get(begin, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
