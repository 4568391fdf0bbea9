"""Text and Markdown files: one document per file, in the order of their relative paths.

- The id is the relative path with `/`, the metadata that path and the first Markdown heading (null without one).
- Files and folders whose name starts with a dot are passed over; linked folders are not entered.
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

from ..documents import Cursor, Reject, SourceDocument
from ..errors import ConfigurationError
from .fields import FieldRules, build_document, printable

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".markdown", ".rst")
MAX_FILE_BYTES = 64 * 1024 * 1024

_MARKDOWN = (".md", ".markdown")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?P<title>.*?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_RULES = FieldRules(text_fields=("text",), id_field="id")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of the folder: its path from the root with `/`, size and time of change (0 where it cannot be looked at)."""

    path: str
    size_bytes: int
    modified_ns: int


class FolderSource:
    """Documents of the text files below `root`."""

    def __init__(self, root: Path, *, files: list[TextFile], name: str, push_key: str) -> None:
        self.name = name
        self.push_key = push_key
        self._root = root
        self._files = files
        self._ends = list(accumulate((file.size_bytes for file in files), initial=0))

    def total_bytes(self) -> int:
        return self._ends[-1]

    def position_bytes(self, cursor: Cursor) -> int:
        return self._ends[min(cursor.file, len(self._files))]

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield one document or reject per file, in path order. `Cursor.file` counts the files read."""
        start = after.file if after else 0
        for number in range(start, len(self._files)):
            yield self._read_file(self._files[number].path, cursor=Cursor(file=number + 1))

    def _read_file(self, path: str, *, cursor: Cursor) -> SourceDocument | Reject:
        place = printable(path)
        try:
            text = read_text(self._root / path)
        except OSError as error:
            return Reject(place, f"the file cannot be read: {error.strerror}", cursor)
        except UnicodeDecodeError as error:
            return Reject(place, f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}", cursor)
        if text is None:
            return Reject(place, f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB; split it", cursor)
        title = find_title(text) if path.lower().endswith(_MARKDOWN) else None
        record: dict[str, object] = {"id": path, "text": text, "path": path, "title": title}
        return build_document(record, rules=_RULES, fallback_id=path, place=place, cursor=cursor)


def list_text_files(root: Path) -> list[TextFile]:
    """The text files below `root`, by relative path. Raises ConfigurationError for a folder that cannot be listed."""
    files = []
    for folder, folders, names in os.walk(root, onerror=refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(TEXT_EXTENSIONS):
                file = look_at(Path(folder, name), root=root)
                if file is not None:
                    files.append(file)
    return sorted(files, key=lambda file: file.path)


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


def read_text(path: Path) -> str | None:
    """The text without a byte order mark, or None when it is larger than MAX_FILE_BYTES."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    return None if len(data) > MAX_FILE_BYTES else data.decode("utf-8-sig")


def find_title(text: str) -> str | None:
    """The first `#` heading that is not inside a fenced code block."""
    fenced = False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (heading := _HEADING.match(line)):
            return heading["title"] or None
    return None
