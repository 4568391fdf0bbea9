"""How a run shows itself."""

from __future__ import annotations

import dataclasses

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.commands import progress
from embedmill.commands.progress import Pace, Snapshot, duration, plain_line, show

SNAPSHOT = Snapshot(1200, 3000, estimated=False, fresh=900, failed=0, tokens=100, loaded=None, trouble="")


def pace_of(*points: tuple[float, int, int], span_s: float = 30.0) -> Pace:
    pace = Pace(span_s=span_s)
    for now_s, passages, tokens in points:
        pace.note(now_s, passages=passages, tokens=tokens)
    return pace


STEADY = pace_of((0, 0, 0), (10, 450, 61_000))


def test_there_is_no_pace_before_two_points() -> None:
    assert pace_of().rates == (0, 0)
    assert pace_of((5, 100, 100)).rates == (0, 0)


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    slow_then_fast = [(float(t), t if t <= 60 else 60 + (t - 60) * 10, 0) for t in range(0, 121, 5)]
    assert pace_of(*slow_then_fast).rates[0] == pytest.approx(10)
    stalled = [*slow_then_fast, *((float(t), 660, 0) for t in range(125, 180, 5))]
    assert pace_of(*stalled).rates == (0, 0)


def test_two_points_far_apart_are_enough() -> None:
    assert pace_of((0, 0, 0), (100, 500, 1000)).rates == (5, 10)
    assert pace_of((7, 0, 0), (7, 1, 1)).rates[0] > 0


@given(st.lists(st.tuples(st.floats(0.01, 20), st.integers(0, 500)), min_size=2, max_size=80))
def test_a_pace_never_exceeds_the_fastest_step_nor_goes_negative(steps: list[tuple[float, int]]) -> None:
    now, passages, points = 0.0, 0, [(0.0, 0, 0)]
    for seconds, more in steps:
        now, passages = now + seconds, passages + more
        points.append((now, passages, 0))
    fastest = max(more / seconds for seconds, more in steps)
    assert 0 <= pace_of(*points).rates[0] <= fastest * 1.001


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1,200 of 3,000 passages (40 %), 45 passages/s, 6,100 tokens/s, 40 s left"),
        ({"estimated": True}, "1,200 of about 3,000 passages (40 %), 45 passages/s, 6,100 tokens/s, 40 s left"),
        ({"total": None}, "1,200 passages, 45 passages/s, 6,100 tokens/s"),
        ({"done": 3000}, "3,000 of 3,000 passages (100 %), 45 passages/s, 6,100 tokens/s"),
        ({"done": 0, "total": 0}, "0 of 0 passages (100 %), 45 passages/s, 6,100 tokens/s"),
        (
            {"loaded": 1100, "failed": 2, "trouble": "the key is closed"},
            "1,200 of 3,000 passages (40 %), 45 passages/s, 6,100 tokens/s, 40 s left, 1,100 in Milvus, 2 failed, "
            "the key is closed",
        ),
    ],
)
def test_the_plain_line_says_what_there_is_to_say(changes: dict[str, object], expected: str) -> None:
    assert plain_line(dataclasses.replace(SNAPSHOT, **changes), STEADY) == expected  # type: ignore[arg-type]


def test_without_a_pace_nothing_is_promised() -> None:
    assert plain_line(SNAPSHOT, Pace()) == "1,200 of 3,000 passages (40 %), 0 passages/s, 0 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (12.4, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations_read_well_at_every_border(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


async def test_without_a_terminal_a_line_appears_now_and_then_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.01)
    with anyio.move_on_after(0.2):
        await show(lambda: SNAPSHOT)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("1,200 of 3,000 passages (40 %)")
    assert captured.err.count("\n") >= 2


async def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.01)
    with anyio.move_on_after(0.05):
        await show(lambda: SNAPSHOT, quiet=True)
    assert capsys.readouterr() == ("", "")
