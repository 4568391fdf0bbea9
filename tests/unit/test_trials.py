import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.embedder import BatchLimits
from tests.datasets import small_dataset
from worker.trials import (
    CONTROL_TIMES,
    DEATHS_TO_BURY,
    Note,
    TrialNotes,
    control_wait_s,
    deaths_alone,
    plan_trials,
    suspects,
)

LIMITS = BatchLimits(max_inputs=8, max_tokens=1000, padded=False, concurrency=1)


def plan(owed: list[int], *left: Note) -> list[tuple[int, ...]]:
    unsuspected, halves = plan_trials(owed, [1] * len(owed), left, limits=LIMITS)
    return [*unsuspected, *halves]


def test_a_suspect_shard_without_notes_is_tried_in_requests_as_usual() -> None:
    assert plan(list(range(10))) == [tuple(range(8)), (8, 9)]


def test_rows_of_a_trial_that_was_not_survived_are_tried_last_and_in_halves() -> None:
    assert plan(list(range(10)), Note((2, 3, 4, 5))) == [(0, 1, 6, 7, 8, 9), (2, 3), (4, 5)]


def test_the_half_that_was_not_tried_yet_is_tried_whole_before_the_quarters_of_the_other() -> None:
    assert plan([2, 3, 4, 5], Note((2, 3, 4, 5)), Note((2, 3))) == [(4, 5), (2,), (3,)]


@given(poison=st.sets(st.integers(0, 63), max_size=4), rows=st.integers(1, 64))
def test_every_passage_that_kills_is_alone_after_as_many_deaths_as_halvings(poison: set[int], rows: int) -> None:
    poison = {row for row in poison if row < rows}
    owed, left, deaths = list(range(rows)), list[Note](), 0
    while set(owed) != poison or any(len(trial) > 1 for trial in plan(owed, *left)):
        for trial in plan(owed, *left):
            if poison.isdisjoint(trial):
                owed = [row for row in owed if row not in trial]
            elif len(trial) > 1:
                left.append(Note(trial))
                deaths += 1
                break
    assert set(owed) == poison
    assert deaths <= 3 * len(poison)


@given(st.lists(st.sets(st.integers(0, 20), max_size=8).map(lambda rows: Note(tuple(sorted(rows)))), max_size=6))
def test_every_owed_row_is_in_exactly_one_trial(left: list[Note]) -> None:
    tried = [row for trial in plan(list(range(0, 20, 2)), *left) for row in trial]
    assert sorted(tried) == list(range(0, 20, 2))


def test_a_death_in_a_control_counts_for_its_row_and_an_uncontrolled_one_not_at_all() -> None:
    died = Note((4,), controlled=True)
    left = [died, died, Note((4,)), Note((4,), control=True), Note((5,), controlled=True), Note((4, 5))]
    assert deaths_alone(4, left) == (2, 1)
    assert suspects(left) == {4, 5}
    assert suspects([Note((7,), control=True), Note(())]) == set()


def test_a_control_lasts_several_times_as_long_as_its_trial_may() -> None:
    assert control_wait_s(0.1, canary="c" * 50, text="t") == pytest.approx(CONTROL_TIMES * 0.1)
    assert control_wait_s(0.1, canary="c" * 50, text="t" * 500) == pytest.approx(CONTROL_TIMES * 1.0)
    assert control_wait_s(0.0, canary="c" * 50, text="t") > 0.1
    assert control_wait_s(9, canary="c" * 50, text="t" * 500) == 10


def bury_chance(share: float, kills: int) -> float:
    """Chance that a healthy row, alone, is buried, if every life is killed and `share` of the kills meet the trial."""
    at, buried = {0: 1.0}, 0.0
    for _ in range(kills):
        after: dict[int, float] = {}
        for score, chance in at.items():
            for step, weight in ((1, share), (-1, 1 - share)):
                if score + step >= DEATHS_TO_BURY:
                    buried += chance * weight
                else:
                    after[score + step] = after.get(score + step, 0.0) + chance * weight
        at = after
    return buried


def test_a_healthy_row_alone_is_hardly_ever_buried_even_if_no_trial_ever_ends() -> None:
    share = 1 / (1 + CONTROL_TIMES)
    assert bury_chance(share, 500) == pytest.approx((share / (1 - share)) ** DEATHS_TO_BURY, rel=0.01)
    assert bury_chance(share, 500) < 1 / 60


def test_notes_are_there_for_others_until_their_own_attempt_removes_them(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d")
    mine, theirs = (TrialNotes(dataset, 0, attempt=name) for name in ("a", "b"))
    key = mine.write(Note((1, 2), controlled=True))
    other = theirs.write(Note((3,), control=True))
    assert mine.left() == [Note((3,), control=True)]
    assert theirs.left() == [Note((1, 2), controlled=True)]
    mine.remove(key)
    mine.remove(key)
    assert theirs.left() == []
    assert mine.left() == [Note((3,), control=True)]
    theirs.remove(other)


@pytest.mark.parametrize("damage", [lambda data: b"{", lambda data: b"[]", lambda data: json.dumps({}).encode()])
def test_a_damaged_note_is_passed_over(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    dataset = small_dataset(tmp_path / "d")
    key = TrialNotes(dataset, 0, attempt="a").write(Note((1,)))
    path = tmp_path / "d" / key
    path.write_bytes(damage(path.read_bytes()))
    assert TrialNotes(dataset, 0, attempt="b").left() == []
