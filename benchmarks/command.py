"""The real command in a process of its own, and what it cost: wall time, CPU time, peak memory of it and of its children.

Memory is `VmHWM` of /proc, watched while the process lives, and None where there is no /proc. The `ru_maxrss` of a child
would be wrong: Linux lets a process inherit the peak of whoever started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedmill.errors import EmbedmillError

EMBEDMILL = ("-c", "from embedmill.commands.main import run; run()")
_LOOK_EVERY_S = 0.02
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Cost:
    """cpu_s: user and system time of the process and of its children; children_*: those alone, for example the queue's
    server; a child that lives shorter than 20 ms may be missed there."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float | None = None
    children_peak_mb: float | None = None
    children_cpu_s: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {name: None if value is None else round(value, 3) for name, value in asdict(self).items()}


@dataclass(slots=True)
class Watch:
    """Peaks of a process tree, from /proc."""

    pid: int
    own_peak_kb: int = 0
    child_peaks_kb: dict[int, int] = field(default_factory=dict)
    child_cpu_s: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        self.own_peak_kb = max(self.own_peak_kb, _peak_kb(self.pid))
        for child in _descendants(self.pid):
            # The kernel keeps the peak, and begins anew when a fork becomes another program: until then it is its parent's.
            self.child_peaks_kb[child] = _peak_kb(child) or self.child_peaks_kb.get(child, 0)
            self.child_cpu_s[child] = max(self.child_cpu_s.get(child, 0.0), _cpu_s(child))


def run_embedmill(
    arguments: Sequence[str], *, python: Sequence[str] = EMBEDMILL, allowed: Collection[int] = (0,)
) -> tuple[dict[str, Any], Cost]:
    """Run `embedmill ARGUMENTS --json`; its JSON object, and its cost.

    python: what the interpreter runs. Raises EmbedmillError, with what the command said, for an exit status that is not
    allowed.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *python, *arguments, "--json"], stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        watch, status, usage = _wait(process)
        cost = Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)
        output.seek(0)
        errors.seek(0)
        lines = output.read().decode().splitlines()
        if status not in allowed or not lines:
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise EmbedmillError(f"`embedmill {arguments[0]}` ended with {status}: {said[-1] if said else 'no word'}")
    if watch.own_peak_kb:
        cost.peak_mb = watch.own_peak_kb / 1024
        cost.children_peak_mb = sum(watch.child_peaks_kb.values()) / 1024
        cost.children_cpu_s = sum(watch.child_cpu_s.values())
    return json.loads(lines[-1]), cost


def _wait(process: subprocess.Popen[bytes]) -> tuple[Watch, int, Any]:
    watch = Watch(process.pid)
    try:
        while True:
            watch.look()
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return watch, process.returncode, usage
            time.sleep(_LOOK_EVERY_S)
    except BaseException:
        if process.returncode is None:
            process.terminate()
            process.wait()
        raise


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    except OSError:
        pass
    return found


def _peak_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / _CLOCK_TICKS
