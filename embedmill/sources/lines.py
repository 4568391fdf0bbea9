"""Lines of bytes from a file or standard input (plain, gzip, Zstandard), each with the place where it ends.

- Memory is bounded: a line beyond `MAX_LINE_BYTES` is cut there and the rest of it is passed over.
- A UTF-8 byte order mark at the start is not part of the first line.
- A plain file is resumed by seeking; a compressed one by passing over the lines already read.
- A stream that breaks off (truncated, damaged) hands out every whole line before the break, then raises `StreamBroken`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, Protocol, cast

from ..documents import Cursor
from ..errors import ConfigurationError
from .fields import first_line
from .files import SourceFile

MAX_LINE_BYTES = 64 * 1024 * 1024
READ_BYTES = 1024 * 1024
SNIFF_BYTES = 8192

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

# Arrow loses what it has decompressed of a block when the stream breaks inside it: small blocks lose little.
_ZSTD_BLOCK_BYTES = 16 * 1024


class StreamBroken(Exception):
    """The stream cannot be read further; the message says why."""


class LineStream(Protocol):
    """Where lines come from. `label` is the short name that ids and places carry."""

    name: str
    label: str

    def lines(self, *, after: Cursor | None = None) -> Iterator[tuple[bytes, int]]: ...

    def total_bytes(self) -> int | None: ...

    def position_bytes(self, cursor: Cursor) -> int: ...


class LineFile:
    """A file of lines, decompressed by its last extension."""

    def __init__(self, file: SourceFile) -> None:
        self.name = file.name
        self.label = file.label
        self.compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix.lower())
        self._file = file
        self._compressed_position = 0

    def lines(self, *, after: Cursor | None = None) -> Iterator[tuple[bytes, int]]:
        """Yield (line with its newline, offset behind it in bytes; 0 when compressed), right behind `after`.

        Raises: ConfigurationError when the file cannot be opened, StreamBroken when it breaks off.
        """
        with self._file.open() as raw, decompress(raw, self.compression) as stream:
            if self.compression is None:
                start = after.offset if after else 0
                stream.seek(start)
                yield from split_lines(stream, start=start)
                return
            yield from self._decompressed_lines(stream, raw=raw, skip=after.line if after else 0)

    def head(self) -> bytes:
        """The first bytes, decompressed: at most SNIFF_BYTES; fewer when the stream breaks off in them.

        Raises ConfigurationError when the file cannot be read, or is not what its extension says.
        """
        collected = b""
        with self._file.open() as raw, decompress(raw, self.compression) as stream:
            try:
                while len(collected) < SNIFF_BYTES and (block := stream.read1(SNIFF_BYTES - len(collected))):
                    collected += block
            except (OSError, zlib.error, ValueError) as error:
                if not collected and not is_truncation(error):
                    raise ConfigurationError(
                        f"{self.name}: cannot be read as {self.compression}: {first_line(error)}"
                    ) from None
            except EOFError:
                pass
        return collected

    def total_bytes(self) -> int:
        return self._file.size_bytes

    def position_bytes(self, cursor: Cursor) -> int:
        """Bytes of the file behind the cursor; of a compressed one, what the current reading has taken from it."""
        return cursor.offset if self.compression is None else self._compressed_position

    def _decompressed_lines(
        self, stream: io.BufferedReader, *, raw: io.BufferedReader, skip: int
    ) -> Iterator[tuple[bytes, int]]:
        lines = split_lines(stream, start=0)
        try:
            for _ in range(skip):
                next(lines)
        except (StreamBroken, StopIteration):
            return
        for line, _ in lines:
            self._compressed_position = raw.tell()
            yield line, 0


class StandardInput:
    """Lines of standard input, read once: a later call of `lines` goes on where the earlier one stopped.

    Compressed input is known by its first bytes. Offsets count what is decompressed.
    """

    name = "-"
    label = "stdin"

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._raw = stream or sys.stdin.buffer
        self._stream: io.BufferedReader | None = None
        self._offset = 0

    def lines(self, *, after: Cursor | None = None) -> Iterator[tuple[bytes, int]]:
        """As `LineFile.lines`. Raises ConfigurationError when `after` is not where the stream stands."""
        if (after.offset if after else 0) != self._offset:
            raise ConfigurationError(
                "standard input cannot be read again; put it into a file to be able to go on later"
            )
        if self._stream is None:
            try:
                self._stream = decompress_by_magic(self._raw)
            except OSError as error:
                raise StreamBroken(first_line(error)) from None
        for line, offset in split_lines(self._stream, start=self._offset):
            self._offset = offset
            yield line, offset

    def total_bytes(self) -> None:
        return None

    def position_bytes(self, cursor: Cursor) -> int:
        return cursor.offset


def decompress(raw: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    """A reader of what `raw` holds, which is `raw` itself without a compression."""
    if compression == "gzip":
        return io.BufferedReader(_GzipBlocks(raw), READ_BYTES)
    if compression == "zstd":
        return io.BufferedReader(_ZstdBlocks(raw), READ_BYTES)
    return raw


def decompress_by_magic(stream: BinaryIO) -> io.BufferedReader:
    """The same for a stream that cannot be sought and has no name. Waits for its first bytes."""
    head = stream.read(max(map(len, _MAGIC)))
    compression = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return decompress(io.BufferedReader(_Headed(head, stream), READ_BYTES), compression)


def split_lines(stream: io.BufferedReader, *, start: int) -> Iterator[tuple[bytes, int]]:
    """Yield (line with its newline, offset behind it). A cut line is MAX_LINE_BYTES + 1 long.

    Raises StreamBroken.
    """
    readline = stream.readline
    limit = MAX_LINE_BYTES + 1
    offset = start
    try:
        while line := readline(limit):
            size = len(line)
            if size == limit and line[-1:] != b"\n":
                size += pass_over_line(stream)
            if offset == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            offset += size
            yield line, offset
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise StreamBroken(first_line(error)) from None


def pass_over_line(stream: io.BufferedReader) -> int:
    """Read to the end of the line and return how many bytes that were."""
    passed = 0
    while rest := stream.readline(READ_BYTES):
        passed += len(rest)
        if rest.endswith(b"\n"):
            break
    return passed


def is_cut(line: bytes) -> bool:
    return len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")


def explain_bad_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {error.start + 1}"


def is_truncation(error: Exception) -> bool:
    return "truncated" in str(error).lower()


class _Headed(io.RawIOBase):
    """A stream with the bytes that were read of it put back in front."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = cast(io.BufferedReader, stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._stream.read1(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _GzipBlocks(io.RawIOBase):
    """`GzipFile` block by block: read through its own buffering, it would drop good data when the stream breaks off."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._file = gzip.GzipFile(fileobj=raw, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _ZstdBlocks(io.RawIOBase):
    """Zstandard frames through Arrow's codec, which every pyarrow wheel has."""

    def __init__(self, raw: io.BufferedReader) -> None:
        import pyarrow as pa

        if not pa.Codec.is_available("zstd"):
            raise ConfigurationError(
                "this pyarrow has no Zstandard codec: install pyarrow's own wheel, or unpack the file first"
            )
        self._empty = not raw.peek(1)
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._empty:
            return 0
        data = self._stream.read(min(len(buffer), _ZSTD_BLOCK_BYTES))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.close()
        super().close()
