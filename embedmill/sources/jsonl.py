"""JSON Lines: one object per line, from a file or standard input.

A line that is no document (not UTF-8, not JSON, not an object, refused by the field rules) is a reject, and the next line is
read. Blank lines are passed over. A stream that breaks off ends the source with one reject.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..documents import Cursor, Reject, SourceDocument
from .fields import FieldRules, build_document, name_type, remark_default_ids
from .lines import MAX_LINE_BYTES, LineStream, StreamBroken, explain_bad_utf8, is_cut

_scan = json.JSONDecoder().raw_decode


class LineRefused(Exception):
    """Why a line is not a JSON object, in one sentence."""


class JsonLinesSource:
    """Documents of a line stream, one per JSON object. Field rules: `embedmill.sources.fields`."""

    def __init__(self, stream: LineStream, *, rules: FieldRules, push_key: str) -> None:
        self.name = stream.name
        self.push_key = push_key
        self._stream = stream
        self._rules = rules
        self._default_ids = False

    def total_bytes(self) -> int | None:
        return self._stream.total_bytes()

    def position_bytes(self, cursor: Cursor) -> int:
        return self._stream.position_bytes(cursor)

    def remarks(self) -> list[str]:
        return remark_default_ids(self.name, "FILE:LINE") if self._default_ids else []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield documents and rejects in line order, starting right behind `after`."""
        rules, label = self._rules, self._stream.label
        record, line_number = (after.record, after.line) if after else (0, 0)
        offset = after.offset if after else 0
        try:
            for line, offset in self._stream.lines(after=after):
                line_number += 1
                if line.isspace() or not line:
                    continue
                record += 1
                place = f"{label}:{line_number}"
                cursor = Cursor(0, record, offset, line_number)
                try:
                    fields = parse_object(line)
                except LineRefused as refused:
                    yield Reject(place, str(refused), cursor)
                else:
                    document = build_document(fields, rules=rules, fallback_id=place, place=place, cursor=cursor)
                    self._default_ids = self._default_ids or document.id == place
                    yield document
        except StreamBroken as broken:
            reason = f"the file cannot be read from here on: {broken}"
            yield Reject(f"{label}:{line_number + 1}", reason, Cursor(0, record + 1, offset, line_number + 1))


def parse_object(line: bytes) -> dict[str, object]:
    """The object on a line. Raises LineRefused."""
    try:
        text = line.strip().decode()
        value, end = _scan(text)
    except (ValueError, RecursionError) as error:
        raise LineRefused(explain_bad_line(error, line=line)) from None
    if end != len(text):
        raise LineRefused(f"not valid JSON: more text after the first value (column {end + 1})")
    if not isinstance(value, dict):
        raise LineRefused(f"not a JSON object but {name_type(value)}")
    return value


def explain_bad_line(error: ValueError | RecursionError, *, line: bytes) -> str:
    if is_cut(line):
        return f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB"
    if isinstance(error, UnicodeDecodeError):
        return explain_bad_utf8(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.pos + 1})"
    return "not readable JSON: " + (
        "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
    )
