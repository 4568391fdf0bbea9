"""What workers report of the last minute, as rates of a namespace, of a dataset and of a job."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from embedmill.commands.fleet import Fleet, Rates, rates_of, time_left
from embedmill.connection import FAKE_URL, Connection
from scheduler.budget import Unlimited
from scheduler.queue import Queue, WorkerReport
from tests.worker_bench import TestedEmbedder
from worker import leases
from worker.embedding import Tools
from worker.leases import Leases
from worker.requesting import Requester, WorkerCounts


def worker(owner: str, *, age_s: float = 0.0, **record: Any) -> WorkerReport:
    return WorkerReport(owner, record, age_s)


FLEET = Fleet(
    [],
    [
        worker("a", recent_s=60.0, recent={"d0:main": [600, 6000], "d0:news": [60, 1200], "d1:main": [120, 120]}),
        worker("b", recent_s=10.0, recent={"d0:main": [50, 100]}, age_s=7.0),
        worker("gone", recent_s=60.0, recent={"d0:main": [9999, 9999]}, age_s=250.0),
        worker("new", recent_s=0.0, recent={}),
    ],
)


@pytest.mark.parametrize(
    ("asked", "passages_s", "tokens_s"),
    [
        ({}, 10 + 1 + 2 + 5, 100 + 20 + 2 + 10),
        ({"dataset_id": "d0"}, 10 + 1 + 5, 100 + 20 + 10),
        ({"dataset_id": "d0", "job": "main"}, 15, 110),
        ({"dataset_id": "d0", "job": "news"}, 1, 20),
        ({"dataset_id": "d", "job": "main"}, 0, 0),
    ],
)
def test_rates_are_those_of_what_is_asked_for(asked: dict[str, str], passages_s: float, tokens_s: float) -> None:
    rates = rates_of(FLEET, **asked)
    assert (rates.passages_s, rates.tokens_s) == (passages_s, tokens_s)
    assert rates.by_owner["gone"] == rates.by_owner["new"] == (0, 0)


def test_the_time_left_of_a_job_is_at_its_own_pace() -> None:
    assert time_left(60, rates_of(FLEET, dataset_id="d0", job="news")) == "1 min 00 s"
    assert time_left(60, rates_of(FLEET, dataset_id="d2")) == ""
    assert time_left(60, Rates()) == ""


async def test_a_worker_reports_the_last_minute_by_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(leases.time, "monotonic", lambda: now_s)
    connection = Connection(FAKE_URL)
    queue, counts = Queue(connection), WorkerCounts()
    embedder = TestedEmbedder()
    requester = Requester(embedder, Unlimited(), counts)
    tools = Tools(embedder, requester, "w", anyio.CapacityLimiter(1), anyio.Event())
    held = Leases(queue, tools, on_hung=print)

    async def report() -> dict[str, Any]:
        await held._report()
        (said,) = await queue.workers()
        return {name: said.record[name] for name in ("recent_s", "recent", "embedded")}

    counts.add("d0:main", passages=100, tokens=1000)
    assert await report() == {"recent_s": 0, "recent": {}, "embedded": 100}
    now_s += 30
    counts.add("d0:news", passages=5, tokens=50)
    assert await report() == {"recent_s": 30, "recent": {"d0:news": [5, 50]}, "embedded": 105}
    for _ in range(3):
        now_s += 30
        counts.add("d0:main", passages=1, tokens=10)
        last = await report()
    assert last == {"recent_s": 60, "recent": {"d0:main": [2, 20]}, "embedded": 108}
    await connection.aclose()


def test_jobs_that_a_worker_has_not_seen_for_long_leave_its_report() -> None:
    counts = WorkerCounts()
    for number in range(100):
        counts.add(f"d0:{number}", passages=1, tokens=1)
        counts.add("d0:main", passages=1, tokens=1)
    assert len(counts.jobs) == 64
    assert counts.jobs["d0:main"] == (100, 100)
    assert counts.embedded == 200
