"""What an inbox refused, listed in the dataset's folder `rejects`, so that nobody has to ask Redis for it.

A reject stands there once, although it may be met twice, or by two schedulers: what the end of the file has is not added
again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.work_lock import dataset_folder
from embedmill.documents import Reject
from embedmill.errors import StorageError
from embedmill.sources.fields import printable

_TAIL_BYTES = 4 * 1024 * 1024
_MOST_BYTES = 64 * 1024 * 1024


def keep_refusals(dataset: Dataset, inbox: str, rejects: Sequence[Reject]) -> None:
    """Append to `rejects/inbox-NAME.jsonl`, durably. At 64 MiB the file becomes `.old`, and the one before goes.

    Raises StorageError for a full disk.
    """
    if not rejects:
        return
    path = dataset_folder(dataset) / "rejects" / f"inbox-{inbox}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".inbox-{inbox}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_size > _MOST_BYTES:
                path.replace(path.with_name(path.name + ".old"))
            with path.open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                *whole, torn = file.read().split(b"\n")
                present = set(whole)
                lines = dict.fromkeys(_line(reject) for reject in rejects)
                added = b"".join(line + b"\n" for line in lines if line not in present)
                # Whoever was killed while writing left a line without its end; what it said comes again.
                file.write(b"\n" + added if torn and added else added)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _line(reject: Reject) -> bytes:
    entry = {
        "place": printable(reject.place),
        "reason": printable(reject.reason),
        "id": None if reject.id is None else printable(reject.id),
        "cursor": reject.cursor.as_dict(),
    }
    return json.dumps(entry, ensure_ascii=False).encode()
