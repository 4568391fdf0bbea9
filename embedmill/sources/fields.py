"""From one record (a JSON object, a table row) to a document, by rules that every record format shares. Pure.

Id:
- With `id_field`, that field; missing or null, the record is rejected.
- Otherwise the record's `id`, else its `_id`, else `FILE:LINE`, with the record's number in place of the line for tables
  and Parquet. FILE is the file's name without its folder, `stdin` for standard input.
- A string, or an integer in its decimal form. Not empty, at most 512 bytes of UTF-8, no control characters.

Text:
- The text fields in the order given, joined by a blank line. Missing, null and blank ones are passed over.
- Only strings. What is left must not be blank and must be encodable as UTF-8 (no lone surrogates). NUL is kept.

Metadata:
- Every other field, as canonical JSON, at most 60 KiB: a Milvus JSON field takes 65,536 bytes.
- A value that JSON cannot hold (NaN, infinity) rejects the record, and so does an integer of more than 64 bits, which Milvus
  does not take. Parquet's are converted: `embedmill.sources.parquet`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..documents import MAX_ID_BYTES, Cursor, Reject, SourceDocument, canonical_json
from ..errors import ConfigurationError

MAX_METADATA_BYTES = 60 * 1024
IMPLIED_ID_FIELDS = ("id", "_id")

_CONTROL = re.compile(r"[\x00-\x1f]")
_LONG_DIGITS = re.compile(r"\d{19}")
_SHOWN_FIELDS = 12


@dataclass(frozen=True)
class FieldRules:
    """Which fields make the text, in order, and which one is the id (None: `id`, `_id` or the place).

    Raises ConfigurationError for a rule that no record can meet.
    """

    text_fields: tuple[str, ...] = ("text",)
    id_field: str | None = None

    def __post_init__(self) -> None:
        if not self.text_fields or not all(self.text_fields):
            raise ConfigurationError("name at least one field that holds the text, as in --text-field body")
        if len(set(self.text_fields)) != len(self.text_fields):
            raise ConfigurationError("each --text-field may be named once")
        if self.id_field in self.text_fields:
            raise ConfigurationError(f"field {self.id_field!r} cannot be both the id and the text")

    def check_columns(self, columns: Sequence[str], *, name: str) -> None:
        """Raise ConfigurationError when a table's columns repeat, or lack a field that the rules name."""
        repeated = sorted({column for column in columns if columns.count(column) > 1})
        if repeated:
            raise ConfigurationError(f"{name}: column {repeated[0]!r} occurs more than once; rename one of them")
        here = name_fields(columns)
        for field in self.text_fields:
            if field not in columns:
                raise ConfigurationError(
                    f"{name}: no column {field!r}; columns here: {here} (choose with --text-field)"
                )
        if self.id_field is not None and self.id_field not in columns:
            raise ConfigurationError(
                f"{name}: no column {self.id_field!r}; columns here: {here} (choose with --id-field)"
            )


class RecordRefused(Exception):
    """Why a record cannot become a document, in one sentence."""


def build_document(
    record: dict[str, object], *, rules: FieldRules, fallback_id: str, place: str, cursor: Cursor
) -> SourceDocument | Reject:
    """Apply the rules. `record` is used up: what is left in it becomes the metadata."""
    identity: str | None = None
    try:
        identity = take_id(record, rules=rules, fallback_id=fallback_id)
        text = take_text(record, fields=rules.text_fields)
        metadata = encode_metadata(record) if record else "{}"
    except RecordRefused as refused:
        return Reject(place, str(refused), cursor, identity)
    return SourceDocument(identity, text, metadata, cursor, place)


def take_id(record: dict[str, object], *, rules: FieldRules, fallback_id: str) -> str:
    if rules.id_field is not None:
        value = record.pop(rules.id_field, None)
        if value is None:
            raise RecordRefused(f"no id: field {rules.id_field!r} is missing or null")
        return check_id(value)
    for field in IMPLIED_ID_FIELDS:
        if field in record and field not in rules.text_fields:
            value = record.pop(field)
            if value is not None:
                return check_id(value)
    return check_id(fallback_id)


