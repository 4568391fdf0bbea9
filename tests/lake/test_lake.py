"""The short form of `python -m tests.lake`."""

from pathlib import Path

from .trial import run_trial


def test_everybody_sees_whole_rows_and_the_end_is_that_of_a_calm_run(tmp_path: Path) -> None:
    card = run_trial(tmp_path, items=40, seed=3, kill_every_s=2.0)
    assert card.kills >= 1
    assert card.passes >= 1
    assert card.switches >= 1
