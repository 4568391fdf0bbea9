"""`python -m benchmarks.sampling OUT.json ARGUMENT...`: the command `embedmill`, watched from inside over all its threads.

Every few milliseconds each thread's stack is looked at, and the CPU time that the kernel has given the thread since the last
look goes to the stage in which it is found; a thread that blocks (fsync, for example) adds to that stage's wall time only.
The looker has to wait for the interpreter lock like all others, so it sees calls that give the lock away (I/O) a little too
often, and shares below a few percent mean little. CPU time of threads that Python does not know (Arrow's, ONNX Runtime's)
is told as one sum. Linux only.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from .stages import IDLE, REST, find_stage, name_function

_LOOK_EVERY_S = 0.003
_SWITCH_EVERY_S = 0.0002
_SHOWN_FUNCTIONS = 40


@dataclass(slots=True)
class Sampler:
    """CPU and wall seconds by stage, CPU seconds by innermost function, since `start`."""

    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    functions: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    own_cpu_s: float = 0.0
    samples: int = 0
    _seen_s: dict[int, float] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        last_s = time.perf_counter()
        while not self._stopped.wait(_LOOK_EVERY_S):
            now_s = time.perf_counter()
            self._look(now_s - last_s)
            last_s = now_s
        self.own_cpu_s = time.thread_time()

    def _look(self, passed_s: float) -> None:
        frames = sys._current_frames()
        mine = threading.get_ident()
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is None or thread.ident == mine or thread.native_id is None:
                continue
            used_s = self._used_s(thread.native_id)
            stage = find_stage(frame)
            # A thread found idle has used its time for what was too short to be seen.
            self.cpu_s[REST if stage == IDLE else stage] += used_s
            if stage != IDLE:
                self.wall_s[stage] += passed_s
            self.functions[name_function(frame)] += used_s
        self.samples += 1

    def _used_s(self, thread: int) -> float:
        """CPU seconds of a thread since it was last asked for."""
        try:
            total_s = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0
        used_s = total_s - self._seen_s.get(thread, 0.0)
        self._seen_s[thread] = total_s
        return used_s

    def as_dict(self) -> dict[str, object]:
        """other_threads_s: what the process used beyond the threads that were looked at."""
        used_s = time.process_time()
        return {
            "samples": self.samples,
            "cpu_s": used_s,
            "sampler_cpu_s": self.own_cpu_s,
            "other_threads_s": max(0.0, used_s - self.own_cpu_s - sum(self.cpu_s.values())),
            "stages": {name: {"cpu_s": spent_s, "wall_s": self.wall_s[name]} for name, spent_s in _most(self.cpu_s)},
            "functions": dict(_most(self.functions)[:_SHOWN_FUNCTIONS]),
        }


def _most(spent_s: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(spent_s.items(), key=lambda pair: -pair[1])


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    sys.setswitchinterval(_SWITCH_EVERY_S)
    sampler = Sampler()

    def finish() -> None:
        sampler.stop()
        out.write_text(json.dumps(sampler.as_dict()), encoding="utf-8")

    atexit.register(finish)
    sampler.start()
    from embedmill.commands.main import run

    run(arguments)


if __name__ == "__main__":
    main()
