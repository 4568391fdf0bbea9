"""What the quota benchmark plans to measure, and what it calls a miss."""

import pytest

from benchmarks import quota
from benchmarks.quota import Case, Found

GOOD = {"used": 0.98, "refused": 0.0, "calls": 1.5, "redis_ms": 0.3, "seconds": 1.0, "cpu_ms": 3.0}


def planned(*arguments, monkeypatch):
    seen = []

    def measure(case):
        seen.append(case)
        return Found(requests=case.requests, **GOOD)

    monkeypatch.setattr(quota, "measure", measure)
    monkeypatch.setattr(quota, "measure_calls", lambda _: dict.fromkeys(("per_s", "calls", "redis_ms", "cpu_ms"), 1.0))
    monkeypatch.setattr(quota, "write_result", lambda *_: None)
    assert quota.main(arguments) == 0
    return seen


def test_a_complete_run_has_every_window_at_both_tiers_alone_and_beside_a_stranger_and_the_other_ways(
    monkeypatch, tmp_path, capsys
):
    cases = planned("--write", str(tmp_path / "quota.md"), monkeypatch=monkeypatch)
    ours = {(case.tier, case.window, case.other) for case in cases if case.way == "budget"}
    assert len(ours) == 2 * 3 * 2
    assert all(case.requests >= 10_000 for case in cases if case.way == "budget" and not case.other)
    assert {(case.way, case.tier) for case in cases} >= {(w, t) for w in quota._WAYS for t in ("paid", "premium")}
    assert all(case.minute_s >= 10 for case in cases)
    page = (tmp_path / "quota.md").read_text()
    assert "| budget | premium | bucket | 30% | 5,000 | 98.00% | 0.000% | 1.50 | 0.300 | 3.0 |" in page
    assert "a minute of 10 s (paid), 30 s (premium)" in capsys.readouterr().out


def test_a_slower_machine_has_longer_minutes_at_premium(monkeypatch):
    arguments = ("--quick", "--tier", "premium", "--way", "budget", "--premium-minute", "60")
    assert {case.minute_s for case in planned(*arguments, monkeypatch=monkeypatch)} == {60}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"used": 0.96}, "96.00% used, 97% wanted"),
        ({"refused": 0.002}, "0.200% refused, 0.1% allowed"),
        ({"calls": 2.6}, "2.60 Redis calls a request, 2.5 allowed"),
    ],
)
def test_what_misses_a_bound_is_said(found, said):
    case = Case("budget", "sliding", "paid", 0.0, 1, 10.0)
    assert list(quota._missed(case, Found(requests=1, **GOOD))) == []
    assert list(quota._missed(case, Found(requests=1, **{**GOOD, **found}))) == [f"paid, sliding, stranger 0%: {said}"]
