"""The processes of a trial, and the supervision that an orchestrator gives them: what dies is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BACK_OFF_S = 0.3
_KEPT = ("PATH", "HOME", "LANG", "COVERAGE_PROCESS_CONFIG")


@dataclass
class Part:
    """One process that is kept alive. `once`: it is done when it ends with status 0, and is not started again then.

    deaths: exit statuses of processes that nobody of the trial killed or stopped.
    """

    name: str
    kind: str
    command: Sequence[str]
    folder: Path
    once: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    deaths: list[int] = field(default_factory=list)
    done: bool = False
    started_at: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    _stopped_until: float | None = None
    _ours: bool = False
    _start_at: float = 0.0

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def vulnerable(self) -> bool:
        """Alive and going: a fault hits something."""
        return self.alive and self._stopped_until is None

    def supervise(self) -> None:
        """Wake it when its standstill is over, and start it when it is not there."""
        if self._stopped_until is not None and time.monotonic() >= self._stopped_until:
            self.wake()
        if self.done or self.alive:
            return
        if self.process is not None:
            self._note_death()
            if self.done:
                return
        if time.monotonic() >= self._start_at:
            self.start()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                cwd=self.folder,
                env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.starts += 1
        self.started_at = time.monotonic()

    def kill(self) -> None:
        """SIGKILL; supervision starts it again."""
        assert self.process is not None
        self._ours = True
        self.process.kill()
        self.process.wait()
        self._stopped_until = None

    def stop_for(self, seconds: float) -> None:
        """SIGSTOP, until supervision finds that the time is over."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        self._stopped_until = time.monotonic() + seconds

    def wake(self) -> None:
        self._stopped_until = None
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def terminate(self, *, within_s: float) -> tuple[int | None, float]:
        """SIGTERM; exit status (None when it had to be killed) and seconds that it took."""
        if not self.alive:
            return (self.process.returncode if self.process else None), 0.0
        assert self.process is not None
        self.wake()
        began = time.monotonic()
        self.process.terminate()
        try:
            status: int | None = self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            status = None
        return status, time.monotonic() - began

    def end(self) -> None:
        """Make sure that nothing is left of it."""
        if self.alive:
            self.kill()

    def _note_death(self) -> None:
        assert self.process is not None
        status = self.process.returncode
        self.process = None
        if self.once and status == 0:
            self.done = True
        elif not self._ours:
            self.deaths.append(status)
        self._ours = False
        self._stopped_until = None
        self._start_at = time.monotonic() + _BACK_OFF_S


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]
