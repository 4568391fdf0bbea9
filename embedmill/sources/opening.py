"""From a SOURCE argument of the command line to a source that can be read and resumed.

    FILE.jsonl .ndjson .json     JSON Lines          (also .gz, .zst)
    FILE.csv .tsv                tables with header  (also .gz, .zst)
    FILE.parquet .pq
    FILE.txt .text .md .markdown .rst, or a folder of them
    -                            JSON Lines from standard input
    pydoc:                       the documentation that the running Python carries

Everything that can be known before reading is checked here and raised as ConfigurationError.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..documents import Cursor, Reject, SourceDocument, hash16
from ..errors import ConfigurationError
from .fields import FieldRules, printable
from .folder import TEXT_EXTENSIONS, FolderSource, TextFile, list_text_files, look_at
from .jsonl import JsonLinesSource
from .lines import LineFile, StandardInput

FORMAT_VERSION = 1
PYDOC = "pydoc:"

JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_EXTENSIONS = (".parquet", ".pq")
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst), .parquet, " + ", ".join(TEXT_EXTENSIONS)


class Source(Protocol):
    """Documents in a fixed order, resumable at the cursor of any of them.

    name: as the user typed it, `-` for standard input; push_key: 32 hex digits that change when the content may have changed
    (path, size, time of change, rules, format version; random for standard input).
    """

    name: str
    push_key: str

    def total_bytes(self) -> int | None:
        """Size for progress, None when unknown."""
        ...

    def position_bytes(self, cursor: Cursor) -> int:
        """How far the cursor is, in the unit of `total_bytes`."""
        ...

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield what stands behind `after`, streaming. Blocking: call it in a thread.

        Raises ConfigurationError when what was opened has gone.
        """
        ...


def open_source(argument: str, *, rules: FieldRules) -> Source:
    """The source that `argument` names. Raises ConfigurationError with what to do instead."""
    if argument == "-":
        return open_standard_input(rules=rules)
    if argument == PYDOC:
        return open_pydoc()
    if "://" in argument:
        raise ConfigurationError(
            f"{argument}: sources are local; download it first, or pipe it in: curl URL | embedmill push -"
        )
    path = Path(argument)
    try:
        absolute = path.resolve()
        if not path.exists():
            raise ConfigurationError(f"{printable(argument)}: no such file or folder")
        if path.is_dir():
            return open_folder(absolute, name=argument)
        if not path.is_file():
            raise ConfigurationError(f"{printable(argument)}: not a regular file; pipe it into `-`")
        return open_file(absolute, name=argument, rules=rules)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{printable(argument)!r}: cannot be opened: {reason}") from None


def open_standard_input(*, rules: FieldRules) -> Source:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigurationError(
            "standard input is a terminal; pipe JSON Lines into it: cat docs.jsonl | embedmill push -"
        )
    return JsonLinesSource(StandardInput(), rules=rules, push_key=uuid.uuid4().hex)


def open_pydoc() -> Source:
    from .pydoc import PydocSource

    return PydocSource(name=PYDOC, push_key=hash_parts(PYDOC, platform.python_version()))


def open_folder(root: Path, *, name: str) -> Source:
    files = list_text_files(root)
    if not files:
        raise ConfigurationError(
            f"{printable(name)}: no text files ({' '.join(TEXT_EXTENSIONS)}) in this folder; name other files one by one"
        )
    parts = [[printable(file.path), file.size_bytes, file.modified_ns] for file in files]
    return FolderSource(root, files=files, name=name, push_key=hash_parts("folder", printable(str(root)), parts))


def open_file(path: Path, *, name: str, rules: FieldRules) -> Source:
    require_readable(path, name=name)
    status = path.stat()
    key = hash_parts(printable(str(path)), status.st_size, status.st_mtime_ns, rules.text_fields, rules.id_field)
    extension = path.suffix.lower()
    if extension in TEXT_EXTENSIONS:
        return open_text_file(path, name=name, push_key=key)
    if extension in PARQUET_EXTENSIONS:
        from .parquet import ParquetSource

        return ParquetSource(path, name=name, rules=rules, push_key=key)
    if extension in COMPRESSIONS:
        extension = Path(path.stem).suffix.lower()
    if extension in JSON_EXTENSIONS:
        file = LineFile(path, name=name)
        check_head(file, one_value=extension == ".json")
        return JsonLinesSource(file, rules=rules, push_key=key)
    if extension in DELIMITERS:
        from .tabular import TabularSource

        file = LineFile(path, name=name)
        check_head(file, one_value=False)
        return TabularSource(file, rules=rules, push_key=key, delimiter=DELIMITERS[extension])
    raise ConfigurationError(f"{printable(name)}: unknown kind of file; known are {KNOWN}")


def open_text_file(path: Path, *, name: str, push_key: str) -> Source:
    file = look_at(path, root=path.parent) or TextFile(path.name, 0, 0)
    return FolderSource(path.parent, files=[file], name=name, push_key=push_key)


def require_readable(path: Path, *, name: str) -> None:
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"{printable(name)}: permission denied; make it readable for this user")


def check_head(file: LineFile, *, one_value: bool) -> None:
    """Refuse binary files, and with `one_value` (.json) those that are one JSON value over many lines."""
    head = file.head()
    if b"\x00" in head:
        raise ConfigurationError(f"{file.name}: looks binary (NUL bytes in its first 8 KiB); text must be UTF-8")
    first, _, rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if one_value and first.startswith(b"["):
        raise ConfigurationError(
            f"{file.name}: is a JSON array; make JSON Lines of it first: jq -c '.[]' FILE > FILE.jsonl"
        )
    if one_value and first.strip() == b"{" and rest:
        raise ConfigurationError(
            f"{file.name}: holds JSON over several lines; make JSON Lines of it first: jq -c . FILE > FILE.jsonl"
        )


def hash_parts(*parts: object) -> str:
    return hash16(json.dumps([FORMAT_VERSION, *parts])).hex()
