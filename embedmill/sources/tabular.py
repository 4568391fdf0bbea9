"""CSV and TSV: one document per row, named by the header.

The place of a row is the line on which it starts; without an id field its id is `FILE:RECORD`, counted from 1 behind the
header. Quoted fields may hold newlines. A row with another number of columns than the header is a reject.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ..documents import Cursor, Reject, SourceDocument
from ..errors import ConfigurationError
from .fields import FieldRules, build_document, remark_default_ids
from .lines import MAX_LINE_BYTES, LineFile, StreamBroken, explain_bad_utf8, is_cut


class TabularSource:
    """Documents of a CSV (`delimiter` comma) or TSV file.

    Raises ConfigurationError at once when the header is missing or lacks a field that the rules name.
    """

    def __init__(self, file: LineFile, *, rules: FieldRules, push_key: str, delimiter: str) -> None:
        self.name = file.name
        self.push_key = push_key
        self._file = file
        self._rules = rules
        self._delimiter = delimiter
        self._default_ids = False
        self._columns = self._read_header()
        rules.check_columns(self._columns, name=file.name)

    def total_bytes(self) -> int:
        return self._file.total_bytes()

    def position_bytes(self, cursor: Cursor) -> int:
        return self._file.position_bytes(cursor)

    def remarks(self) -> list[str]:
        return remark_default_ids(self.name, "FILE:RECORD") if self._default_ids else []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield documents and rejects in row order, starting right behind `after`."""
        label = self._file.label
        rows = _Rows(self._file, after=after, delimiter=self._delimiter)
        if after is None:
            next(rows, None)
        record = after.record if after else 0
        try:
            for row in rows:
                record += 1
                cursor = Cursor(0, record, rows.offset, rows.line)
                yield self._build(row, rows=rows, cursor=cursor)
        except StreamBroken as broken:
            reason = f"the file cannot be read from here on: {broken}"
            yield Reject(f"{label}:{rows.line + 1}", reason, Cursor(0, record + 1, rows.offset, rows.line + 1))

    def _build(self, row: list[str], *, rows: _Rows, cursor: Cursor) -> SourceDocument | Reject:
        label, columns = self._file.label, self._columns
        place = f"{label}:{rows.first_line}"
        if rows.damage:
            return Reject(place, rows.damage, cursor)
        if len(row) != len(columns):
            return Reject(place, f"the row has {len(row)} columns, the header has {len(columns)}", cursor)
        fields: dict[str, object] = dict(zip(columns, row, strict=True))
        fallback_id = f"{label}:{cursor.record}"
        document = build_document(fields, rules=self._rules, fallback_id=fallback_id, place=place, cursor=cursor)
        self._default_ids = self._default_ids or document.id == fallback_id
        return document

    def _read_header(self) -> list[str]:
        rows = _Rows(self._file, after=None, delimiter=self._delimiter)
        try:
            header = next(rows, None)
        except StreamBroken as broken:
            raise ConfigurationError(f"{self.name}: the header cannot be read: {broken}") from None
        if header is None:
            raise ConfigurationError(f"{self.name}: is empty; its first line must name the columns")
        if rows.damage:
            raise ConfigurationError(f"{self.name}: the header is unreadable: {rows.damage}")
        return header


class _Rows:
    """Rows with their places. `damage` says why the latest row is none; `line` and `offset` stand behind it."""

    def __init__(self, file: LineFile, *, after: Cursor | None, delimiter: str) -> None:
        # The module's limit is global and far below what one document may be.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        self.line = after.line if after else 0
        self.offset = after.offset if after else 0
        self.first_line = 0
        self.damage: str | None = None
        self._lines = file.lines(after=after)
        self._reader = csv.reader(self._decoded(), delimiter=delimiter)

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> list[str]:
        while True:
            self.first_line, self.damage = self.line + 1, None
            try:
                row = next(self._reader)
            except csv.Error as error:
                self.damage = f"not readable as CSV: {error}"
                return []
            if row or self.damage:
                return row

    def _decoded(self) -> Iterator[str]:
        for line, offset in self._lines:
            self.line, self.offset = self.line + 1, offset
            if is_cut(line):
                self.damage = f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                self.damage = self.damage or f"line {self.line} is {explain_bad_utf8(error)}"
                # The row must be parsed all the same, or the rest of a quoted field would pass for rows.
                text = line.decode(errors="replace")
            yield text
