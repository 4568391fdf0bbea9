"""A calm trial and one with faults over the same documents, judged: what `make chaos` and the short test run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from tests.invariants import final_set

from .faults import Action, Kind, draw_faults
from .judgement import done_twice, judge, judge_done_twice
from .scorecard import Scorecard
from .trial import Size, Trial
from .workload import make_workload

# Workers slow enough that two seconds of results and the requests in flight are little beside what is to be done.
LONG = Size(shard_rows=256, inputs=4, delay_s=0.35, lease_s=3.0, producing_s=200, promised=True)
SHORT = Size(shard_rows=64, inputs=2, delay_s=0.08, lease_s=2.0, producing_s=20, promised=False, drain_s=60)
_PUSHES, _PROGRAMS = {LONG: 6, SHORT: 3}, {LONG: 2, SHORT: 1}


def run_chaos(
    folder: Path, *, documents: int, seed: int, size: Size, counts: Mapping[tuple[Action, Kind], int]
) -> Scorecard:
    """Everything in `folder`. The verdict on work done twice is the caller's in the short form."""
    began, at = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    workload = make_workload(
        folder / "workload", documents=documents, files=_PUSHES[size], programs=_PROGRAMS[size], batch=16, seed=seed
    )
    calm = Trial(folder / "calm", workload, size, faults=(), calm=True)
    trial = Trial(folder / "chaos", workload, size, faults=draw_faults(counts, seed=seed), calm=False)
    with ThreadPoolExecutor(1) as beside:
        # While the other waits for leases to expire there is nothing else to do.
        running = beside.submit(calm.run)
        trial.run()
        running.result()
    assert not calm.report.owing, f"the calm run did not end: {calm.report.owing}, see {calm.folder}"
    done = done_twice(trial.requests, workload)
    verdicts = [*judge(trial, workload, final_set(calm.dataset)), *judge_done_twice(done, trial.report, size)]
    return Scorecard(seed, documents, size, trial.report, done, verdicts, time.monotonic() - began, at)
