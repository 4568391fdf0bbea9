"""Submissions whose answer nobody heard, and batches that a person cancels or decides about."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from embedmill.commands.batches import cancel_batches
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Intent, Submission, Submissions
from embedmill.errors import BatchHeld, BatchPending, EmbedmillError
from embedmill.rehearsal import refusals
from embedmill.rehearsal.batch import BatchDesk
from tests.batch_bench import KEY, Bench, bench, texts_of, tokens_of_one
from tests.datasets import small_dataset
from worker.batch_endpoint import BatchLine, BatchStatus, OutputMissing
from worker.batch_matching import Matching, Sightings
from worker.embedders.jina_batches import JinaBatches


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


def shown_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has another name for the model, and sizes that are not final."""
    recent = JinaBatches.recent

    async def otherwise(endpoint: JinaBatches) -> tuple[Sequence[BatchStatus], bool]:
        listed, is_all = await recent(endpoint)
        return [replace(batch, model="another-name", total=7) for batch in listed], is_all

    monkeypatch.setattr(JinaBatches, "recent", otherwise)


async def test_a_batch_that_is_shown_with_another_model_and_size_is_waited_for_and_found_by_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_otherwise(monkeypatch)
    async with bench(tmp_path, batch_lost_answer=1.0, batch_s=1.2) as on:
        on.admit(texts_of(0))
        await on.work()
        on.check()
        assert on.states == {"completed": 1}
        assert [one.state for one in on.submissions.of_shard(0)] == ["done"]


async def test_one_that_failed_with_another_model_and_size_is_left_to_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_otherwise(monkeypatch)
    async with bench(tmp_path, batch_lost_answer=1.0, batch_failed=1.0) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused)
        assert on.states == {"failed": 1}
        [held] = on.submissions.of_shard(0)
        assert held.held is not None
        assert len(held.held.candidates) == 1


async def test_one_that_is_done_and_has_no_output_is_left_to_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_desk: BatchDesk, batch_id: str, *_: Any, **_now: float) -> None:
        raise refusals.not_found("batch output", batch_id)

    for lines in ("output", "errors"):
        monkeypatch.setattr(BatchDesk, lines, missing)
    async with bench(tmp_path, batch_lost_answer=1.0) as on:
        on.admit(texts_of(0))
        await on.work(until=on.is_paused, within_s=20)
        assert on.states == {"completed": 1}
        [held] = on.submissions.of_shard(0)
        assert held.held is not None
        assert "ended without an output to tell" in held.held.reason


@dataclass
class ListedBatches:
    """An endpoint that only lists. owners: of whom the output of a batch is; a batch without one has no output."""

    listed: list[BatchStatus] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    key_id: str = "k"
    api_base: str = "http://x/v1"

    def show(self, **states: str) -> None:
        self.listed = [
            BatchStatus(
                batch_id, state, "m", total=3, completed=0, failed=0, tokens=0, has_errors=False, error=""  # type: ignore[arg-type]
            )
            for batch_id, state in states.items()
        ]  # fmt: skip

    async def recent(self) -> tuple[Sequence[BatchStatus], bool]:
        return self.listed, True

    async def output(self, batch_id: str) -> AsyncGenerator[BatchLine, None]:
        if batch_id not in self.owners:
            raise OutputMissing(batch_id)
        yield BatchLine(f"{self.owners[batch_id]}-0", None)

    errors = output


def unanswered(folder: Path, endpoint: ListedBatches, *, age: timedelta) -> tuple[Matching, Submission]:
    """A submission that nobody has answered for so long."""
    submissions = Submissions(small_dataset(folder / "dataset"))
    intent = submissions.intend(
        0, range(3), number=1, model="m", tokens=9, key="k", api_base="http://x/v1", worker="w", before=["old"]
    )
    aged = replace(intent, at=(datetime.now(tz=UTC) - age).isoformat())
    matching = Matching(endpoint, submissions, Sightings())  # type: ignore[arg-type]
    return matching, Submission(aged)


async def test_what_others_send_when_the_time_is_up_is_not_waited_for(tmp_path: Path) -> None:
    endpoint = ListedBatches(owners={"a": "stranger"})
    matching, submission = unanswered(tmp_path, endpoint, age=timedelta(hours=1))
    endpoint.show(old="processing", a="processing")
    with pytest.raises(BatchPending, match="which may be a"):
        await matching.find(submission)
    endpoint.show(old="processing", a="completed", b="processing", c="failed")
    assert await matching.find(submission) is None


