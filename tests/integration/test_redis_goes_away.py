"""Services and a Redis that is not there: before they start, and when they are stopped."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Command, finish
from tests.servers import Server, running

pytestmark = pytest.mark.server
WORKER = ("worker", "--model", "null/8", "--redis")
# A service that hangs until Kubernetes or systemd kills it takes 30 s and more.
_PROMPT_S = 12.0


def read_until(process: subprocess.Popen[bytes], pattern: str, *, timeout_s: float = 30.0) -> str:
    """What a process says on stderr, up to a line that matches."""
    assert process.stderr is not None
    said = b""
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, said.decode()):
        ready, _, _ = select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{pattern!r} was not said: {said.decode()}"
        data = os.read(process.stderr.fileno(), 65536)
        assert data, f"it ended without saying {pattern!r}: {said.decode()}"
        said += data
    return said.decode()


def test_a_worker_that_starts_before_redis_waits_for_it_and_says_so_once(embedmill: Command, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    worker = embedmill.start(*WORKER, server.url)
    said = read_until(worker, "waiting for Redis at")
    time.sleep(2.5)
    with running(server):
        said += read_until(worker, "worker for null/8 on")
        assert said.count("waiting for Redis at") == 1
        worker.send_signal(signal.SIGTERM)
        assert finish(worker, timeout_s=_PROMPT_S).status == 0


def test_a_worker_that_is_stopped_while_it_waits_for_redis_ends_at_once(embedmill: Command, tmp_path: Path) -> None:
    worker = embedmill.start(*WORKER, Server(tmp_path / "server").url)
    read_until(worker, "waiting for Redis at")
    worker.send_signal(signal.SIGTERM)
    assert finish(worker, timeout_s=_PROMPT_S).status == 0


@pytest.mark.parametrize("hangs", [False, True], ids=["gone", "hanging"])
def test_a_worker_that_is_stopped_without_redis_ends_within_its_grace(
    embedmill: Command, tmp_path: Path, hangs: bool
) -> None:
    with running(Server(tmp_path / "server")) as server:
        worker = embedmill.start(*WORKER, server.url)
        read_until(worker, "worker for null/8 on")
        assert server.process is not None
        if hangs:
            server.process.send_signal(signal.SIGSTOP)
        else:
            server.kill()
        # Long enough for a call that waits for the server to be under way.
        time.sleep(2)
        worker.send_signal(signal.SIGTERM)
        assert finish(worker, timeout_s=_PROMPT_S).status == 0


def test_what_waiting_cannot_help_ends_a_worker_at_once(embedmill: Command, tmp_path: Path) -> None:
    with running(Server(tmp_path / "server", options={"requirepass": "right"})) as server:
        refused = embedmill(*WORKER, server.url.replace("//", "//:secret@"))
        assert (refused.status, refused.stderr.count("\n")) == (2, 1)
        assert "refuses the login" in refused.stderr
        assert "secret" not in refused.output
    with running(Server(tmp_path / "evicting", options={"maxmemory-policy": "allkeys-lru"})) as server:
        refused = embedmill(*WORKER, server.url)
        assert (refused.status, "noeviction" in refused.stderr) == (2, True)
    refused = embedmill(*WORKER, "redis://127.0.0.1:secret")
    assert (refused.status, "is not a Redis URL" in refused.stderr) == (2, True)
