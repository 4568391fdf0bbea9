"""The batch lane against the simulator: a worker that hands its shards over, and whatever may go wrong on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest

from embedmill.dataset.layout import EMBEDDED
from embedmill.rehearsal import refusals
from embedmill.rehearsal.accounts import Account
from embedmill.rehearsal.batch import BatchDesk
from embedmill.token_bounds import most_tokens
from scheduler.budget import Unlimited
from tests.batch_bench import KEY, bench, texts_of, tokens_of_one
from worker import batch_matching, batch_sending
from worker.embedders.jina_batches import JinaBatches


async def test_every_shard_is_one_batch_and_row_i_is_the_vector_of_passage_i(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=0.3) as on:
        on.admit(texts_of(0), texts_of(1, 13))
        worker = await on.work()
        on.check()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert marker.count(EMBEDDED) == 40
        assert on.states == {"completed": 2}
        # One passage is embedded by an ordinary request, too, to compare.
        assert on.billed_again <= tokens_of_one()
        billed = on.simulator.stats()["tokens_billed"]
        markers = [on.dataset.marker(shard) for shard in (0, 1)]
        assert sum(one.billed_tokens for one in markers if one) == billed == worker.counts.tokens + on.billed_again
        assert sum(line["tokens"] for line in on.spent()) == worker.counts.tokens
        assert {one.state for one in on.submissions.of_shards([0, 1])} == {"done"}


async def test_another_worker_on_an_empty_redis_takes_over_what_is_still_with_the_provider(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=0.8) as on:
        on.admit(texts_of(0), texts_of(1))
        await on.work(until=lambda: len(on.submissions.batch_ids()) == 2)
        assert not on.dataset.committed()
        await on.work()
        on.check()
        assert on.states == {"completed": 2}


async def test_a_line_that_refuses_its_text_is_a_dead_letter_with_its_cause_and_the_rest_is_embedded(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, reject_marker="poison") as on:
        on.admit(["one", "poison", "three"])
        await on.work()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert [(failure.row, failure.code) for failure in marker.failures] == [(1, "input_rejected")]
        assert "Input cannot be processed" in marker.failures[0].cause
        assert marker.count(EMBEDDED) == 2


async def test_where_every_line_is_refused_nothing_is_buried_before_a_text_that_anything_takes_has_passed(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, reject_marker="text") as on:
        on.admit(texts_of(0, 3))
        await on.work()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert len(marker.failures) == 3
        assert on.simulator.stats()["tokens_billed"], "the canary"


async def test_lines_that_failed_for_no_fault_of_theirs_are_embedded_by_ordinary_requests(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_line_error=0.1, seed=3) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert marker.count(EMBEDDED) == 40
        assert on.states == {"completed": 1}


async def test_a_passage_over_the_limit_is_cut_by_an_ordinary_request_as_it_always_is(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        on.admit(["short", "word " * 9_000])
        await on.work()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert marker.count(EMBEDDED) == 2


async def test_where_many_lines_have_no_vector_a_person_decides_before_they_are_paid_at_the_ordinary_price(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, batch_line_error=0.9, seed=3) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "no usable vector for" in job.reason
        assert "embedmill batches discard 00000000-0001" in job.reason
        assert on.simulator.stats()["texts_embedded"] <= 10


@pytest.mark.parametrize("fate", ["failed", "expired"])
async def test_a_batch_that_fails_as_a_whole_is_sent_once_more_and_then_a_person_decides(
    tmp_path: Path, fate: str
) -> None:
    async with bench(tmp_path, **{f"batch_{fate}": 1.0}) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        assert on.states == {fate: 2}
        job = on.dataset.job("main")
        assert job is not None
        assert "failed 2 times" in job.reason
        assert "--no-batch" in job.reason
        on.go_on()
        await on.work(until=on.is_paused)
        assert on.states == {fate: 2}, "going on sends nothing by itself"
        on.set_mode("direct")
        on.go_on()
        await on.work()
        on.check()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert marker.billed_tokens == on.simulator.stats()["tokens_billed"]


async def test_a_batch_that_failed_once_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_failed=1.0) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: on.states.get("failed", 0) == 1)
        on.rehearse(batch_failed=0.0)
        await on.work()
        on.check()
        assert on.states["completed"] == 1


async def test_another_key_that_cannot_see_the_batch_waits_then_says_so_and_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_matching, "_OTHER_KEY_AFTER_S", 1.0)
    monkeypatch.setattr(batch_matching, "_OTHER_KEY_AGAIN_S", 0.05)
    async with bench(tmp_path, batch_s=60) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: bool(on.submissions.batch_ids()))
        await on.work(key="jina_other", until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "another API key" in job.reason
        assert sum(on.states.values()) == 1


async def test_a_batch_that_somebody_cancelled_is_not_sent_again(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=60) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: bool(on.submissions.batch_ids()))
        endpoint = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
        await endpoint.cancel(next(iter(on.submissions.batch_ids())))
        await endpoint.aclose()
        await on.work(until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "was cancelled, though not by this job" in job.reason


async def test_vectors_of_another_space_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = JinaBatches._vector
    monkeypatch.setattr(JinaBatches, "_vector", lambda self, body: np.roll(vector(self, body), 1))
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "is not the one that an ordinary request gets" in job.reason
        assert not on.dataset.committed()
        assert not list((Path(on.dataset.url) / "vectors.zarr/vectors").glob("c/*"))


async def test_an_output_that_breaks_off_is_fetched_again(tmp_path: Path) -> None:
    async with bench(tmp_path, shard_rows=40, truncated_body=0.4, seed=5) as on:
        on.admit(texts_of(0), texts_of(1))
        await on.work(within_s=60)
        on.check()
        assert on.states == {"completed": 2}


def without_output(monkeypatch: pytest.MonkeyPatch, *, times: int) -> list[str]:
    """The first outputs that are asked for are not there; the batches that were asked for."""
    asked: list[str] = []
    output = BatchDesk.output

    def missing(desk: BatchDesk, batch_id: str, account: Account, *, now: float) -> Iterator[bytes]:
        asked.append(batch_id)
        if len(asked) <= times:
            raise refusals.not_found("batch output", batch_id)
        return output(desk, batch_id, account, now=now)

    monkeypatch.setattr(BatchDesk, "output", missing)
    return asked


async def test_an_output_that_stays_away_is_asked_for_for_some_time_and_then_a_person_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = without_output(monkeypatch, times=1000)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused, within_s=20)
        job = on.dataset.job("main")
        assert job is not None
        assert "is completed, and the provider does not have its output" in job.reason
        assert "embedmill batches discard 00000000-0001" in job.reason
        assert len(asked) > 1
        assert on.states == {"completed": 1}


async def test_an_output_that_comes_late_is_compared_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Were the output there for the second question of a delivery, nothing would have been compared.
    asked = without_output(monkeypatch, times=1)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        assert len(asked) == 3
        assert 0 < on.billed_again <= tokens_of_one()


async def test_a_batch_of_which_every_line_failed_needs_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_output(monkeypatch, times=1000)
    async with bench(tmp_path, reject_marker="text") as on:
        on.admit(texts_of(0, 3))
        await on.work()
        marker = on.dataset.marker(0)
        assert marker is not None
        assert {failure.code for failure in marker.failures} == {"input_rejected"}
        assert len(marker.failures) == 3


async def test_what_a_batch_can_cost_is_counted_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[threading.Thread]()

    def noted(texts: Sequence[str], *, max_input_tokens: int = 0) -> int:
        threads.append(threading.current_thread())
        return most_tokens(texts, max_input_tokens=max_input_tokens)

    for module in ("scheduler.caps", "worker.batch_caps"):
        monkeypatch.setattr(f"{module}.most_tokens", noted)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0, 3))
        on.dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": 10**6}))
        await on.work()
    assert threads
    assert threading.main_thread() not in threads


async def test_a_cap_that_one_batch_fills_has_room_again_once_its_bill_is_known(tmp_path: Path) -> None:
    """The text that is compared needs that room, before the batch has ended."""
    async with bench(tmp_path) as on:
        on.admit(texts_of(0, 20))
        bound = most_tokens(texts_of(0, 20), max_input_tokens=on.dataset.info.embedder.max_input_tokens)
        on.dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": bound}))
        await on.work()
        on.check()
        assert on.simulator.stats()["tokens_billed"] <= bound
        assert on.states == {"completed": 1}


async def test_refusals_for_the_rate_and_overloads_leave_no_intent_behind(tmp_path: Path) -> None:
    async with bench(tmp_path, request_429=1.0) as on:
        on.admit(texts_of(0, 3))
        refused = lambda: on.simulator.stats()["refusals"] != {}  # noqa: E731
        await on.work(until=refused)
        assert on.submissions.of_shard(0) == []


async def test_a_job_that_changed_its_mind_waits_for_what_it_has_sent_and_embeds_only_the_rest(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=0.5) as on:
        on.admit(texts_of(0))
        await on.work(until=lambda: bool(on.submissions.batch_ids()))
        on.set_mode("direct")
        on.admit(texts_of(1))
        await on.work()
        on.check()
        assert on.states == {"completed": 1}
        assert on.billed_again <= tokens_of_one()


async def test_a_shard_over_the_endpoints_limits_is_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.embedders.jina_batches._MAX_LINES", 15)
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        assert on.states == {"completed": 3}
        assert [len(one.intent.row_numbers()) for one in on.submissions.of_shard(0)] == [15, 15, 10]


async def test_no_more_batches_are_open_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sending, "MOST_OPEN", 2)
    monkeypatch.setattr(batch_sending, "_PLACE_AGAIN_S", 0.05)
    async with bench(tmp_path, batch_s=0.2) as on:
        on.admit(*(texts_of(shard, 5) for shard in range(5)))
        seen: list[int] = []

        def owes_nothing() -> bool:
            seen.append(on.states.get("pending", 0) + on.states.get("processing", 0))
            return not on.dataset.owed()

        await on.work(until=owes_nothing)
        on.check()
        assert 0 < max(seen) <= 3
        assert on.states == {"completed": 5}


async def test_two_workers_that_know_nothing_of_each_other_send_each_shard_once(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_s=0.3, latency_ms=50) as on:
        on.admit(texts_of(0), texts_of(1), texts_of(2))
        async with anyio.create_task_group() as group:
            for namespace in ("a", "b"):
                group.start_soon(lambda name=namespace: on.work(namespace=name))
        on.check()
        assert on.states == {"completed": 3}
        assert len(on.spent()) == 3


async def test_with_a_refused_key_and_a_good_one_the_good_one_sends(tmp_path: Path) -> None:
    class TwoKeys(Unlimited):
        secrets = usable_secrets = ("jina_bad", KEY)

    async with bench(tmp_path, bad_key_marker="bad") as on:
        on.admit(texts_of(0))
        await on.work(budget=TwoKeys())
        on.check()
        assert on.states == {"completed": 1}


async def test_an_adopted_batch_about_other_passages_is_never_stored(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_lost_answer=1.0, batch_failed=1.0) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        on.rehearse(batch_lost_answer=0.0, batch_failed=0.0)
        stranger = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
        foreign = await stranger.submit({f"strange-{row}": f"a stranger's {row}" for row in range(40)})
        await stranger.aclose()
        [held] = on.submissions.of_shard(0)
        on.submissions.accept(held.intent, foreign.batch_id, by="person")
        on.go_on()
        await on.work(until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "no usable vector for 40 of 40 passages" in job.reason
        assert not on.dataset.committed()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_through_lost_answers_overloads_and_torn_outputs_every_batch_is_paid_once(
    tmp_path: Path, seed: int
) -> None:
    trouble = {"error_500": 0.1, "error_503": 0.1, "drop_before": 0.1, "drop_after": 0.1, "request_429": 0.05}
    async with bench(tmp_path, batch_s=0.2, batch_lost_answer=0.3, truncated_body=0.1, seed=seed, **trouble) as on:
        on.admit(*(texts_of(shard) for shard in range(4)))
        await on.work()
        on.check()
        assert on.states == {"completed": 4}
        embedded = on.simulator.stats()["texts_embedded"]
        assert isinstance(embedded, int)
        # The passage that is compared may take several requests whose answers are lost.
        assert embedded <= 4 * 40 + 8
