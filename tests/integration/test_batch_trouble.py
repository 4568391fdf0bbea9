"""A batch job in trouble: what is under way is fetched all the same, and nothing is buried, sent or paid for in vain."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmill.dataset.layout import EMBEDDED, Job
from embedmill.dataset.passages import ShardOrigin
from embedmill.errors import BatchPending, EmbedmillError, OutcomeUnknown, Overloaded, RateLimited
from embedmill.rehearsal import refusals
from embedmill.rehearsal.accounts import Account
from embedmill.rehearsal.batch import BatchDesk
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from tests.batch_bench import KEY, Bench, bench, texts_of
from tests.datasets import admit_texts
from worker import batch_matching, batch_pace, batch_sending
from worker.batch_endpoint import BatchLine
from worker.batch_lane import BatchLane
from worker.batch_pace import Pace
from worker.embedders.jina_batches import JinaBatches

OTHER = "jina_other"


class Keys(Unlimited):
    """KEY is there, and not to be used for now; OTHER is."""

    secrets = (OTHER, KEY)
    usable_secrets = (OTHER,)


async def with_provider(on: Bench, shards: int = 2) -> None:
    """That many shards, each of them a batch of its own that is under way."""
    on.admit(*map(texts_of, range(shards)))
    await on.work(until=lambda: len(on.submissions.batch_ids()) == shards)


async def cancelled_by_somebody(on: Bench, *shards: int) -> None:
    endpoint = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
    for submission in on.submissions.of_shards(shards):
        assert submission.accepted is not None
        await endpoint.cancel(submission.accepted.batch_id)
    await endpoint.aclose()


def reason(on: Bench) -> str:
    job = on.dataset.job("main")
    assert job is not None
    return job.reason


def refusing_lines(monkeypatch: pytest.MonkeyPatch, error: Mapping[str, str], *, which: str) -> None:
    """Lines whose text holds `which` end with this error."""
    line = BatchDesk._line

    def refused(desk: BatchDesk, sent: dict[str, Any], model: str) -> Any:
        read = line(desk, sent, model)
        return replace(read, tokens=0, error=dict(error)) if which in read.text else read

    monkeypatch.setattr(BatchDesk, "_line", refused)


COMPLAINTS = [
    {"code": "422", "message": "body -> task: Input should be 'retrieval'"},
    {"code": "INPUT_MODEL_NOT_FOUND", "message": "Model not found"},
    {"code": "400", "message": "Single text cannot exceed 8194 tokens"},
    {"code": "", "message": "the text exceeds the model's maximum of 32768 tokens"},
]


@pytest.mark.parametrize("error", COMPLAINTS, ids=lambda error: error["message"])
async def test_a_complaint_about_every_line_buries_no_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: dict[str, str]
) -> None:
    refusing_lines(monkeypatch, error, which="text")
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: on.is_paused() or not on.dataset.owed())
        assert on.dataset.owed() == [0]
        assert "no usable vector for 40 of 40 passages" in reason(on)
        assert error["message"] in reason(on)


@pytest.mark.parametrize("error", COMPLAINTS, ids=lambda error: error["message"])
async def test_what_a_line_is_refused_for_an_ordinary_request_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: dict[str, str]
) -> None:
    refusing_lines(monkeypatch, error, which="text 1")
    async with bench(tmp_path) as on:
        on.admit(texts_of(0, 3))
        await on.work()
        on.check()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert (marker.count(EMBEDDED), marker.failures) == (3, ())


async def test_texts_that_are_one_to_a_tokenizer_may_share_their_vector(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        on.admit(["Word", "word", " WORD"])
        vector = np.ones(8, np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JinaBatches, "_vector", lambda *_: vector)
            patch.setattr("worker.batch_results._ALIKE", -1.0)
            await on.work()
        on.check()
        assert (on.dataset.vectors(0) == vector).all()


async def test_what_a_batch_brings_is_quoted_beside_the_event_loop(tmp_path: Path) -> None:
    threads = list[threading.Thread]()

    def quoted(texts: Sequence[str]) -> NDArray[np.float64]:
        threads.append(threading.current_thread())
        return np.full(len(texts), 2.0)

    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        worker = await on.work(on_start=lambda worker: worker.compare_with_quote(quoted))
        assert worker.counts.quoted_tokens == 80
    assert threads
    assert threading.main_thread() not in threads


async def test_a_batch_in_trouble_keeps_no_other_one_from_being_fetched_and_nothing_new_is_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on)
        await cancelled_by_somebody(on, 0)
        on.admit(texts_of(2))
        looks = 0

        def paused() -> bool:
            nonlocal looks
            looks += 1
            if looks == 150:
                # Seconds later: the other one is done.
                assert not on.is_paused()
                on.rehearse(batch_s=0.1)
            return on.is_paused()

        with caplog.at_level(logging.WARNING):
            await on.work(until=paused)
        assert on.dataset.committed() == [1]
        assert "was cancelled, though not by this job" in reason(on)
        assert on.states == {"cancelled": 1, "completed": 1}, "nothing new was sent"
        said = [record for record in caplog.records if "was cancelled" in record.message]
        assert len(said) <= 3, "when it is found, when the job is paused, and by the worker"
        [held] = on.submissions.of_shard(0)
        on.submissions.end(held.intent, "discarded")
        on.go_on()
        await on.work()
        on.check()
        assert on.states == {"cancelled": 1, "completed": 3}


async def test_batches_that_are_all_in_trouble_are_not_waited_for(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on, 3)
        await cancelled_by_somebody(on, 0, 1, 2)
        await on.work(until=on.is_paused, within_s=20)
        assert "was cancelled" in reason(on)


async def test_a_job_that_ends_with_its_first_trouble_is_paused_once_its_batches_are_fetched(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on)
        await cancelled_by_somebody(on, 0)
        on.rehearse(batch_s=1.0)
        with pytest.raises(Exception, match="was cancelled"):
            await on.work(patient=False)
        assert on.is_paused()
        assert on.dataset.committed() == [1]


async def test_where_the_cap_has_no_room_to_compare_any_of_them_the_job_is_paused(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on)
        on.dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": 1}))
        on.rehearse(batch_s=0.1)
        await on.work(until=on.is_paused, within_s=20)
        assert "reached its cap" in reason(on)
        on.dataset.change_job("main", lambda job: replace(job, caps={}))
        on.go_on()
        await on.work()
        on.check()
        assert on.states == {"completed": 2}


async def test_of_a_shard_with_a_batch_in_trouble_the_others_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.embedders.jina_batches._MAX_LINES", 15)
    async with bench(tmp_path, batch_s=60) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: len(on.submissions.batch_ids()) == 3)
        [first, *_] = on.submissions.of_shard(0)
        assert first.accepted is not None
        endpoint = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
        await endpoint.cancel(first.accepted.batch_id)
        await endpoint.aclose()
        on.rehearse(batch_s=0.1)
        await on.work(until=on.is_paused)
        assert [one.state for one in on.submissions.of_shard(0)] == ["accepted", "done", "done"]


@pytest.mark.parametrize("state", ["paused", "cancelled"])
async def test_open_batches_of_jobs_that_stand_still_take_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    monkeypatch.setattr(batch_sending, "MOST_OPEN", 1)
    async with bench(tmp_path) as on:
        admit_texts(on.dataset, 0, ["a"], origin=ShardOrigin(0, "other"))
        on.dataset.write_job(Job("other", state=state, mode="batch"))
        intent = on.submissions.intend(
            0, [0], number=1, model="m", tokens=1, key="k", api_base=on.api_base, worker="w", before=[]
        )
        on.submissions.accept(intent, "batch_other", by="answer")
        admit_texts(on.dataset, 1, texts_of(1))
        await on.work(until=lambda: on.dataset.owed() == [0], within_s=20)
        assert on.states == {"completed": 1}


async def test_the_key_that_sent_a_batch_asks_for_it_also_while_it_is_not_used_for_anything_else(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on, 1)
        on.rehearse(batch_s=0.1)
        await on.work(budget=Keys(), until=lambda: on.is_paused() or not on.dataset.owed())
        assert reason(on) == ""
        on.check()
        assert on.states == {"completed": 1}


async def test_while_the_key_that_sent_a_batch_is_refused_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    status = JinaBatches.status

    async def noted(endpoint: JinaBatches, batch_id: str) -> Any:
        asked.append(endpoint.key_id)
        return await status(endpoint, batch_id)

    async with bench(tmp_path, batch_s=60) as on:
        await with_provider(on, 1)
        monkeypatch.setattr(JinaBatches, "status", noted)
        monkeypatch.setattr(batch_matching, "_OTHER_KEY_AGAIN_S", 0.05)
        on.rehearse(bad_key_marker=KEY)
        await on.work(budget=Keys(), until=lambda: len(asked) > 6 or on.is_paused())
        assert reason(on) == ""
        assert len(set(asked)) == 2
        on.rehearse(bad_key_marker="", batch_s=0.1)
        await on.work(budget=Keys())
        on.check()
        assert on.states == {"completed": 1}


async def test_a_batch_that_does_not_show_at_once_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    status = BatchDesk.status

    def late(desk: BatchDesk, batch_id: str, account: Account, **where: Any) -> dict[str, object]:
        nonlocal looks
        looks += 1
        # The first one answers the submission.
        if looks in (2, 3):
            raise refusals.not_found("batch", batch_id)
        return status(desk, batch_id, account, **where)

    monkeypatch.setattr(BatchDesk, "status", late)
    async with bench(tmp_path, batch_s=0.2) as on:
        monkeypatch.setattr(batch_matching, "SETTLED_S", 10.0)
        on.admit(texts_of(0))
        await on.work(until=lambda: on.is_paused() or not on.dataset.owed())
        assert reason(on) == ""
        on.check()
        assert on.states == {"completed": 1}


@pytest.mark.parametrize("refusal", [RateLimited("slow down"), Overloaded("no")], ids=["429", "503"])
async def test_a_refusal_to_take_a_batch_holds_up_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: EmbedmillError
) -> None:
    submitted, looks = list[str](), list[int]()
    look = BatchLane.look

    async def refused(endpoint: JinaBatches, texts: Mapping[str, str]) -> Any:
        submitted.append(endpoint.key_id)
        raise refusal

    async def looked(lane: BatchLane) -> None:
        looks.append(lane._shard)
        await look(lane)

    monkeypatch.setattr(BatchLane, "look", looked)
    async with bench(tmp_path) as on:
        on.admit(*(texts_of(shard, 5) for shard in range(12)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JinaBatches, "submit", refused)
            patch.setattr(batch_pace, "_FIRST_WAIT_S", 60.0)
            await on.work(until=lambda: len(set(looks)) == 12)
        assert 1 <= len(submitted) <= 2, "of the two that are worked on at once"
        assert on.submissions.of_shards(range(12)) == []
        await on.work()
        on.check()


def test_each_refusal_in_a_row_is_waited_out_twice_as_long_unless_it_came_of_the_same_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("worker.batch_pace.time.monotonic", lambda: now_s)
    pace, waits = Pace(), list[float]()

    def refuse(error: EmbedmillError) -> None:
        with pytest.raises(BatchPending, match="slow down"), pace.learning("k"):
            raise error

    for _ in range(8):
        refuse(RateLimited("slow down"))
        refuse(Overloaded("slow down"))
        waits.append(pace.delay_s("k"))
        now_s += waits[-1]
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    assert pace.delay_s("other") == 0
    pace.taken("k")
    refuse(RateLimited("slow down", retry_after_s=42))
    assert pace.delay_s("k") == 42
    pace.taken("k")
    assert pace.delay_s("k") == 0


@pytest.fixture
def put_off(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that a shard was put off, whether that counted as an attempt."""
    times = list[bool]()
    retry = Queue.retry

    async def noted(queue: Queue, lease: Any, *, delay_s: float, counted: bool = True) -> bool:
        times.append(counted)
        return await retry(queue, lease, delay_s=delay_s, counted=counted)

    monkeypatch.setattr(Queue, "retry", noted)
    return times


@pytest.mark.parametrize("keeps", [1, 10**6])
async def test_lines_that_come_late_cost_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_off: list[bool], keeps: int
) -> None:
    asked = 0
    output = BatchDesk.output

    def lacking(desk: BatchDesk, batch_id: str, account: Account, *, now: float) -> Any:
        nonlocal asked
        asked += 1
        lines = list(output(desk, batch_id, account, now=now))
        return iter(lines[:-3] if asked <= 1 + keeps else lines)

    monkeypatch.setattr(BatchDesk, "output", lacking)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        assert set(put_off) == {False}
        assert on.states == {"completed": 1}
        # Those that do not come are asked for in another way.
        assert (on.billed_again > 20) is (keeps > 1)


async def test_an_output_that_breaks_off_costs_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_off: list[bool]
) -> None:
    tries = 0
    output = JinaBatches.output

    async def torn(endpoint: JinaBatches, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        nonlocal tries
        tries += 1
        async with aclosing(output(endpoint, batch_id)) as lines:
            async for line in lines:
                yield line
                if tries <= 6:
                    raise OutcomeUnknown("it broke off")

    monkeypatch.setattr(JinaBatches, "output", torn)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        assert tries > 6
        assert set(put_off) == {False}
