"""Processes that are measured: each says when it is ready, starts when it is told to, and ends with one JSON object.

Moments are `time.monotonic()`, which every process of one machine shares. Only the standard library is imported here, since
the processes of other queues run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parent.parent
_READY = "ready"
_LIMIT_S = 120.0


class ChildFailed(Exception):
    """A measured process ended without its result; the message is what it said last."""


class Child:
    """`PYTHON -m MODULE JSON` as a context; leaving it ends the process, and so does the end of `limit_s`."""

    def __init__(
        self, module: str, options: Mapping[str, Any], *, python: str = sys.executable, limit_s: float = _LIMIT_S
    ) -> None:
        self._name = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(options)],
            cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._limit = threading.Timer(limit_s, self._process.kill)
        self._limit.daemon = True
        self._limit.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._limit.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait_until_ready(self) -> None:
        """Raises ChildFailed when it ends instead."""
        if self._read() != _READY:
            raise self._failure()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """What it found. Raises ChildFailed when it ends without."""
        line = self._read()
        if not line:
            raise self._failure()
        found: dict[str, Any] = json.loads(line)
        return found

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _failure(self) -> ChildFailed:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip(" |+-")]
        return ChildFailed(f"{self._name}: {said[-1].strip(' |') if said else 'no word'}")


def options_of_child() -> dict[str, Any]:
    """Inside a child: what it was started with."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    return options


def say_ready() -> None:
    """Say that all is set up, without waiting to be told to start; from here on this process ends with its parent."""
    print(_READY, flush=True)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def wait_for_go() -> float:
    """Say that all is set up, and wait to be told to start; the moment of starting. Blocks the event loop on purpose."""
    print(_READY, flush=True)
    sys.stdin.readline()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    return time.monotonic()


def say_line(record: Mapping[str, Any]) -> None:
    """Say something, and go on."""
    print(json.dumps(record), flush=True)


def say_result(record: Mapping[str, Any]) -> None:
    """Say it and end the process at once: shutting down is not measured, and some take their time over it."""
    print(json.dumps({**record, "cpu_s": time.process_time()}), flush=True)
    os._exit(0)


def load_documents(path: str) -> list[dict[str, Any]]:
    """All of a JSON Lines file: documents in a producer's hands."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def in_batches(documents: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [documents[start : start + size] for start in range(0, len(documents), size)]


def _end_with_the_parent() -> None:
    """However it ends, our end of its pipe does."""
    sys.stdin.read()
    os._exit(1)
