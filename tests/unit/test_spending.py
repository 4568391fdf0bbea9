"""What spend logs say, however they were left, and the bounds that a cap reserves."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import Job
from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.spending import SpendLogs, spent_recently
from embedmill.dataset.submissions import Submissions
from embedmill.dataset.summary import summarize
from embedmill.errors import CapReached, CorruptStore, StorageError
from embedmill.rehearsal import pretend_tokens
from embedmill.token_bounds import most_tokens
from scheduler.budget import Grant, Unlimited
from scheduler.caps import UNCAPPED, Cap, Hold, JobCap
from tests.datasets import admit_texts, small_dataset
from worker.cancelling import cancel_shard
from worker.embedders.null import NullEmbedder
from worker.embedding import ShardEmbedding, Tools
from worker.requesting import Requester, WorkerCounts
from worker.spend import LoggedCap, SpendLog


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "set")


def write_log(dataset: Dataset, name: str, *records: object, end: str = "\n") -> None:
    dataset.store.append(f"spend/{name}.log", ("\n".join(map(json.dumps, records)) + end).encode())


def line(**fields: object) -> dict[str, object]:
    return {"at": now_iso(), "key": "k", "job": "main", "shard": None, "tokens": 1, "requests": 1, **fields}


def test_logs_are_read_on_from_where_they_were_read_and_what_is_cut_short_counts_once_it_is_whole(
    dataset: Dataset,
) -> None:
    logs = SpendLogs(dataset)
    assert logs.charged("main") == 0
    write_log(dataset, "a", line(tokens=5), line(tokens=2, unknown_tokens=3), line(tokens=100, job="other"))
    assert logs.charged("main") == 10
    whole = json.dumps(line(tokens=7)) + "\n"
    dataset.store.append("spend/b.log", whole[:30].encode())
    assert logs.charged("main") == 10
    dataset.store.append("spend/b.log", whole[30:].encode())
    assert logs.charged("main") == 17
    assert logs.charged("main") == 17
    assert logs.charged("other") == 100


def test_lines_of_earlier_releases_belong_to_the_job_of_their_shard(dataset: Dataset) -> None:
    admit_texts(dataset, 0, ["a", "b"])
    old = {"at": now_iso(), "key": "k", "shard": 0, "passages": 2, "tokens": 9, "requests": 1}
    write_log(dataset, "a", old, {**old, "shard": 7})
    assert SpendLogs(dataset).charged("main") == 9
    assert summarize(dataset, job="main").billed_tokens == 9


@pytest.mark.parametrize("rubbish", [[], "text", None, {"tokens": 5}], ids=str)
def test_a_line_that_is_none_is_passed_over(dataset: Dataset, rubbish: object) -> None:
    write_log(dataset, "a", line(tokens=1), rubbish, line(tokens=2))
    assert SpendLogs(dataset).charged("main") == 3


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": "5"},
        {"tokens": -5},
        {"tokens": True},
        {"unknown_tokens": [1]},
        {"at": "yesterday"},
        {"at": "2026-01-01T00:00:00"},
        {"shard": "0"},
    ],
    ids=str,
)
def test_a_line_with_an_impossible_field_is_passed_over(dataset: Dataset, damage: dict[str, object]) -> None:
    write_log(dataset, "a", line(tokens=1), line(**damage), line(tokens=2))
    assert SpendLogs(dataset).charged("main") == 3
    assert [tokens for _, tokens in spent_recently(dataset)["k"]] == [1, 2]
    assert summarize(dataset).billed_tokens == 3


def test_a_minute_ago_is_not_recently(dataset: Dataset) -> None:
    long_ago = (datetime.now(tz=UTC) - timedelta(seconds=61)).isoformat()
    write_log(dataset, "a", line(at=long_ago, tokens=50), line(tokens=4, unknown_tokens=2), line(key="j"))
    found = spent_recently(dataset)
    [(age_s, tokens)] = found["k"]
    assert (0 <= age_s < 30, tokens) == (True, 6)
    assert list(found) == ["k", "j"]


def test_of_long_logs_the_end_is_read_as_far_back_as_the_last_minute_goes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_ago = (datetime.now(tz=UTC) - timedelta(hours=1)).isoformat()
    write_log(dataset, "old", *[line(at=long_ago)] * 10_000)
    write_log(dataset, "both", *[line(at=long_ago)] * 10_000, *[line(tokens=number) for number in range(300)])
    read_end = 0
    read = LocalStore.read_end

    def counted(store: LocalStore, key: str, size: int) -> bytes:
        nonlocal read_end
        data = read(store, key, size)
        read_end += len(data)
        return data

    monkeypatch.setattr(LocalStore, "read_end", counted)
    whole = sum(path.stat().st_size for path in Path(dataset.url, "spend").iterdir())
    assert [tokens for _, tokens in spent_recently(dataset)["k"]] == [*range(300)]
    assert read_end < whole / 5


async def test_every_request_that_cost_something_is_logged_before_it_is_settled(dataset: Dataset) -> None:
    log = SpendLog(dataset, worker="w", job="main")
    cap = LoggedCap(UNCAPPED, log, shard=3)
    for outcome, tokens in (("used", 40), ("unknown", 0), ("unsent", 0), ("limited", 0), ("used", 0)):
        async with cap.reserve(["a", "b"], est_tokens=8) as hold:
            hold.grant = Grant(8, key_id="k", outcome=outcome, actual_tokens=tokens)  # type: ignore[arg-type]
    async with cap.reserve(["a"], est_tokens=8):
        """Never sent."""
    written = [json.loads(text) for text in dataset.store.read("spend/w.log").splitlines()]
    assert [(one["tokens"], one.get("unknown_tokens", 0), one["passages"], one["shard"]) for one in written] == [
        (40, 0, 2, 3),
        (0, 10, 0, 3),
    ]
    assert {one["key"] for one in written} == {"k"}


async def test_a_request_that_is_cancelled_under_way_is_logged(dataset: Dataset) -> None:
    cap = LoggedCap(UNCAPPED, SpendLog(dataset, worker="w", job="main"), shard=None)
    with anyio.move_on_after(0.05):
        async with cap.reserve(["a"], est_tokens=8) as hold:
            hold.grant = Grant(8, outcome="unknown")
            await anyio.sleep_forever()
    assert SpendLogs(dataset).charged("main") == 10


def test_what_cannot_be_written_goes_with_the_next_line(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SpendLog(dataset, worker="w", job="main")

    def full(*_: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patched:
        patched.setattr(dataset.store, "append", full)
        log.add(key="k", tokens=5)
    log.add(key="k", tokens=6)
    assert SpendLogs(dataset).charged("main") == 11


def test_half_a_line_does_not_spoil_the_next_one(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    log, append = SpendLog(dataset, worker="w", job="main"), dataset.store.append

    def full(key: str, data: bytes) -> None:
        append(key, data[: len(data) // 2])
        raise StorageError("full")

    with monkeypatch.context() as patched:
        patched.setattr(dataset.store, "append", full)
        log.add(key="k", tokens=5)
        log.add(key="k", tokens=6)
    log.add(key="k", tokens=7)
    assert SpendLogs(dataset).charged("main") == 18
    assert len(dataset.store.read("spend/w.log").splitlines()) == 5


async def test_what_one_try_of_a_shard_could_not_write_is_written_by_the_next_whatever_its_job(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit_texts(dataset, 0, ["a"])
    embedder = NullEmbedder()
    requester = Requester(embedder, Unlimited(), WorkerCounts())
    tools = Tools(embedder, requester, "w", anyio.CapacityLimiter(1), anyio.Event())

    async def pay(cap: Cap, tokens: int) -> None:
        async with cap.reserve(["a"], est_tokens=8) as hold:
            hold.grant = Grant(8, outcome="used", actual_tokens=tokens)

    def full(*_: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patched:
        patched.setattr(dataset.store, "append", full)
        await pay(ShardEmbedding(tools, dataset, 0, deliveries=1).cap, 5)
    await pay(ShardEmbedding(tools, dataset, 0, deliveries=2).cap, 6)
    assert SpendLogs(dataset).charged("main") == 11
    with monkeypatch.context() as patched:
        patched.setattr(dataset.store, "append", full)
        await pay(LoggedCap(UNCAPPED, tools.spending.log(dataset, "other"), shard=None), 7)
    await tools.spending.write()
    assert SpendLogs(dataset).charged("other") == 7


@pytest.fixture
async def cap(dataset: Dataset) -> AsyncIterator[JobCap]:
    dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": 10**6}))
    connection = Connection(FAKE_URL)
    yield JobCap(connection, namespace="t", dataset=dataset, job="main", alone=False)
    await connection.aclose()


async def test_many_requests_at_once_read_the_record_and_the_logs_once(
    cap: JobCap, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(dataset, "a", line(tokens=5))
    async with cap.reserve(["a"], est_tokens=8):
        """It has begun."""
    reads = Counter[str]()
    for owner, name in ((Dataset, "job"), (SpendLogs, "charged")):
        count_calls(monkeypatch, owner, name, reads)
    now_s = time.monotonic() + 60
    monkeypatch.setattr("scheduler.caps.time.monotonic", lambda: now_s)

    async def ask() -> None:
        async with cap.reserve(["a"], est_tokens=8):
            pass

    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(ask)
    assert reads == {"job": 1, "charged": 1}


async def test_room_for_batch_after_batch_reads_markers_once_and_each_bill_once(
    cap: JobCap, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    submissions, reads = Submissions(dataset), Counter[str]()
    count_calls(monkeypatch, Dataset, "committed", reads)
    count_calls(monkeypatch, LocalStore, "read_from", reads)
    for number in range(1, 6):
        admit_texts(dataset, number - 1, ["a"])
        intent = submissions.intend(
            number - 1, [0], number=1, model="m", tokens=9, key="k", api_base="", worker="w", before=[], most_tokens=50
        )
        room = await cap.room()
        assert (room.charged, room.batches) == (7 * (number - 1), 50)
        submissions.spend(intent, f"b{number}", job="main", tokens=7)
        submissions.end(intent, "done", tokens=7)
    assert (await cap.room()).charged == 35
    assert reads == {"committed": 1, "read_from": 5}


async def test_a_batch_of_a_shard_that_was_given_up_counts_until_it_has_ended(cap: JobCap, dataset: Dataset) -> None:
    admit_texts(dataset, 0, ["a"])
    submissions = Submissions(dataset)
    intent = submissions.intend(
        0, [0], number=1, model="m", tokens=9, key="k", api_base="", worker="w", before=[], most_tokens=5000
    )
    submissions.accept(intent, "b", by="answer")
    room = await cap.room()
    assert (room.charged, room.batches, room.abandoned) == (0, 5000, 0)
    cancel_shard(dataset, 0, who="w")
    room = await cap.room()
    assert (room.charged, room.batches, room.abandoned) == (5000, 0, 5000)
    dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": 5004}))
    assert (await cap.room()).limit == 5004
    with pytest.raises(CapReached, match=r"5,000 of them is .*given up can cost: `embedmill cancel`"):
        async with cap.reserve(["a" * 9], est_tokens=8):
            """Nobody fetches it, so there is nothing to wait for."""
    submissions.spend(intent, "b", job="main", tokens=3)
    submissions.end(intent, "cancelled", tokens=3)
    room = await cap.room()
    assert (room.charged, room.batches, room.abandoned) == (3, 0, 0)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: Counter[str]) -> None:
    called = getattr(owner, name)

    def counted(*arguments: object, **options: object) -> object:
        calls[name] += 1
        return called(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def test_a_hold_is_charged_what_is_known_and_in_doubt_more_than_the_estimate_and_no_more_than_the_most() -> None:
    assert Hold(100, 400).unknown_tokens == Hold(100, 400).billed_tokens == 0
    assert Hold(100, 400, Grant(100, outcome="unknown")).unknown_tokens == 125
    assert Hold(100, 110, Grant(100, outcome="unknown")).unknown_tokens == 110
    assert Hold(100, 400, Grant(100, outcome="used", actual_tokens=90)).billed_tokens == 90
    assert Hold(100, 400, Grant(100, outcome="limited", actual_tokens=90)).billed_tokens == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "plain words",
        "!?!?",
        "naïve café",
        "日本語のテキスト",
        "ﷺ" * 50,
        "\ud800 lone",
        "e\u0301" * 9,
        "\u0958",
    ],
)
def test_no_tokenizer_counts_more_than_the_bound(text: str) -> None:
    assert most_tokens([text]) >= pretend_tokens(text)
    assert most_tokens([text]) >= len(text.encode("utf-8", "surrogatepass"))
    assert most_tokens([text] * 3) == 3 * most_tokens([text])


def test_the_bound_knows_of_the_longest_normal_form_and_of_the_models_limit() -> None:
    # One character of three bytes is eighteen of thirty-three bytes in NFKC.
    assert most_tokens(["ﷺ"]) >= 33
    assert most_tokens(["x" * 100_000, "y"], max_input_tokens=512) == 512 + 17


@pytest.mark.parametrize("caps", ['{"max_tokens": "many"}', '{"max_tokens": -1}', '{"max_tokens": true}', "[1]", "7"])
def test_a_record_with_rubbish_for_caps_is_named(caps: str) -> None:
    record = Job("main").to_bytes().replace(b'"caps": {}', f'"caps": {caps}'.encode())
    with pytest.raises(CorruptStore, match="jobs/main"):
        Job.from_bytes(record, name="jobs/main.json")


def test_a_cap_is_reached_until_it_is_larger() -> None:
    assert not Job("main", caps={"max_tokens": 100}).has_reached_cap
    assert Job("main", caps={"max_tokens": 100, "reached": 100}).has_reached_cap
    assert Job("main", caps={"max_tokens": 90, "reached": 100}).has_reached_cap
    assert not Job("main", caps={"max_tokens": 101, "reached": 100}).has_reached_cap
    assert not Job("main", caps={"reached": 100}).has_reached_cap
