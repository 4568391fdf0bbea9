"""The short form of `make chaos`: every kind of fault at least once. Its seed may be given as CHAOS_SEED."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .faults import ONCE
from .fleet import SHORT, run_chaos


@pytest.mark.slow
@pytest.mark.server
def test_whatever_dies_hangs_or_forgets_the_final_set_is_that_of_a_calm_run(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "7"))
    card = run_chaos(tmp_path, documents=2000, seed=seed, size=SHORT, counts=ONCE)
    record_property("scorecard", card.as_dict())
    print(json.dumps(card.as_dict(), indent=1))
    broken = [verdict for verdict in card.verdicts if not verdict.held]
    assert not broken, f"seed {seed}: {broken}"
    assert card.report.missed == 0, "a fault met nothing: the test proves less than it says"
