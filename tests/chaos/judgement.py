"""What must hold after a trial, one verdict each; the scorecard is made of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.local_store import LocalStore
from tests.invariants import FinalSet, assert_same_set, check_dataset, final_set
from worker.embedding import CHECKPOINT_EVERY_S

from .embedder import CONCURRENCY, Requests
from .parts import ROOT, python
from .trial import Report, Size, Trial
from .workload import POISON_ID, Workload

MAX_DONE_TWICE = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one thing held; `detail` says what was seen."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True, slots=True)
class DoneTwice:
    """Passages that the embedder was sent beyond the first time each. unanswered: of requests that died on their way;
    poisoned: of requests that held the poison; to_embed: passages that need one embedding."""

    to_embed: int
    again: int
    unanswered: int
    poisoned: int

    @property
    def share(self) -> float:
        return self.again / self.to_embed


def done_twice(requests: Requests, workload: Workload) -> DoneTwice:
    return DoneTwice(
        to_embed=workload.to_embed,
        again=requests.sent_again,
        unanswered=requests.sent.total() - requests.answered.total(),
        poisoned=sum(map(len, requests.poisoned)),
    )


def judge(trial: Trial, workload: Workload, calm: FinalSet) -> list[Verdict]:
    """Reads the dataset and Milvus back; nothing of the trial may run any more."""
    report = trial.report
    checks: list[tuple[str, Callable[[], str]]] = [
        (
            "Nothing is owed, queued or unloaded in the end",
            lambda: _expect(not report.owing, report.owing or "drained"),
        ),
        ("Every service ends with status 0 after SIGTERM", lambda: _ends(trial)),
        ("No process ends by itself, but by the poison", lambda: _deaths(trial)),
        (
            "No process shows a traceback",
            lambda: _expect(not report.tracebacks, ", ".join(report.tracebacks) or "none"),
        ),
        ("`embedmill verify` finds no difference in the dataset and in Milvus", lambda: _verify(trial)),
        ("The invariants of the dataset hold", lambda: _invariants(trial)),
        ("The final set is that of the calm run", lambda: _same_set(trial, calm)),
        ("The final set is what was pushed", lambda: _as_pushed(trial, workload)),
        ("The poison is buried alone", lambda: _buried(trial)),
    ]
    return [_verdict(name, check) for name, check in checks]


def judge_done_twice(done: DoneTwice, report: Report, size: Size) -> Iterator[Verdict]:
    """A worker that dies or stands still costs its requests in flight and what it did not keep yet; one that loses its
    leases with Redis, no more."""
    detail = f"{done.again:,} of {done.to_embed:,} passages, {done.share:.1%}"
    deaths = sum(name.startswith("worker") for name, _ in report.deaths)
    in_flight = CONCURRENCY * size.inputs
    most = in_flight * (1 + CHECKPOINT_EVERY_S / size.delay_s)
    of_redis = sum(count for (_, kind), count in report.faults.items() if kind == "redis")
    losses = report.faults["kill", "worker"] + report.faults["stop", "worker"] + deaths + of_redis * size.workers
    yield Verdict(
        "No more is done twice than what was in flight and two seconds of results, each time",
        done.again <= losses * most,
        f"{detail}; {losses} times up to {most:.0f}",
    )
    if size.promised:
        yield Verdict("Less than 5 % of the work is done twice", done.share < MAX_DONE_TWICE, detail)


def _verdict(name: str, check: Callable[[], str]) -> Verdict:
    try:
        return Verdict(name, True, check())
    except Exception as error:
        return Verdict(name, False, f"{type(error).__name__}: {error}" if str(error) else repr(error))


def _expect(held: bool, detail: str) -> str:
    assert held, detail
    return detail


def _ends(trial: Trial) -> str:
    ends = trial.report.ends
    bad = {name: status for name, (status, _) in ends.items() if status != 0}
    slowest = max((seconds for _, seconds in ends.values()), default=0.0)
    return _expect(not bad, f"{bad or len(ends)} services, the slowest within {slowest:.1f} s")


def _deaths(trial: Trial) -> str:
    poisoned = len(trial.requests.poisoned)
    by_kill = sum(status == -9 and name.startswith("worker") for name, status in trial.report.deaths)
    # A push that is started while Redis is away says so, and is run again, as a user would.
    refused = [death for death in trial.report.deaths if death[0].startswith("push") and death[1] in {2, 3}]
    others = [
        death
        for death in trial.report.deaths
        if death not in refused and not (death[1] == -9 and death[0].startswith("worker"))
    ]
    seen = f"{poisoned} requests with the poison, {by_kill} workers died of it; {len(refused)} pushes found no Redis"
    detail = f"{seen}; {len(others)} other ends {others[:5] or ''}".rstrip()
    return _expect(not others and by_kill <= poisoned, detail)


def _verify(trial: Trial) -> str:
    target = ("--milvus", trial.milvus) if trial.milvus else ()
    command = python("-m", "embedmill", "verify", trial.dataset, *target, "--json")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    # 1: everything holds, and a document failed.
    assert ended.returncode == 1, f"status {ended.returncode}: {ended.stdout[-2000:]} {ended.stderr[-2000:]}"
    record: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    milvus = record["milvus"]
    loaded = f"; Milvus: {milvus['expected']:,} expected, {milvus['found']:,} found" if milvus else ""
    return f"status {ended.returncode}{loaded}"


def _invariants(trial: Trial) -> str:
    dataset = Dataset.open(str(trial.dataset))
    # What a kill leaves of an object that it interrupted is invisible, and swept when it is an hour old.
    swept = LocalStore(trial.dataset).sweep(older_than_s=0)
    check_dataset(trial.dataset)
    return f"{len(dataset.committed())} shards; {swept} half-written files of killed processes swept"


def _same_set(trial: Trial, calm: FinalSet) -> str:
    ours = final_set(trial.dataset)
    assert_same_set(ours, calm)
    return f"{len(ours):,} (id, version): texts, statuses and vectors bit for bit"


def _as_pushed(trial: Trial, workload: Workload) -> str:
    ours = {key: (row.text or None, row.status) for key, row in final_set(trial.dataset).items()}
    expected = {key: (outcome.text, outcome.status) for key, outcome in workload.expected.items()}
    missing, extra = expected.keys() - ours.keys(), ours.keys() - expected.keys()
    assert not missing, f"{len(missing)} are missing, for example {sorted(missing)[:3]}"
    assert not extra, f"{len(extra)} are too many, for example {sorted(extra)[:3]}"
    different = [key for key, outcome in expected.items() if ours[key] != outcome]
    assert not different, f"{len(different)} are different, for example {different[:3]}"
    return f"{len(ours):,} (id, version)"


def _buried(trial: Trial) -> str:
    failures = list(_failures(trial))
    assert [failure.id for failure in failures] == [POISON_ID], f"buried: {[(f.id, f.code) for f in failures][:10]}"
    return f"{failures[0].code}: {failures[0].cause}"


def _failures(trial: Trial) -> Iterator[layout.Failure]:
    dataset = Dataset.open(str(trial.dataset))
    for shard in dataset.committed():
        marker = dataset.marker(shard)
        assert marker is not None
        yield from marker.failures
