"""Parquet: one document per row; the place and the implied id are `FILE:RECORD`, counted from 1.

Dates and times become ISO 8601, decimals, durations and UUIDs strings; in metadata also NaN, infinities and times outside of
the years 1 to 9999 null, and bytes base64. Rows are read a few MiB at a time. A row group that cannot be decoded is one
reject, and the next group is read.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..documents import Cursor, Reject, SourceDocument
from ..errors import ConfigurationError
from .fields import IMPLIED_ID_FIELDS, FieldRules, build_document, first_line, remark_default_ids
from .files import SourceFile

BATCH_BYTES = 8 * 1024 * 1024
MAX_BATCH_ROWS = 2048


class UnreadableValue:
    """Stands for a cell that Arrow cannot turn into a Python value; no field rule accepts it."""


class UnheldTime(UnreadableValue):
    """A time outside of the years 1 to 9999, which Arrow has and Python and ISO 8601 have not."""


class ParquetSource:
    """Documents of a Parquet file.

    Raises ConfigurationError at once when the file is damaged or lacks a column that the rules name.
    """

    def __init__(self, file: SourceFile, *, rules: FieldRules, push_key: str) -> None:
        self.name = file.name
        self.push_key = push_key
        self._file = file
        self._label = file.label
        self._rules = rules
        self._identity = {*rules.text_fields, *((rules.id_field,) if rules.id_field else IMPLIED_ID_FIELDS)}
        self._default_ids = False
        with self._open() as opened:
            rules.check_columns(opened.schema_arrow.names, name=file.name)
            self._rows = opened.metadata.num_rows

    def total_bytes(self) -> int:
        return self._file.size_bytes

    def position_bytes(self, cursor: Cursor) -> int:
        """Bytes of the file in proportion to the rows read."""
        return self._file.size_bytes * cursor.record // self._rows if self._rows else 0

    def remarks(self) -> list[str]:
        return remark_default_ids(self.name, "FILE:RECORD") if self._default_ids else []

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield documents and rejects in row order, starting right behind `after`."""
        skip = after.record if after else 0
        first = 0
        with self._open() as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > skip:
                    yield from self._read_group(file, group=group, first=first, skip=skip)
                first += rows

    def _read_group(
        self, file: pq.ParquetFile, *, group: int, first: int, skip: int
    ) -> Iterator[SourceDocument | Reject]:
        metadata = file.metadata.row_group(group)
        record = first
        try:
            for batch in file.iter_batches(batch_size=choose_batch_rows(metadata), row_groups=[group]):
                if record + batch.num_rows > skip:
                    start = max(skip - record, 0)
                    yield from self._build(batch.slice(start), record=record + start)
                record += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            end = first + metadata.num_rows
            reason = f"the rows up to {end} cannot be decoded: {first_line(error)}"
            if end > skip:
                yield Reject(f"{self._label}:{max(record, skip) + 1}", reason, Cursor(0, end))

    def _build(self, batch: pa.RecordBatch, *, record: int) -> Iterator[SourceDocument | Reject]:
        names = batch.schema.names
        columns = [
            to_python(column) if name in self._identity else [to_metadata(value) for value in to_python(column)]
            for name, column in zip(names, batch.columns, strict=True)
        ]
        for values in zip(*columns, strict=True):
            record += 1
            place = f"{self._label}:{record}"
            fields = dict(zip(names, values, strict=True))
            document = build_document(
                fields, rules=self._rules, fallback_id=place, place=place, cursor=Cursor(0, record)
            )
            self._default_ids = self._default_ids or document.id == place
            yield document

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with self._file.open() as raw:
            try:
                file = pq.ParquetFile(pa.PythonFile(raw, mode="r"))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigurationError(f"{self.name}: cannot be read as Parquet: {first_line(error)}") from None
            yield file


def choose_batch_rows(metadata: pq.RowGroupMetaData) -> int:
    """Rows that take about BATCH_BYTES in memory."""
    bytes_per_row = max(metadata.total_byte_size // max(metadata.num_rows, 1), 1)
    return min(max(BATCH_BYTES // bytes_per_row, 1), MAX_BATCH_ROWS)


def to_python(column: pa.Array[pa.Scalar[Any]]) -> list[object]:
    """The values of a column as JSON can hold them, where it can."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        column = column.cast(pa.timestamp("us", tz=kind.tz), safe=False)
    try:
        values: list[object] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        values = [to_python_value(value) for value in column]
    if (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
    ):
        return values
    return [to_plain(value) for value in values]


def to_python_value(value: pa.Scalar[Any]) -> object:
    try:
        return value.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return UnheldTime() if pa.types.is_temporal(value.type) else UnreadableValue()


def to_metadata(value: object) -> object:
    """A value of `to_python` as JSON can hold it: NaN, infinities and far times as null, bytes as base64."""
    if isinstance(value, UnheldTime):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: to_metadata(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_metadata(item) for item in value]
    return value


def to_plain(value: object) -> object:
    """Dates, decimals and their like as strings, through lists and structs."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value
