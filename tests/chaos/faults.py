"""What goes wrong in a trial: drawn from a seed, and due when a share of the work is done, so that it always meets work."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["kill", "stop", "flush"]
Kind = Literal["worker", "scheduler", "loader", "program", "push", "redis"]


@dataclass(frozen=True, slots=True)
class Fault:
    """at: share of the passages that have been embedded when it is due. chance: which of the parts of its kind is hit."""

    at: float
    action: Action
    kind: Kind
    chance: float


# Of the smallest trial: everything once or twice. `stop` lasts longer than a lease.
ONCE: Mapping[tuple[Action, Kind], int] = {
    ("kill", "worker"): 2,
    ("stop", "worker"): 1,
    ("kill", "scheduler"): 2,
    ("stop", "scheduler"): 1,
    ("kill", "loader"): 1,
    ("stop", "loader"): 1,
    ("kill", "program"): 1,
    ("stop", "program"): 1,
    ("kill", "push"): 1,
    ("stop", "push"): 1,
    ("kill", "redis"): 1,
    ("flush", "redis"): 1,
}
MANY: Mapping[tuple[Action, Kind], int] = {
    ("kill", "worker"): 12,
    ("stop", "worker"): 6,
    ("kill", "scheduler"): 8,
    ("stop", "scheduler"): 4,
    ("kill", "loader"): 5,
    ("stop", "loader"): 3,
    ("kill", "program"): 5,
    ("stop", "program"): 3,
    ("kill", "push"): 4,
    ("stop", "push"): 2,
    ("kill", "redis"): 4,
    ("stop", "redis"): 1,
    ("flush", "redis"): 1,
}


def draw_faults(counts: Mapping[tuple[Action, Kind], int], *, seed: int) -> list[Fault]:
    """In the order of their shares. Producers are hit early, while they have something to push."""
    chance = random.Random(seed)
    faults = []
    for (action, kind), count in counts.items():
        latest = {"push": 0.2, "program": 0.25}.get(kind, 0.85)
        faults += [Fault(chance.uniform(0.02, latest), action, kind, chance.random()) for _ in range(count)]
    return sorted(faults, key=lambda fault: fault.at)
