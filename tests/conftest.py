"""What integration and chaos tests share: a corpus that Python carries, and the real command in a process of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.object_server import ObjectServer

ROOT = Path(__file__).parent.parent
_CHILDREN_END_WITHIN_S = 10.0


@dataclass(frozen=True)
class Corpus:
    """JSON Lines at `path`, and the same as texts by id, in the order of the file."""

    path: Path
    texts: dict[str, str]


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def record(self) -> dict[str, Any]:
        """What `--json` prints: one object on the last line of stdout."""
        record: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return record


@dataclass
class Command:
    """The command `embedmill`, run in `folder` with an environment that holds nothing of the caller's settings.

    Every process that it starts, and all that those start, carry a token in their environment by which they are found.
    """

    folder: Path
    temporary: Path
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __call__(
        self,
        *arguments: str | Path,
        stdin: bytes | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        largest_file_bytes: int | None = None,
    ) -> Ended:
        # Where no file may grow, coverage cannot write its own, and says so.
        is_covered = largest_file_bytes is None
        process = self.start(*arguments, stdin=subprocess.PIPE, environment=environment, is_covered=is_covered)
        if largest_file_bytes is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file_bytes, resource.RLIM_INFINITY))
        return finish(process, stdin=stdin or b"", timeout_s=timeout_s)

    def start(
        self,
        *arguments: str | Path,
        stdin: int = subprocess.DEVNULL,
        environment: Mapping[str, str] | None = None,
        is_covered: bool = True,
    ) -> subprocess.Popen[bytes]:
        names = ("PATH", "HOME", "LANG", *(["COVERAGE_PROCESS_CONFIG"] if is_covered else []))
        kept = {name: os.environ[name] for name in names if name in os.environ}
        ours = {"TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TESTED_BY": self.token}
        return subprocess.Popen(
            [sys.executable, "-m", "embedmill", *map(str, arguments)],
            cwd=self.folder,
            env={**kept, **ours, **(environment or {})},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def processes(self) -> dict[int, str]:
        """Command lines of the living processes that this object started, directly or not, by id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"TESTED_BY={self.token}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        return {pid: line for pid, line in found.items() if line}

    def expect_no_processes(self) -> None:
        deadline = time.monotonic() + _CHILDREN_END_WITHIN_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"processes outlived the test: {left}"


def finish(process: subprocess.Popen[bytes], *, stdin: bytes | None = None, timeout_s: float = 60) -> Ended:
    """Wait for the end. Whatever a command meets, it shows no traceback, and says what it says without one."""
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"the command did not end within {timeout_s} s; it said: {(stdout + stderr).decode()}")
    ended = Ended(process.returncode, stdout.decode(), stderr.decode())
    assert "Traceback" not in ended.output, ended.output
    return ended


@pytest.fixture
def embedmill(tmp_path: Path) -> Iterator[Command]:
    """The command, in a folder of its own. Fails the test when a process that it started outlives the test."""
    # Not below tmp_path: the socket of the queue would get a longer name than a socket may have.
    temporary = Path(tempfile.mkdtemp(prefix="em-"))
    command = Command(tmp_path, temporary)
    try:
        yield command
        command.expect_no_processes()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def python_docs(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """1,500 paragraphs of the language reference that Python carries."""
    from pydoc_data.topics import topics

    texts: dict[str, str] = {}
    for topic in sorted(topics):
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", topics[topic]) if len(p.strip()) > 30]
        texts |= {f"{topic}#{number}": paragraph for number, paragraph in enumerate(paragraphs)}
    texts = dict(list(texts.items())[:1500])
    path = tmp_path_factory.mktemp("corpus") / "python.jsonl"
    write_jsonl(path, [{"id": id_, "text": text, "topic": id_.partition("#")[0]} for id_, text in texts.items()])
    return Corpus(path, texts)


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """An S3 server on loopback, with the bucket `texts`."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    from tests.object_server import ObjectServer

    server = ObjectServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_folder(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty prefix, which this process and what it starts can reach."""
    for name, value in (object_server.environment | {"EMBEDMILL_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    object_server.forget()
    return f"s3://texts/{uuid.uuid4().hex}"
