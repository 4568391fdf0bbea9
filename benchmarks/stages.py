"""Which stage of the pipe a Python stack is in. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

IDLE = "idle"
IMPORTS = "start-up: imports"
REST = "event loop, thread hand-over"

# The part of the path, the function (empty: any), the stage. The innermost frame that one of them fits decides.
_RULES = (
    ("/embedmill/sources/", "", "read: lines, JSON, field rules"),
    ("/scheduler/intake.py", "_take_block", "read: lines, JSON, field rules"),
    ("/embedmill/documents.py", "", "admit: versions, hashes"),
    ("/scheduler/admission.py", "", "admit: versions, hashes"),
    ("/scheduler/judging.py", "", "admit: versions, hashes"),
    ("/scheduler/intake.py", "", "admit: versions, hashes"),
    ("/embedmill/dataset/index.py", "", "admit: index (SQLite)"),
    ("/embedmill/dataset/passages.py", "decode_passages", "worker: read documents back"),
    ("/embedmill/dataset/passages.py", "", "admit: Parquet"),
    ("/embedmill/dataset/store.py", "", "store: write, fsync, read"),
    ("/embedmill/dataset/shard.py", "", "commit: shard bytes, checksums"),
    ("/embedmill/dataset/", "", "dataset: markers, listings"),
    ("/scheduler/queue.py", "", "queue"),
    ("/embedmill/connection.py", "", "queue"),
    ("/embedmill/redis_clients.py", "", "queue"),
    ("/scheduler/embedded.py", "", "queue"),
    ("/scheduler/reconcile.py", "", "queue"),
    ("/redis/", "", "queue"),
    ("/worker/embedders/", "", "embed"),
    ("/worker/attempts.py", "", "embed"),
    ("/worker/embedding.py", "_prepare", "worker: read documents back"),
    ("/worker/checkpoints.py", "", "worker: checkpoints"),
    ("/worker/spend.py", "", "worker: checkpoints"),
    ("/worker/commit.py", "", "commit: shard bytes, checksums"),
    ("/worker/", "", "worker: pack, gate, results"),
    ("/embedmill/commands/", "", "command"),
)
_WAITING = (("/selectors.py", "select"), ("/threading.py", "wait"), ("/threading.py", "_wait_for_tstate_lock"))


def find_stage(frame: FrameType) -> str:
    """The stage of a thread's innermost frame; IDLE when it waits for work."""
    if _fits(frame, *_WAITING[0]) or _fits(frame, *_WAITING[1]) or _fits(frame, *_WAITING[2]):
        return IDLE
    stack = list(_outwards(frame))
    if any(one.f_code.co_name == "_find_and_load" for one in stack):
        return IMPORTS
    for one in stack:
        for part, function, stage in _RULES:
            if _fits(one, part, function):
                return stage
    return REST


def name_function(frame: FrameType) -> str:
    """`folder/file.py:function`, for people."""
    return f"{'/'.join(frame.f_code.co_filename.rsplit('/', 2)[-2:])}:{frame.f_code.co_name}"


def _fits(frame: FrameType, part: str, function: str) -> bool:
    return part in frame.f_code.co_filename and function in ("", frame.f_code.co_name)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
