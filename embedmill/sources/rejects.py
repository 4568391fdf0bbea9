"""The reject file of a push: JSON Lines of `place`, `reason`, `id` and the cursor behind the record.

Rejects behind the cursor at which a push resumes are met again, so `resume` drops them first: every reject stands in the
file once, whenever the process was killed. Memory is bounded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..documents import Cursor, Reject
from .fields import printable


class RejectFile:
    """Rejects at `path`, appended in source order. Blocking I/O.

    The file is made with the first reject. `count` is what it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._file: IO[str] | None = None

    def resume(self, after: Cursor | None) -> int:
        """Keep what is not behind `after` (None: nothing), drop the rest in one atomic step. Returns how many stay."""
        self.close()
        self.count = 0
        if not self.path.exists():
            return 0
        if after is None:
            self.path.unlink()
            return 0
        rewritten = self.path.with_name(self.path.name + ".rewritten")
        with rewritten.open("w", encoding="utf-8") as file:
            for line in self._lines_until(after):
                file.write(line)
                self.count += 1
            file.flush()
            os.fsync(file.fileno())
        rewritten.replace(self.path)
        return self.count

    def add(self, reject: Reject) -> None:
        """Append one reject. It is durable after the next `flush`."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        entry = {
            "place": printable(reject.place),
            "reason": printable(reject.reason),
            "id": None if reject.id is None else printable(reject.id),
            "cursor": reject.cursor.as_dict(),
        }
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.count += 1

    def flush(self) -> None:
        """Make what was added durable: call it before the cursor behind it is committed."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def _lines_until(self, after: Cursor) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                cursor = read_cursor(line)
                if cursor is not None and cursor <= after:
                    yield line


def read_cursor(line: str) -> Cursor | None:
    """The cursor of an entry; None for a line that a crash cut short."""
    if not line.endswith("\n"):
        return None
    try:
        stored = json.loads(line)["cursor"]
        # `part` came later than the others: files of earlier releases lack it.
        names = ("file", "record", "offset", "line", *(("part",) if "part" in stored else ()))
        return Cursor(**{name: stored[name] for name in names})
    except (ValueError, TypeError, KeyError):
        return None
