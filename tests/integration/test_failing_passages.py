"""A passage that fails for ever is found and buried with its cause, and keeps nobody from other work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED
from embedmill.errors import BatchPending, EmbedmillError, Overloaded, RequestTooLarge
from scheduler.budget import Unlimited
from scheduler.queue import Depth, Queue
from tests.datasets import small_dataset
from tests.worker_bench import Hook, TestedEmbedder, check, kept_rows, owe, statuses, texts_of, until, work_off
from worker import embedding, isolation, requesting, service
from worker.attempts import RetryPolicy, embed_batch
from worker.requesting import CANARY
from worker.service import Worker
from worker.trials import FAILURES_TO_BURY, FAILURES_TO_SUSPECT

pytestmark = pytest.mark.server


class PanicException(BaseException):
    """What a panic in Rust looks like in Python."""


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(service, "_LONGEST_RETRY_S", 0.02)
    monkeypatch.setattr(service, "_IDLE_S", 0.02)
    monkeypatch.setattr(requesting, "embed_batch", partial(embed_batch, policy=RetryPolicy(max_attempts=1)))


def fail_at(*bad: str, error: BaseException) -> Hook:
    async def fail(request: list[str]) -> None:
        if any(text in bad for text in request):
            raise error

    return fail


def failures(dataset: Dataset, shard: int = 0) -> list[tuple[int, str, str]]:
    marker = Dataset.open(dataset.url).marker(shard)
    assert marker is not None
    return [(failure.row, failure.code, failure.cause) for failure in marker.failures]


@pytest.mark.parametrize("patient", [True, False], ids=["worker", "run"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("no such token"), "embedder_failed"),
        (MemoryError(), "embedder_failed"),
        (PanicException("index out of bounds"), "embedder_failed"),
        (Overloaded("500 internal error", retry_after_s=0.001), "overloaded"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_a_passage_at_which_the_embedder_fails_for_ever_becomes_the_only_dead_letter(
    dataset: Dataset, queue: Queue, error: BaseException, code: str, patient: bool
) -> None:
    await owe(dataset, queue, texts_of(0), texts_of(1))
    embedder = TestedEmbedder(before=fail_at(texts_of(0)[5], error=error), max_inputs=8)
    await work_off(queue, embedder, shards_in_flight=1, patient=patient)
    check(dataset)
    ((row, found, cause),) = failures(dataset)
    assert (row, found) == (5, code)
    said = str(error) if isinstance(error, Overloaded) else type(error).__name__
    assert said in cause
    assert f"failed {FAILURES_TO_BURY} times" in cause
    assert statuses(dataset, 1) == [EMBEDDED] * 8
    deliveries = FAILURES_TO_SUSPECT + FAILURES_TO_BURY
    assert deliveries <= embedder.times[texts_of(0)[5]] <= deliveries + 3


async def test_a_tokenizer_that_fails_at_a_passage_is_no_different(dataset: Dataset, queue: Queue) -> None:
    class Picky(TestedEmbedder):
        def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
            if texts_of(0)[5] in texts:
                raise IndexError("no such piece")
            return super().estimate_tokens(texts)

    await owe(dataset, queue, texts_of(0))
    await work_off(queue, Picky(), patient=True)
    check(dataset)
    ((row, code, cause),) = failures(dataset)
    assert (row, code) == (5, "embedder_failed")
    assert "IndexError('no such piece')" in cause


async def test_while_the_provider_fails_at_every_text_nothing_is_buried(dataset: Dataset, queue: Queue) -> None:
    well = False

    async def fail(_: list[str]) -> None:
        if not well:
            raise Overloaded("503")

    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=fail)
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=1, patient=True)

    async def asked_the_canary_often() -> bool:
        return embedder.times[CANARY] > FAILURES_TO_BURY + 1

    async def done() -> bool:
        return (await queue.depth()).open == 0

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(asked_the_canary_often)
        well = True
        await until(done)
        worker.stop()
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_shard_in_trials_that_waits_for_batches_to_end_is_put_off_and_buries_nobody(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "FAILURES_TO_SUSPECT", 0)
    waited = 0

    async def wait_for_batches(request: list[str]) -> None:
        nonlocal waited
        waited += 1
        if waited <= FAILURES_TO_BURY + 2:
            raise BatchPending("open batches hold what is left of the job's cap", retry_after_s=0.001)

    await owe(dataset, queue, texts_of(0, rows=1))
    embedder = TestedEmbedder(before=wait_for_batches)
    await work_off(queue, embedder, patient=True)
    check(dataset)
    assert failures(dataset) == []
    assert embedder.times[CANARY] == 0, "nobody is to blame, so there is nothing to find out"


async def test_a_delivery_ends_after_a_few_passages_that_fail(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_MOST_FAILED_ALONE", 2)
    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=fail_at(*texts_of(0)[:4], error=RuntimeError("no")))
    await work_off(queue, embedder, patient=True)
    check(dataset)
    assert [row for row, _, _ in failures(dataset)] == [0, 1, 2, 3]
    sent = [[int(text.split()[1]) for text in request] for request in embedder.requests if request != [CANARY]]
    first_alone = next(number for number, rows in enumerate(sent) if len(rows) == 1)
    assert sent[first_alone : first_alone + 2] == [[0], [1]]
    # The next delivery: the rest of what failed together, before what failed alone.
    assert sent[first_alone + 2] == [2, 3, 4, 5][: len(sent[first_alone + 2])]


async def test_an_embedder_that_fails_at_every_text_ends_the_worker_and_counts_nothing_against_the_shard(
    dataset: Dataset, queue: Queue
) -> None:
    async def break_down(_: list[str]) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(
        EmbedmillError, match=r"shard 0 failed in an unforeseen way, and so does any text: .*CUDA error"
    ):
        await work_off(queue, TestedEmbedder(before=break_down), patient=True)
    (lease,) = await queue.lease("w")
    assert (lease.deliveries, lease.attempts) == (1, 0)
    assert kept_rows(dataset) == []


async def test_a_passage_that_no_limit_allows_pauses_its_job_and_the_worker_goes_on(
    dataset: Dataset, queue: Queue, tmp_path: Path
) -> None:
    other = small_dataset(tmp_path / "other", dataset_id="d1")
    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=fail_at(texts_of(0)[5], error=RequestTooLarge("580 tokens of 400 a minute")))
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=1, patient=True)

    async def paused() -> bool:
        job = dataset.job("main")
        return job is not None and job.state == "paused" and await queue.depth() == Depth(0, 1, 0, 0, 0)

    async def other_is_done() -> bool:
        return not other.owed()

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(paused)
        await owe(other, queue, texts_of(1))
        await until(other_is_done)
        worker.stop()
    job = dataset.job("main")
    assert job is not None
    assert (job.stopped_by, "passage 0-5 is too large: 580 tokens of 400 a minute" in job.reason) == ("worker", True)
    assert "is paused: passage 0-5 is too large" in worker.counts.last_trouble
    assert dataset.owed() == [0]
    assert len(kept_rows(dataset)) >= 1, "what was paid for was not kept"


def break_shards(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    read = Dataset.documents

    def documents(dataset: Dataset, shard: int, **options: Sequence[str]) -> object:
        if shard in broken:
            raise ValueError("a bug")
        return read(dataset, shard, **options)

    monkeypatch.setattr(Dataset, "documents", documents)


async def test_a_shard_that_fails_outside_of_the_embedder_waits_while_others_go_on(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await owe(dataset, queue, *map(texts_of, range(4)))
    break_shards(monkeypatch, 1)
    worker = Worker(queue, TestedEmbedder(), budget=Unlimited(), grace_s=1, patient=True)

    async def others_are_done() -> bool:
        return [shard for shard in range(4) if dataset.marker(shard) is None] == [1]

    async def done() -> bool:
        return (await queue.depth()).open == 0

    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await until(others_are_done)
        assert "shard 1 failed in an unforeseen way: ValueError('a bug')" in worker.counts.last_trouble
        monkeypatch.undo()
        await until(done)
        worker.stop()
    check(dataset)


async def test_a_worker_ends_when_several_shards_in_a_row_fail_outside_of_the_embedder(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await owe(dataset, queue, *map(texts_of, range(6)))
    break_shards(monkeypatch, *range(6))
    with pytest.raises(EmbedmillError, match="failed in an unforeseen way"):
        await work_off(queue, TestedEmbedder(), patient=True, shards_in_flight=1)
    depth = await queue.depth()
    assert (depth.open, depth.leased) == (6, 0)
