"""What happened in a simulation, in order; two runs of one seed have the same one."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

# The wall clock of the real machine, which nothing decides by, and where the simulation's folder happens to be.
_WALL_CLOCK = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*\+00:00")
_LONGEST = 240


@dataclass(slots=True)
class History:
    """Lines of `SECONDS PROCESS EVENT`. `digest` is over all of them."""

    folder: str
    verbose: bool = False
    lines: list[str] = field(default_factory=list)

    def add(self, now_s: float, process: str, event: str) -> None:
        event = _WALL_CLOCK.sub("NOW", event.replace(self.folder, "FOLDER"))
        line = f"{now_s:9.3f} {process:<12} {event[:_LONGEST]}"
        self.lines.append(line)
        if self.verbose:
            print(line, flush=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]
