"""The scenarios of the contract: what is right passes them, and every known fault of this layer is noticed."""

from __future__ import annotations

import pytest

from tests.contract.cap_scenarios import SCENARIOS as CAP_SCENARIOS
from tests.contract.inbox_scenarios import SCENARIOS as INBOX_SCENARIOS
from tests.contract.queue_bench import Bench
from tests.contract.queue_scenarios import SCENARIOS as QUEUE_SCENARIOS
from tests.contract.queue_scenarios import Scenario
from tests.contract.scheduler_scenarios import SCENARIOS as SCHEDULER_SCENARIOS
from tests.mutants import MUTANTS, Mutant, mutants_for

SCENARIOS = [*QUEUE_SCENARIOS, *INBOX_SCENARIOS, *SCHEDULER_SCENARIOS, *CAP_SCENARIOS]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_the_promise_is_kept(bench: Bench, scenario: Scenario) -> None:
    await scenario(bench)


@pytest.mark.parametrize("mutant", mutants_for("contract"), ids=lambda mutant: mutant.name)
async def test_the_scenario_notices(bench: Bench, mutant: Mutant) -> None:
    assert mutant.noticed_by in SCENARIOS
    with mutant.apply(), pytest.raises(AssertionError):
        await mutant.noticed_by(bench)


def test_every_mutant_has_a_layer_and_every_scenario_a_mutant() -> None:
    assert all(mutant.noticed_by is not None or mutant.seeds is not None for mutant in MUTANTS)
    assert {mutant.noticed_by for mutant in mutants_for("contract")} == set(SCENARIOS)
