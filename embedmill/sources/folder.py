"""Text and Markdown files: one document per file, in the order of their relative paths.

- The id is the relative path with `/`, the metadata that path and the first Markdown heading (null without one).
- Files and folders whose name starts with a dot are passed over; linked folders are not entered. Other files are counted.
- A file that is not UTF-8, is blank, too large or cannot be read is a reject.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from ..documents import Cursor, Reject, SourceDocument
from ..errors import ConfigurationError
from .chunks import MARKDOWN_EXTENSIONS
from .fields import FieldRules, build_document, printable

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".markdown", ".rst")
MAX_FILE_BYTES = 64 * 1024 * 1024

_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?P<title>.*?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_RULES = FieldRules(text_fields=("text",), id_field="id")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of the folder: its path from the root with `/`, its size, and what changes with its content.

    The stamp is the time of change in nanoseconds, of an object its tag; both are 0 where it cannot be looked at.
    """

    path: str
    size_bytes: int
    stamp: int | str


class FolderReader(Protocol):
    """Where the files of a folder are read."""

    def read(self, file: TextFile) -> bytes:
        """At most MAX_FILE_BYTES + 1 bytes of it. Raises OSError for one that cannot be read."""
        ...


class FolderSource:
    """Documents of text files, read through `reader`. `skipped`: how many other files the folder has."""

    def __init__(
        self, reader: FolderReader, *, files: list[TextFile], name: str, push_key: str, skipped: int = 0
    ) -> None:
        self.name = name
        self.push_key = push_key
        self._reader = reader
        self._files = files
        self._skipped = skipped
        self._ends = list(accumulate((file.size_bytes for file in files), initial=0))

    def total_bytes(self) -> int:
        return self._ends[-1]

    def position_bytes(self, cursor: Cursor) -> int:
        return self._ends[min(cursor.file, len(self._files))]

    def remarks(self) -> list[str]:
        if not self._skipped:
            return []
        files = "1 file that is" if self._skipped == 1 else f"{self._skipped:,} files that are"
        return [f"{self.name}: skipped {files} not text or Markdown"]

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield one document or reject per file, in path order. `Cursor.file` counts the files read."""
        start = after.file if after else 0
        for number in range(start, len(self._files)):
            yield self._read_file(self._files[number], cursor=Cursor(file=number + 1))

    def _read_file(self, file: TextFile, *, cursor: Cursor) -> SourceDocument | Reject:
        path = file.path
        place = printable(path)
        try:
            data = self._reader.read(file)
            text = data.decode("utf-8-sig")
        except OSError as error:
            return Reject(place, f"the file cannot be read: {error.strerror}", cursor)
        except UnicodeDecodeError as error:
            if len(error.object) <= MAX_FILE_BYTES:
                reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
                return Reject(place, reason, cursor)
            # The cut may have gone through a letter: what is wrong with it is its size.
            data, text = error.object, ""
        if len(data) > MAX_FILE_BYTES:
            return Reject(place, f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB; split it", cursor)
        title = find_title(text) if path.lower().endswith(MARKDOWN_EXTENSIONS) else None
        record: dict[str, object] = {"id": path, "text": text, "path": path, "title": title}
        return build_document(record, rules=_RULES, fallback_id=path, place=place, cursor=cursor)


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, file: TextFile) -> bytes:
        with (self._root / file.path).open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)


def is_text_name(name: str) -> bool:
    return name.lower().endswith(TEXT_EXTENSIONS)


def list_text_files(root: Path) -> tuple[list[TextFile], int]:
    """The text files below `root`, by relative path, and how many other files there are.

    Raises ConfigurationError for a folder that cannot be listed.
    """
    files, others = [], 0
    for folder, folders, names in os.walk(root, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            file = look_at(Path(folder, name), root=root) if is_text_name(name) else None
            if file is None:
                others += 1
            else:
                files.append(file)
    return sorted(files, key=lambda file: file.path), others


def look_at(path: Path, *, root: Path) -> TextFile | None:
    """The file, or None for what is no regular file (a pipe, a device)."""
    relative = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError:
        # A dangling link or a file that just went: reading it makes a reject, which says so.
        return TextFile(relative, 0, 0)
    return TextFile(relative, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def refuse_folder(error: OSError) -> None:
    raise ConfigurationError(
        f"{printable(str(error.filename))}: this folder cannot be listed: {error.strerror}"
    ) from None


def find_title(text: str) -> str | None:
    """The first `#` heading that is not inside a fenced code block."""
    fenced = False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (heading := _HEADING.match(line)):
            return heading["title"] or None
    return None
