"""A few seeds of the simulation, and its sight: known faults of the product must be found."""

from __future__ import annotations

import pytest

from tests.mutants import Mutant, mutants_for
from tests.simulation.__main__ import run_seed

_SEEDS = 9
_FIRST = 100


@pytest.mark.parametrize("seed", range(_FIRST, _FIRST + _SEEDS))
def test_whatever_dies_everything_drains_and_every_promise_is_kept(seed: int) -> None:
    found = run_seed(seed)
    assert found.failure is None, f"{found.failure}\nagain: python -m tests.simulation --seed {seed} -v"


def test_a_seed_has_one_history() -> None:
    # The first run of a process imports what is imported late.
    other = run_seed(2)
    first, second = run_seed(1), run_seed(1)
    assert first.lines == second.lines
    assert first.digest == second.digest
    assert first.digest != other.digest


@pytest.mark.parametrize("mutant", mutants_for("simulation"), ids=lambda mutant: mutant.name)
def test_the_simulation_notices(mutant: Mutant) -> None:
    assert mutant.seeds is not None
    with mutant.apply():
        found = next((f for f in map(run_seed, mutant.seeds) if f.failure is not None), None)
    assert found is not None, f"no seed of {mutant.seeds} noticed: {mutant.name}"
