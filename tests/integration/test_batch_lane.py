"""The batch lane against the simulator: a worker that hands its shards over, and whatever may go wrong on the way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED
from embedmill.dataset.submissions import Submissions
from embedmill.errors import BatchHeld, EmbedmillError
from embedmill.rehearsal import ProviderSimulator, Rehearsal, serve_rehearsal
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts, small_dataset
from tests.invariants import check_dataset
from worker import batch_lane, batch_matching
from worker.embedders.jina import JinaEmbedder
from worker.embedders.jina_batches import JinaBatches
from worker.service import Worker

MODEL = "jina/jina-embeddings-v5-text-nano"
KEY = "jina_test"


class Bench:
    """A dataset whose job goes by batches, a queue that forgets everything at the end, and a simulator."""

    def __init__(self, folder: Path, simulator: ProviderSimulator, api_base: str, *, shard_rows: int) -> None:
        self.simulator = simulator
        self.api_base = api_base
        self.dataset = small_dataset(folder, embedder=self.embedder().spec, shard_rows=shard_rows)
        self.submissions = Submissions(self.dataset)
        self.set_mode("batch")

    def embedder(self, key: str = KEY) -> JinaEmbedder:
        return JinaEmbedder(MODEL, key=key, api_base=self.api_base, dimensions=8)

    def set_mode(self, mode: Any) -> None:
        self.dataset.change_job("main", lambda job: replace(job, mode=mode))

    def admit(self, *contents: list[str]) -> None:
        for shard, texts in enumerate(contents, start=len(self.dataset.admitted())):
            admit_texts(self.dataset, shard, texts)

    async def work(
        self,
        *,
        key: str = KEY,
        until: Any = None,
        within_s: float = 50,
        patient: bool = True,
        namespace: str = "n",
        budget: Unlimited | None = None,
    ) -> Worker:
        """A new worker on an empty Redis, until nothing is owed, until `until`, or until it gives up."""
        connection, embedder = Connection(FAKE_URL), self.embedder(key)
        dataset = Dataset.open(self.dataset.url)
        queue = Queue(connection, namespace=namespace)
        worker = Worker(queue, embedder, budget=budget or Unlimited(), grace_s=1, patient=patient)

        async def watch() -> None:
            while not (until() if until else not dataset.owed()):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            worker.stop()

        error: EmbedmillError | None = None
        try:
            await reconcile(dataset, queue)
            with anyio.fail_after(within_s):
                async with anyio.create_task_group() as group:
                    group.start_soon(watch)
                    try:
                        await worker.run()
                    except EmbedmillError as raised:
                        error = raised
                    group.cancel_scope.cancel()
        finally:
            await embedder.aclose()
            await queue.clear()
            await connection.aclose()
        if error is not None:
            raise error
        return worker

    def is_paused(self) -> bool:
        job = self.dataset.job("main")
        return job is not None and job.state == "paused"

    def go_on(self) -> None:
        self.dataset.change_job("main", lambda job: replace(job, state="running", reason="", stopped_by=""))

    def rehearse(self, **behaviour: float) -> None:
        """From now on the simulator behaves so."""
        for name, value in behaviour.items():
            object.__setattr__(self.simulator._rehearsal, name, value)

    def check(self) -> None:
        dataset = Dataset.open(self.dataset.url)
        dataset.publish_shape()
        check_dataset(dataset.url)

    @property
    def states(self) -> dict[str, int]:
        return dict(self.simulator.stats()["batches"])  # type: ignore[call-overload]

    @property
    def billed_again(self) -> int:
        again = self.simulator.stats()["tokens_billed_again"]
        assert isinstance(again, int)
        return again

    def spent(self) -> list[dict[str, Any]]:
        """Lines of the spend logs that are about batches."""
        logs = sorted((Path(self.dataset.url) / "spend").glob("batch-*.log"))
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@asynccontextmanager
async def bench(folder: Path, *, shard_rows: int = 40, **behaviour: Any) -> AsyncIterator[Bench]:
    async with serve_rehearsal(Rehearsal(**{"batch_s": 0, **behaviour})) as (api_base, simulator):
        yield Bench(folder / "dataset", simulator, api_base, shard_rows=shard_rows)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks follow each other at once."""
    monkeypatch.setattr(batch_lane, "_FIRST_LOOK_S", 0.05)
    monkeypatch.setattr(batch_lane, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(batch_matching, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(batch_matching, "SETTLED_S", 0.3)
    return


def texts_of(shard: int, rows: int = 40) -> list[str]:
    return [f"text {row} of shard {shard}" for row in range(rows)]


def tokens_of_one() -> int:
    """More than one passage counts, less than two."""
    return 8


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


async def test_an_answer_that_is_lost_is_found_in_the_providers_list_by_its_output(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_lost_answer=1.0, batch_s=1.2) as on:
        on.admit(texts_of(0), texts_of(1))
        await on.work()
        on.check()
        assert on.states == {"completed": 2}
        assert on.billed_again <= tokens_of_one()
        assert {one.accepted.by for one in on.submissions.of_shards([0, 1]) if one.accepted} == {"match"}


async def test_batches_of_others_with_as_many_lines_are_not_mistaken_for_ours(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_lost_answer=1.0) as on:
        stranger = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
        on.admit(texts_of(0))

        async def meddle(before: bool) -> None:
            with pytest.raises(EmbedmillError):
                await stranger.submit({f"{row}": f"a stranger's {row}" for row in range(40)})

        await meddle(True)
        await on.work(until=lambda: on.simulator.stats()["batches"] == {"completed": 2})
        await meddle(False)
        await on.work()
        await stranger.aclose()
        on.check()
        assert on.states == {"completed": 3}


async def test_what_certainly_reached_nobody_is_sent_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as on:
        on.admit(texts_of(0))
        on.submissions.intend(
            0, range(40), number=1, model="jina-embeddings-v5-text-nano", tokens=1, key=JinaBatches(
                on.embedder().spec, key=KEY, api_base=on.api_base
            ).key_id, api_base=on.api_base, worker="w", before=[],
        )  # fmt: skip
        await on.work()
        on.check()
        assert [one.state for one in on.submissions.of_shard(0)] == ["never", "done"]
        assert on.states == {"completed": 1}


async def test_what_nobody_can_tell_is_held_until_a_person_decides_and_never_sent_by_itself(tmp_path: Path) -> None:
    async with bench(tmp_path, batch_lost_answer=1.0, batch_failed=1.0) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        on.rehearse(batch_lost_answer=0.0, batch_failed=0.0)
        [held] = on.submissions.of_shard(0)
        assert held.state == "held"
        assert held.held is not None
        [batch_id] = held.held.candidates
        job = on.dataset.job("main")
        assert job is not None
        assert batch_id in job.reason
        assert "embedmill batches adopt 00000000-0001" in job.reason
        on.go_on()
        with pytest.raises(BatchHeld, match="is held"):
            await on.work(patient=False)
        assert on.states == {"failed": 1}
        on.submissions.end(held.intent, "discarded")
        on.go_on()
        await on.work()
        on.check()
        assert on.states == {"failed": 1, "completed": 1}


async def test_a_list_that_does_not_reach_back_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(tmp_path) as on:
        on.admit(texts_of(0, 3))
        endpoint = JinaBatches(on.embedder().spec, key=KEY, api_base=on.api_base)
        on.submissions.intend(
            0, range(3), number=1, model="jina-embeddings-v5-text-nano", tokens=1, key=endpoint.key_id,
            api_base=on.api_base, worker="w", before=["batch_old"],
        )  # fmt: skip
        for number in range(20):
            await endpoint.submit({str(number): "a stranger's"})
        await endpoint.aclose()
        await on.work(until=on.is_paused)
        job = on.dataset.job("main")
        assert job is not None
        assert "does not reach back" in job.reason


async def test_another_key_that_cannot_see_the_batch_says_so_and_sends_nothing(tmp_path: Path) -> None:
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
    monkeypatch.setattr(batch_lane, "MOST_OPEN", 2)
    monkeypatch.setattr(batch_lane, "_PLACE_AGAIN_S", 0.05)
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
        usable_secrets = ("jina_bad", KEY)

    async with bench(tmp_path, bad_key_marker="bad") as on:
        on.admit(texts_of(0))
        await on.work(budget=TwoKeys())
        on.check()
        assert on.states == {"completed": 1}


async def test_an_adopted_batch_about_other_passages_is_never_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service._FIRST_RETRY_S", 0.05)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("worker.service._FIRST_RETRY_S", 0.05)
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
