"""Many seeds, or one of them again:

python -m tests.simulation --seeds 1000 --start 5000
python -m tests.simulation --seed 5123 -v
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.mutants import mutants_for

from .system import TO_DRAIN_S, Found, simulate

_SHOWN_LINES = 60


def run_seed(seed: int, *, verbose: bool = False) -> Found:
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        return simulate(seed, Path(folder), verbose=verbose)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 when a seed found something."""
    names = [mutant.name for mutant in mutants_for("simulation")]
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--mutant", choices=names, help="with this fault in the product")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the history as it happens")
    options = parser.parse_args(arguments)
    seeds = range(options.start, options.start + options.seeds) if options.seed is None else [options.seed]
    failed: list[int] = []
    began = time.monotonic()
    virtual_s, steps, slowest_s = 0.0, 0, 0.0
    with ExitStack() as stack:
        if options.mutant:
            stack.enter_context(next(m for m in mutants_for("simulation") if m.name == options.mutant).apply())
        for seed in seeds:
            found = run_seed(seed, verbose=options.verbose)
            virtual_s, steps = virtual_s + found.virtual_s, steps + found.steps
            slowest_s = max(slowest_s, found.drained_in_s)
            if found.failure is not None:
                failed.append(seed)
                if not options.verbose:
                    print(*found.lines[-_SHOWN_LINES:], sep="\n")
                print(f"seed {seed}: {found.failure}\nagain: python -m tests.simulation --seed {seed} -v", flush=True)
            elif options.seed is not None:
                print(f"seed {seed}: every promise kept; history {found.digest}")
    seconds = time.monotonic() - began
    print(
        f"{len(seeds)} seeds, {len(failed)} failed {failed or ''}: {virtual_s:,.0f} virtual seconds and {steps:,} steps in "
        f"{seconds:,.0f} s; drained within {slowest_s:.0f} of {TO_DRAIN_S:.0f} virtual seconds"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