async def test_what_another_key_lists_says_nothing_of_what_comes_later(tmp_path: Path) -> None:
    endpoint = ListedBatches(key_id="other")
    matching, submission = unanswered(tmp_path, endpoint, age=timedelta(minutes=10))
    with pytest.raises(BatchPending, match="with another key"):
        await matching.find(submission)
    endpoint.key_id = "k"
    endpoint.show(a="processing")
    with pytest.raises(BatchPending, match="which may be a"):
        await matching.find(submission)


async def test_what_another_address_lists_says_nothing(tmp_path: Path) -> None:
    endpoint = ListedBatches(api_base="http://y/v1")
    matching, submission = unanswered(tmp_path, endpoint, age=timedelta(hours=1))
    with pytest.raises(BatchHeld, match="say --api-base http://x/v1"):
        await matching.find(submission)
    assert Submissions(Dataset.open(str(tmp_path / "dataset"))).of_shard(0)[0].held is None
    endpoint.api_base = "http://x/v1"
    endpoint.show(a="processing")
    with pytest.raises(BatchPending, match="which may be a"):
        await matching.find(submission)


async def test_what_was_listed_and_is_not_any_more_is_left_to_a_person(tmp_path: Path) -> None:
    endpoint = ListedBatches()
    matching, submission = unanswered(tmp_path, endpoint, age=timedelta(hours=1))
    endpoint.show(old="processing", a="processing")
    with pytest.raises(BatchPending):
        await matching.find(submission)
    endpoint.show(old="processing")
    with pytest.raises(BatchHeld, match="a may be it"):
        await matching.find(submission)


async def test_an_output_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    endpoint = ListedBatches()
    matching, submission = unanswered(tmp_path, endpoint, age=timedelta(hours=1))
    endpoint.show(a="completed")
    with pytest.raises(BatchPending, match="which may be a"):
        await matching.find(submission)
    endpoint.owners["a"] = submission.intent.attempt
    assert await matching.find(submission) == "a"


async def sent(on: Bench) -> tuple[Intent, str]:
    """A batch that is with the provider, by KEY."""
    on.admit(texts_of(0))
    await on.work(until=lambda: bool(on.submissions.batch_ids()))
    [submission] = on.submissions.of_shard(0)
    assert submission.accepted is not None
    return submission.intent, submission.accepted.batch_id


async def test_a_batch_that_no_key_at_hand_knows_is_not_called_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, batch_s=600) as on:
        intent, batch_id = await sent(on)
        monkeypatch.setenv("JINA_API_KEY", "jina_other,jina_third")
        [left] = await cancel_batches(on.dataset, "main", on.api_base)
        assert f"{batch_id} may go on at the provider: it was sent with another API key ({intent.key})" in left
        assert f"`embedmill batches discard 00000000-0001 --to {on.dataset.url}` counts it as billed" in left
        assert [one.state for one in on.submissions.of_shard(0)] == ["accepted"]
        assert "cancelled" not in on.states


async def test_a_batch_that_its_own_key_does_not_know_any_more_is_not_called_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, batch_s=600) as on:
        _, batch_id = await sent(on)
        monkeypatch.setenv("JINA_API_KEY", KEY)
        on.simulator._desk._jobs.clear()
        [left] = await cancel_batches(on.dataset, "main", on.api_base)
        assert f"the provider does not know {batch_id} any more" in left
        assert [one.state for one in on.submissions.of_shard(0)] == ["accepted"]


@pytest.mark.parametrize("keys", [f"jina_other,{KEY}", f"jina_bad,{KEY}"])
async def test_the_key_that_sent_a_batch_cancels_it_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    async with bench(tmp_path, batch_s=600, bad_key_marker="bad") as on:
        await sent(on)
        monkeypatch.setenv("JINA_API_KEY", keys)
        assert await cancel_batches(on.dataset, "main", on.api_base) == []
        assert on.states == {"cancelled": 1}
        assert [one.state for one in on.submissions.of_shard(0)] == ["cancelled"]


async def test_a_batch_that_is_still_at_work_after_the_cancelling_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = JinaBatches.cancel

    async def begun(endpoint: JinaBatches, batch_id: str) -> BatchStatus | None:
        status = await cancel(endpoint, batch_id)
        return None if status is None else replace(status, state="processing")

    async with bench(tmp_path, batch_s=600) as on:
        await sent(on)
        monkeypatch.setenv("JINA_API_KEY", KEY)
        with monkeypatch.context() as patch:
            patch.setattr(JinaBatches, "cancel", begun)
            [left] = await cancel_batches(on.dataset, "main", on.api_base)
        assert "is still processing: cancel again" in left
        assert await cancel_batches(on.dataset, "main", on.api_base) == []
        assert [one.state for one in on.submissions.of_shard(0)] == ["cancelled"]
