"""From a SOURCE argument of the command line to a source that can be read and resumed.

    FILE.jsonl .ndjson .json     JSON Lines          (also .gz, .zst)
    FILE.csv .tsv                tables with header  (also .gz, .zst)
    FILE.parquet .pq
    FILE.txt .text .md .markdown .rst, or a folder of them
    s3:// gs:// az:// https://   the same in an object store: `embedmill.sources.objects`
    -                            JSON Lines from standard input, also compressed
    pydoc:                       the documentation that the running Python carries

Everything that can be known before reading is checked here and raised as ConfigurationError.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ..documents import Cursor, Reject, SourceDocument, hash16
from ..errors import ConfigurationError
from ..objects import SCHEMES, ObjectUrl, parse_object_url
from .chunks import ChunkedSource, Chunking
from .fields import FieldRules, printable
from .files import LocalFile, SourceFile
from .folder import TEXT_EXTENSIONS, FolderSource, LocalFolder, TextFile, is_text_name, list_text_files, look_at
from .jsonl import JsonLinesSource
from .lines import LineFile, StandardInput
from .objects import find_object, list_object, list_objects

FORMAT_VERSION = 2
PYDOC = "pydoc:"

JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_EXTENSIONS = (".parquet", ".pq")
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv (each also .gz or .zst), .parquet, " + ", ".join(TEXT_EXTENSIONS)


class Source(Protocol):
    """Documents in a fixed order, resumable at the cursor of any of them.

    name: as the user typed it, `-` for standard input; push_key: 32 hex digits that change when the content may have changed
    (path, size, time of change, rules, chunking, format version; random for standard input).
    """

    name: str
    push_key: str

    def total_bytes(self) -> int | None:
        """Size for progress, None when unknown."""
        ...

    def position_bytes(self, cursor: Cursor) -> int:
        """How far the cursor is, in the unit of `total_bytes`."""
        ...

    def remarks(self) -> list[str]:
        """What the summary is to say of it, a line each; complete when it has been read."""
        ...

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield what stands behind `after`, streaming. Blocking: call it in a thread.

        Raises ConfigurationError when what was opened has gone.
        """
        ...


def open_source(argument: str, *, rules: FieldRules, chunking: Chunking | None = None) -> Source:
    """The source that `argument` names, split into passages with `chunking`.

    Raises ConfigurationError with what to do instead, StorageError for an object store that cannot be reached.
    """
    source = open_whole(argument, rules=rules)
    if chunking is None:
        return source
    key = hash_parts("chunk", source.push_key, chunking.stamp)
    return ChunkedSource(source, chunking=chunking, markdown=isinstance(source, FolderSource), push_key=key)


def open_whole(argument: str, *, rules: FieldRules) -> Source:
    if argument == "-":
        return open_standard_input(rules=rules)
    if argument == PYDOC:
        return open_pydoc()
    if url := parse_object_url(argument):
        return open_url(url, rules=rules)
    if "://" in argument:
        raise ConfigurationError(
            f"{argument}: such addresses are not read ({', '.join(f'{scheme}://' for scheme in SCHEMES)} are); "
            "download it first, or pipe it in: curl URL | embedmill push -"
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
        require_readable(absolute, name=argument)
        if is_text_name(absolute.name):
            return open_text_file(absolute, name=argument)
        return open_records(LocalFile(absolute, name=argument), rules=rules)
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
    files, others = list_text_files(root)
    if not files:
        raise ConfigurationError(
            f"{printable(name)}: no text files ({' '.join(TEXT_EXTENSIONS)}) in this folder; name other files one by one"
        )
    key = hash_parts("folder", printable(str(root)), stamp_files(files))
    return FolderSource(LocalFolder(root), files=files, name=name, push_key=key, skipped=others)


def open_text_file(path: Path, *, name: str) -> Source:
    files = [look_at(path, root=path.parent) or TextFile(path.name, 0, 0)]
    key = hash_parts("file", printable(str(path)), stamp_files(files))
    return FolderSource(LocalFolder(path.parent), files=files, name=name, push_key=key)


def open_url(url: ObjectUrl, *, rules: FieldRules) -> Source:
    file = None if url.is_folder else find_object(url)
    if file is not None and not is_text_name(file.path.name):
        return open_records(file, rules=rules)
    folder, files, others = list_object(file) if file else list_objects(url)
    key = hash_parts("folder", url.url, stamp_files(files))
    return FolderSource(folder, files=files, name=url.url, push_key=key, skipped=others)


def open_records(file: SourceFile, *, rules: FieldRules) -> Source:
    """A file of records, by its extension."""
    key = hash_parts(file.stamp, rules.text_fields, rules.id_field)
    extension = file.path.suffix.lower()
    if extension in PARQUET_EXTENSIONS:
        from .parquet import ParquetSource

        return ParquetSource(file, rules=rules, push_key=key)
    if extension in COMPRESSIONS:
        extension = Path(file.path.stem).suffix.lower()
    if extension in JSON_EXTENSIONS:
        lines = LineFile(file)
        check_head(lines, one_value=extension == ".json")
        return JsonLinesSource(lines, rules=rules, push_key=key)
    if extension in DELIMITERS:
        from .tabular import TabularSource

        lines = LineFile(file)
        check_head(lines, one_value=False)
        return TabularSource(lines, rules=rules, push_key=key, delimiter=DELIMITERS[extension])
    raise ConfigurationError(f"{printable(file.name)}: unknown kind of file; known are {KNOWN}")


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


def stamp_files(files: Sequence[TextFile]) -> list[object]:
    """All that decides what a folder's documents are."""
    return [[printable(file.path), file.size_bytes, file.stamp] for file in files]


def hash_parts(*parts: object) -> str:
    return hash16(json.dumps([FORMAT_VERSION, *parts])).hex()