def check_id(value: object) -> str:
    """The id as a string. Raises RecordRefused for other types and for what a key cannot be."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 4 * MAX_ID_BYTES:
            # Far longer, and Python writes no integer of more than 4,300 digits.
            raise RecordRefused(f"the id is longer than {MAX_ID_BYTES} bytes")
        value = str(value)
    if not isinstance(value, str):
        raise RecordRefused(f"the id must be a string or an integer, not {name_type(value)}")
    if not value:
        raise RecordRefused("the id is empty")
    if _CONTROL.search(value):
        raise RecordRefused("the id has control characters")
    if len(value) * 4 > MAX_ID_BYTES and len(encode_text(value, what="the id")) > MAX_ID_BYTES:
        raise RecordRefused(f"the id is longer than {MAX_ID_BYTES} bytes")
    if not value.isascii():
        encode_text(value, what="the id")
    return value


def take_text(record: dict[str, object], *, fields: tuple[str, ...]) -> str:
    parts = []
    blank = False
    for field in fields:
        value = record.pop(field, None)
        if value is None:
            continue
        if not isinstance(value, str):
            raise RecordRefused(f"field {field!r} holds {name_type(value)}, not text")
        if value and not value.isspace():
            parts.append(value)
        else:
            blank = True
    if not parts:
        raise RecordRefused("the text is empty" if blank else explain_missing_text(record, fields=fields))
    text = parts[0] if len(parts) == 1 else "\n\n".join(parts)
    if not text.isascii():
        encode_text(text, what="the text")
    return text


def explain_missing_text(record: dict[str, object], *, fields: tuple[str, ...]) -> str:
    wanted = f"field {fields[0]!r} is" if len(fields) == 1 else f"fields {', '.join(map(repr, fields))} are"
    here = name_fields([field for field, value in record.items() if isinstance(value, str)] or list(record))
    return f"no text: {wanted} missing; fields here: {here} (choose with --text-field)"


def encode_metadata(record: dict[str, object]) -> str:
    try:
        metadata = canonical_json(record)
    except (TypeError, ValueError, RecursionError):
        raise RecordRefused(f"metadata that JSON cannot hold in {name_unholdable(record)}") from None
    if _LONG_DIGITS.search(metadata) and (field := _name_large_integer(record)):
        raise RecordRefused(f"an integer of more than 64 bits in field {field!r:.80}: write it as a string")
    size = len(metadata) if metadata.isascii() else len(encode_text(metadata, what="the metadata"))
    if size > MAX_METADATA_BYTES:
        largest = max(record, key=lambda field: len(canonical_json({field: record[field]})))
        raise RecordRefused(
            f"the metadata takes {size} bytes, the limit is {MAX_METADATA_BYTES}; the largest field is {largest[:80]!r}"
        )
    return metadata


def _name_large_integer(record: dict[str, object]) -> str | None:
    """The field with an integer that Milvus and most readers of JSON cannot hold, at any depth."""

    def is_large(value: object) -> bool:
        if isinstance(value, dict):
            return any(map(is_large, value.values()))
        if isinstance(value, list | tuple):
            return any(map(is_large, value))
        return isinstance(value, int) and not -(2**63) <= value < 2**64

    return next((field for field, value in record.items() if is_large(value)), None)


def name_unholdable(record: dict[str, object]) -> str:
    for field, value in record.items():
        try:
            canonical_json({field: value})
        except (TypeError, ValueError):
            return f"field {field!r} ({name_type(value)})"
        except RecursionError:
            return f"field {field!r} (nested too deeply)"
    return "a field name"


def encode_text(text: str, *, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RecordRefused(f"{what} has a lone surrogate, which UTF-8 cannot hold") from None


def remark_default_ids(name: str, rule: str) -> list[str]:
    """What the summary says of a source whose records had no ids of their own."""
    unit = "lines" if rule == "FILE:LINE" else "rows"
    return [f"{name}: ids are {rule}: inserting {unit} changes them; name --id-field"]


def name_fields(fields: Sequence[str]) -> str:
    """The fields for a message: at most a dozen, each on one line and cut to a readable length."""
    shown = ", ".join(" ".join(printable(field).split())[:60] for field in fields[:_SHOWN_FIELDS])
    rest = len(fields) - _SHOWN_FIELDS
    return f"{shown} and {rest} more" if rest > 0 else shown or "none"


def name_type(value: object) -> str:
    """What JSON calls the type of a value, for messages."""
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "an array", int: "a number", float: "a number", str: "a string", bytes: "bytes"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold escaped, so that it can be written into messages and reject files."""
    return text.encode("utf-8", "backslashreplace").decode()
