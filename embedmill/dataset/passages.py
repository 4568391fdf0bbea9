"""The document log: what was admitted as one shard, as one Parquet object.

Row r of `documents/K.parquet` is the passage whose vector is row K * shard_rows + r. The file's own metadata (key
`embedmill`) names its sources, with the place to go on reading from, and the rows whose vectors are carried over.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..documents import Cursor
from ..errors import CorruptStore
from .layout import FORMAT_VERSION, check_version, known

SCHEMA_FIELDS: list[pa.Field[Any]] = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("metadata", pa.string()),
    pa.field("version", pa.int64(), nullable=False),
    pa.field("deleted", pa.bool_(), nullable=False),
    pa.field("group", pa.string()),
    pa.field("text_hash", pa.binary(16)),
    pa.field("metadata_hash", pa.binary(16)),
    pa.field("job", pa.string(), nullable=False),
]
SCHEMA = pa.schema(SCHEMA_FIELDS)
_METADATA_KEY = b"embedmill"


@dataclass(frozen=True, slots=True)
class Passage:
    """A row of the document log."""

    id: str
    text: str
    metadata: str
    version: int
    text_hash: bytes
    metadata_hash: bytes
    deleted: bool = False
    group: str | None = None


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """How far a push had been read when a shard was closed; its rows begin at `first_row` and end where the next begin."""

    push_key: str
    name: str
    cursor: Cursor
    first_row: int

    def as_dict(self) -> dict[str, Any]:
        cursor = self.cursor.as_dict()
        return {"kind": "push", "key": self.push_key, "name": self.name, "first_row": self.first_row, "cursor": cursor}


@dataclass(frozen=True, slots=True)
class BatchPosition:
    """How much of a batch of the inbox the log holds: its first `record` documents. Its rows begin at `first_row`, and end
    where those of the next batch begin; a batch that changed nothing has none."""

    key: str
    record: int
    first_row: int


@dataclass(frozen=True, slots=True)
class ShardOrigin:
    """The document file's own metadata.

    carried: row -> (shard, row) whose text was the same, so that its vector can be taken over; retries: row -> (shard, row)
    that failed, and is tried again under the same id and version; batches: what came through the inbox, in the order of its
    stream; replaces: the shards
    that this one was written to replace (it does not count before a retirement says so); erased: the shard was retired
    and its rows are gone; the object stays, empty, since the log is dense.
    """

    shard: int
    job: str
    sources: tuple[SourcePosition, ...] = ()
    carried: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    replaces: tuple[int, ...] = ()
    erased: bool = False
    retries: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    batches: tuple[BatchPosition, ...] = ()


def passages_table(passages: Sequence[Passage], *, origin: ShardOrigin) -> pa.Table:
    """The rows of one shard, with their origin in the table's metadata."""
    columns: dict[str, list[Any]] = {
        "id": [p.id for p in passages],
        "text": [p.text for p in passages],
        "metadata": [p.metadata for p in passages],
        "version": [p.version for p in passages],
        "deleted": [p.deleted for p in passages],
        "group": [p.group for p in passages],
        "text_hash": [p.text_hash for p in passages],
        "metadata_hash": [p.metadata_hash for p in passages],
        "job": [origin.job] * len(passages),
    }
    return pa.Table.from_pydict(columns, schema=SCHEMA.with_metadata({_METADATA_KEY: _origin_to_json(origin)}))


def encode_passages(table: pa.Table) -> bytes:
    """The Parquet object of one shard. Equal input gives equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=3)
    return buffer.getvalue()


def decode_passages(data: bytes, *, name: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, ShardOrigin]:
    """The rows, or some columns of them, and their origin. Raises CorruptStore, naming the object."""
    try:
        # A shard is too small for what threads cost.
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            table = file.read(columns=list(columns) if columns else None, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptStore(f"{name} is not readable Parquet: {error}") from error
    raw = (table.schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise CorruptStore(f"{name} has no embedmill metadata")
    return table, _origin_from_json(raw, name=name)


@dataclass(frozen=True, slots=True)
class PassagesFooter:
    """What the end of a Parquet object tells. text_bytes: of its texts, before compression; max_version: None where the
    writer left no statistics."""

    rows: int
    text_bytes: int
    origin: ShardOrigin
    max_version: int | None


def read_footer(source: BinaryIO, *, name: str) -> PassagesFooter:
    """Reads nothing else. Raises CorruptStore, naming the object."""
    try:
        metadata = pq.read_metadata(source)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        text_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        statistics = [column.statistics for column in columns if column.path_in_schema == "version"]
        versions = [one.max if one is not None and one.has_min_max else None for one in statistics]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptStore(f"{name} is not readable Parquet: {error}") from error
    raw = (metadata.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise CorruptStore(f"{name} has no embedmill metadata")
    stated = [version for version in versions if version is not None]
    max_version = max(stated, default=0) if len(stated) == len(versions) else None
    return PassagesFooter(metadata.num_rows, text_bytes, _origin_from_json(raw, name=name), max_version)


def _origin_to_json(origin: ShardOrigin) -> bytes:
    record = {
        "format_version": FORMAT_VERSION,
        "shard": origin.shard,
        "job": origin.job,
        "sources": [source.as_dict() for source in origin.sources],
        "batches": [[batch.key, batch.record, batch.first_row] for batch in origin.batches],
        "carried": [[row, *place] for row, place in sorted(origin.carried.items())],
        "replaces": list(origin.replaces),
        "retries": [[row, *place] for row, place in sorted(origin.retries.items())],
        "erased": origin.erased,
    }
    return json.dumps(record, ensure_ascii=False).encode()


def _origin_from_json(raw: bytes, *, name: str) -> ShardOrigin:
    try:
        record = json.loads(raw)
        check_version(record, name=name)
        sources = tuple(
            SourcePosition(
                source["key"], source["name"], Cursor(**known(Cursor, source["cursor"])), source["first_row"]
            )
            for source in record["sources"]
            if source["kind"] == "push"
        )
        carried = {row: (shard, old_row) for row, shard, old_row in record["carried"]}
        retries = {row: (shard, old_row) for row, shard, old_row in record.get("retries", [])}
        batches = tuple(BatchPosition(*batch) for batch in record.get("batches", []))
        replaces, erased = tuple(record["replaces"]), bool(record["erased"])
        return ShardOrigin(record["shard"], record["job"], sources, carried, replaces, erased, retries, batches)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptStore(f"the embedmill metadata of {name} is damaged: {error}") from error
