"""A small index of the document log on disk: id to versions, hashes and places, and how far each push has been read.

A cache and nothing more: whatever it holds is derived from `documents/`, and a missing, old or broken one is built anew.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ..documents import KEYLESS_PREFIX, Cursor
from ..errors import StorageError
from .passages import ShardOrigin

_Value = TypeVar("_Value")

_SCHEMA_VERSION = 5
_SCHEMA = """
CREATE TABLE IF NOT EXISTS passages (
  id TEXT NOT NULL, version INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL,
  text_hash BLOB, metadata_hash BLOB, deleted INTEGER NOT NULL, "group" TEXT, push INTEGER NOT NULL,
  PRIMARY KEY (id, version)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS passages_by_group ON passages ("group") WHERE "group" IS NOT NULL;
CREATE TABLE IF NOT EXISTS pushes (
  number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT, cursor TEXT, shard INTEGER NOT NULL, row INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
  key TEXT PRIMARY KEY, record INTEGER NOT NULL, shard INTEGER NOT NULL, kept INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batches_by_shard ON batches (shard) WHERE kept = 0;
CREATE TABLE IF NOT EXISTS shards (
  shard INTEGER PRIMARY KEY, rows INTEGER NOT NULL, replaces INTEGER NOT NULL, batches INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS shards_with_batches ON shards (shard) WHERE batches > 0;
CREATE TABLE IF NOT EXISTS retirements (number INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS rowless (one INTEGER PRIMARY KEY CHECK (one = 1), read_bytes INTEGER NOT NULL);
"""
_COLUMNS = ("id", "version", "text_hash", "metadata_hash", "deleted", "group")
INDEXED_COLUMNS = list(_COLUMNS)
_LOOKUP_BLOCK = 500
# SQLite does not say which.
_REMEDY = "see to free space on its disk, and to its permissions"
# Batches that were given no key have one made of their message's id. It is asked for while the message may still be in the
# inbox, so those of as many shards, counting the shards that came through the inbox, are enough.
_KEPT_SHARDS = 1024

_ADD_BATCH = (
    "INSERT INTO batches (key, record, shard, kept) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
    " SET record = max(record, excluded.record), shard = excluded.shard"
)


@dataclass(frozen=True, slots=True)
class Known:
    """The highest version of an id in the log."""

    version: int
    shard: int
    row: int
    text_hash: bytes
    metadata_hash: bytes
    deleted: bool
    push_key: str
    group: str | None = None


class DatasetIndex:
    """The index of one dataset; one writer or reader per object, several processes may share the file."""

    def __init__(self, path: Path, *, dataset_id: str) -> None:
        self._path = path
        self._dataset_id = dataset_id
        self._connection = self._open()

    def close(self) -> None:
        self._connection.close()

    @property
    def next_shard(self) -> int:
        """The first shard number that the index has not absorbed."""
        last = self._execute("SELECT max(shard) FROM shards")[0][0]
        return 0 if last is None else int(last) + 1

    def absorb(self, shard: int, table: pa.Table, origin: ShardOrigin) -> bool:
        """Add a shard of the log; False when somebody already did. Shards are absorbed in their order."""
        with self._transaction():
            if self.next_shard != shard:
                return False
            pushes = self._remember_pushes(origin, rows=table.num_rows)
            # A replacement counts when a retirement has put it in place, and until then the old rows are the place.
            if not origin.replaces:
                self._add_passages(shard, table, pushes=pushes)
            self._execute(
                "INSERT INTO shards (shard, rows, replaces, batches) VALUES (?, ?, ?, ?)",
                (shard, table.num_rows, len(origin.replaces), len(origin.batches)),
            )
            self._remember_batches(origin)
        return True

    @property
    def retirements(self) -> int:
        """How many retirements were absorbed."""
        return int(self._execute("SELECT count(*) FROM retirements")[0][0])

    def absorb_retirement(
        self, number: int, *, old: Mapping[int, pa.Table], new: Mapping[int, tuple[pa.Table, ShardOrigin]]
    ) -> bool:
        """Move rows to the shards that replace theirs, and forget those that are in none; False when somebody did.

        old, new: what is left of the documents of each retired shard, and those of its replacements. A place elsewhere stays
        as it is: that row tries again what failed here. What was erased, old or new, has no rows to name: of an old one, all
        that was not moved is forgotten.
        """
        with self._transaction():
            if self.retirements != number:
                return False
            for shard, (table, origin) in new.items():
                keys = dict(enumerate(zip(*_lists(table, ("id", "version")), strict=True)))
                self._connection.executemany(
                    "UPDATE passages SET shard = ?, row = ? WHERE id = ? AND version = ? AND shard = ?",
                    ((shard, row, *keys[row], place[0]) for row, place in origin.carried.items() if row in keys),
                )
                self._add_passages(shard, table, pushes=[0] * table.num_rows, over="IGNORE")
            for shard, table in old.items():
                self._connection.executemany(
                    "DELETE FROM passages WHERE id = ? AND version = ? AND shard = ?",
                    ((*key, shard) for key in zip(*_lists(table, ("id", "version")), strict=True)),
                )
            self._forget_erased([shard for shard, table in old.items() if not table.num_rows])
            self._connection.executemany(
                "UPDATE shards SET rows = 0, replaces = 0 WHERE shard = ?", ((shard,) for shard in old)
            )
            self._connection.executemany("UPDATE shards SET replaces = 0 WHERE shard = ?", ((shard,) for shard in new))
            self._execute("INSERT INTO retirements (number) VALUES (?)", (number,))
        return True

    @property
    def rowless_bytes(self) -> int:
        """How much of the record of batches that made no row was absorbed."""
        found = self._execute("SELECT read_bytes FROM rowless")
        return int(found[0][0]) if found else 0

    def absorb_rowless(self, batches: Sequence[tuple[str, int]], *, begin: int, end: int) -> bool:
        """Add batches, as key and record, that stand between two places of that record; False when somebody did."""
        with self._transaction():
            if self.rowless_bytes != begin:
                return False
            shard = max(0, self.next_shard - 1)
            self._connection.executemany(_ADD_BATCH, (_batch_row(key, record, shard) for key, record in batches))
            self._execute("INSERT OR REPLACE INTO rowless (one, read_bytes) VALUES (1, ?)", (end,))
        return True

    def clear(self) -> None:
        """Forget everything."""
        with self._transaction():
            for table in ("passages", "pushes", "batches", "shards", "retirements", "rowless"):
                self._execute(f"DELETE FROM {table}")

    def newest(self, ids: Sequence[str]) -> dict[str, Known]:
        """The highest version in the log of each id that it has."""
        found: dict[str, Known] = {}
        for block in _blocks(ids):
            marks = ",".join("?" * len(block))
            rows = self._execute(
                'SELECT p.id, max(p.version), p.shard, p.row, p.text_hash, p.metadata_hash, p.deleted, k.key, p."group"'
                f" FROM passages p LEFT JOIN pushes k ON k.number = p.push WHERE p.id IN ({marks}) GROUP BY p.id",
                block,
            )
            for id_, version, shard, row, text_hash, metadata_hash, deleted, key, group in rows:
                found[id_] = Known(version, shard, row, text_hash, metadata_hash, bool(deleted), key or "", group)
        return found

    def members(self, groups: Sequence[str]) -> dict[str, set[str]]:
        """By group, the ids of its passages in any of their versions."""
        found: dict[str, set[str]] = {}
        if not self._execute('SELECT 1 FROM passages WHERE "group" IS NOT NULL LIMIT 1'):
            return found
        for block in _blocks(groups):
            marks = ",".join("?" * len(block))
            statement = f'SELECT "group", id FROM passages WHERE "group" IS NOT NULL AND "group" IN ({marks})'
            for group, id_ in self._execute(statement, block):
                found.setdefault(group, set()).add(id_)
        return found

    def batches(self, keys: Sequence[str]) -> dict[str, int]:
        """How many documents of each batch of the inbox the log holds, of those that it knows."""
        found: dict[str, int] = {}
        for block in _blocks(keys):
            marks = ",".join("?" * len(block))
            found.update(self._execute(f"SELECT key, record FROM batches WHERE key IN ({marks})", block))
        return found

    def versions(self, ids: Sequence[str]) -> dict[str, list[tuple[int, int, int]]]:
        """Every (version, shard, row) of each id, highest version first."""
        found: dict[str, list[tuple[int, int, int]]] = {}
        for block in _blocks(ids):
            marks = ",".join("?" * len(block))
            rows = self._execute(
                f"SELECT id, version, shard, row FROM passages WHERE id IN ({marks}) ORDER BY id, version DESC", block
            )
            for id_, version, shard, row in rows:
                found.setdefault(id_, []).append((version, shard, row))
        return found

    def unchanged_before(self, push_key: str, ids: Sequence[str]) -> set[str]:
        """Which of these ids this process has found unchanged in this push before."""
        found: set[str] = set()
        for block in _blocks(ids):
            marks = ",".join("?" * len(block))
            rows = self._execute(f"SELECT id FROM unchanged WHERE push = ? AND id IN ({marks})", [push_key, *block])
            found.update(row[0] for row in rows)
        return found

    def remember_unchanged(self, found: Iterable[tuple[str, str]]) -> None:
        """Note (push key, id) for `unchanged_before`. Kept beside the index, in a temporary file of this process."""
        with self._explained():
            self._connection.execute("BEGIN")
            self._connection.executemany("INSERT OR IGNORE INTO unchanged (push, id) VALUES (?, ?)", found)
            self._connection.execute("COMMIT")

    def cursor(self, push_key: str) -> Cursor | None:
        """How far the log has read a push; None for one that it does not know."""
        rows = self._execute("SELECT cursor FROM pushes WHERE key = ?", (push_key,))
        return Cursor(**json.loads(rows[0][0])) if rows and rows[0][0] is not None else None

    def reading(self, push_key: str, *, beside: Collection[str] = (), anew: bool = False) -> tuple[str, Cursor | None]:
        """Under which key, and from where, a source is to be read now.

        It goes on where the log left it, unless another push has written since: then what it says may be newer than what
        the log holds, and it is read anew, under a key of that occasion. `beside`: keys that are read together with it;
        `anew`: it is to be read from its beginning whatever has been written.
        """
        known = self._execute(
            "SELECT key, cursor, shard, row FROM pushes WHERE key = ? OR key LIKE ? ORDER BY shard DESC, row DESC LIMIT 1",
            (push_key, f"{push_key}.%"),
        )
        if not known:
            return push_key, None
        key, cursor, shard, row = known[0]
        later = self._execute("SELECT key FROM pushes WHERE shard > ? OR (shard = ? AND row > ?)", (shard, shard, row))
        through_inbox = self._execute("SELECT 1 FROM shards WHERE batches > 0 AND shard > ? LIMIT 1", (shard,))
        if anew or through_inbox or any(other.partition(".")[0] not in beside for (other,) in later):
            return f"{push_key}.{self.next_shard}", None
        return key, Cursor(**json.loads(cursor))

    def newest_rows(self) -> Iterator[tuple[str, int, int, int]]:
        """(id, version, shard, row) of the highest version of every id, in the order of ids."""
        with self._explained():
            yield from self._connection.execute(
                "SELECT id, max(version), shard, row FROM passages GROUP BY id ORDER BY id"
            )

    def newest_rows_by_shard(self) -> dict[int, int]:
        """How many ids have their highest version in each shard; shards without any are missing."""
        return dict(
            self._execute(
                "SELECT shard, count(*) FROM (SELECT max(version), shard FROM passages GROUP BY id) GROUP BY shard"
            )
        )

    def shred(self) -> None:
        """Leave nothing in the file's journal of what was deleted."""
        self._execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def unplaced(self) -> list[int]:
        """Replacements that are in no retirement."""
        return [shard for (shard,) in self._execute("SELECT shard FROM shards WHERE replaces > 0 ORDER BY shard")]

    @property
    def rows(self) -> int:
        """Rows of the log that the index has absorbed, but for retired ones, and for replacements that are not in place."""
        return int(self._execute("SELECT coalesce(sum(rows), 0) FROM shards WHERE replaces = 0")[0][0])

    def _add_passages(self, shard: int, table: pa.Table, *, pushes: Sequence[int], over: str = "REPLACE") -> None:
        self._connection.executemany(
            f'INSERT OR {over} INTO passages (id, version, text_hash, metadata_hash, deleted, "group",'
            " shard, row, push) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((*value, shard, row, pushes[row]) for row, value in enumerate(zip(*_lists(table, _COLUMNS), strict=True))),
        )

    def _forget_erased(self, shards: Sequence[int]) -> None:
        """Rows of shards that were absorbed before they were erased. It looks at every row, and only where there are any."""
        absorbed = [s for s in shards if self._execute("SELECT 1 FROM shards WHERE shard = ? AND rows > 0", (s,))]
        for block in _blocks(absorbed):
            self._execute(f"DELETE FROM passages WHERE shard IN ({','.join('?' * len(block))})", block)

    def _remember_pushes(self, origin: ShardOrigin, *, rows: int) -> list[int]:
        """Note how far each push was read; the number of the push that each row came from (0: none)."""
        pushes = [0] * rows
        for source in origin.sources:
            self._execute(
                "INSERT INTO pushes (key, name, cursor, shard, row) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
                " SET cursor = excluded.cursor, shard = excluded.shard, row = excluded.row",
                (source.push_key, source.name, json.dumps(source.cursor.as_dict()), origin.shard, source.first_row),
            )
            number = self._execute("SELECT number FROM pushes WHERE key = ?", (source.push_key,))[0][0]
            pushes[source.first_row :] = [int(number)] * (rows - source.first_row)
        return pushes

    def _remember_batches(self, origin: ShardOrigin) -> None:
        if not origin.batches:
            return
        self._connection.executemany(_ADD_BATCH, (_batch_row(b.key, b.record, origin.shard) for b in origin.batches))
        self._execute(
            "DELETE FROM batches WHERE kept = 0 AND shard <="
            " (SELECT shard FROM shards WHERE batches > 0 ORDER BY shard DESC LIMIT 1 OFFSET ?)",
            (_KEPT_SHARDS,),
        )

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One process at a time: SQLite gives up at once, without its timeout, when two change the journal mode.
            with self._path.parent.with_name(".index.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return self._connect_or_rebuild()
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}; {_REMEDY}") from error
        except sqlite3.DatabaseError as error:
            raise StorageError(f"cannot open the index {self._path}: {error}; {_REMEDY}") from error

    def _connect_or_rebuild(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError:
            # A disk that refuses, or a lock: no reason to take it away from whoever else uses it.
            raise
        except (sqlite3.DatabaseError, _Outdated):
            shutil.rmtree(self._path.parent, ignore_errors=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_SCHEMA)
        connection.execute("PRAGMA temp_store = FILE")
        # What was purged is not to be found in pages that are free.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("CREATE TEMP TABLE unchanged (push TEXT, id TEXT, PRIMARY KEY (push, id)) WITHOUT ROWID")
        stamp = f"{_SCHEMA_VERSION}:{self._dataset_id}"
        connection.execute("CREATE TABLE IF NOT EXISTS stamp (value TEXT PRIMARY KEY)")
        connection.execute("INSERT INTO stamp SELECT ? WHERE NOT EXISTS (SELECT 1 FROM stamp)", (stamp,))
        if connection.execute("SELECT value FROM stamp").fetchone()[0] != stamp:
            raise _Outdated

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._explained():
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"cannot use the index {self._path}: {error}; {_REMEDY}") from error
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"the index {self._path} is damaged ({error}): delete the folder {self._path.parent} and run the same "
                "command again, which builds it anew"
            ) from error


class _Outdated(Exception):
    """The file is of another dataset or of another release."""


def _lists(table: pa.Table, columns: Sequence[str]) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in columns]


def _batch_row(key: str, record: int, shard: int) -> tuple[str, int, int, int]:
    return key, record, shard, int(not key.startswith(KEYLESS_PREFIX))


def _blocks(values: Sequence[_Value]) -> Iterable[list[_Value]]:
    return (list(values[start : start + _LOOKUP_BLOCK]) for start in range(0, len(values), _LOOKUP_BLOCK))
