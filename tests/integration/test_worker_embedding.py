"""What a worker does with answers and refusals, on a real server, with embedders that misbehave in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import anyio
import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED, FAILED
from embedmill.errors import (
    InputRejected,
    JobFatalError,
    PassageTooLarge,
    RequestTooLarge,
)
from scheduler.budget import Unlimited
from scheduler.queue import Depth, Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts
from tests.worker_bench import (
    TestedEmbedder,
    check,
    owe,
    statuses,
    texts_of,
    work_off,
)
from worker import requesting
from worker.embedding import ShardEmbedding, Tools
from worker.results import Increment, ShardResults

pytestmark = pytest.mark.server


async def test_everything_owed_is_embedded_once_and_committed(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0), texts_of(1), texts_of(2, rows=3))
    embedder = TestedEmbedder(concurrency=2)
    worker = await work_off(queue, embedder)
    check(dataset)
    assert set(embedder.times.values()) == {1}
    assert max(map(len, embedder.requests)) == 4
    counts = worker.counts
    assert (counts.embedded, counts.failed, counts.shards, counts.requests) == (19, 0, 3, 5)
    assert counts.tokens == sum(map(len, [*texts_of(0), *texts_of(1), *texts_of(2, rows=3)]))


async def test_what_arrives_last_is_kept_also_where_the_work_is_cancelled_with_it(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit_texts(dataset, 0, texts_of(0))
    add = ShardResults.add

    def add_and_cancel(results: ShardResults, increment: Increment, *, kept: bool = False) -> int:
        added = add(results, increment, kept=kept)
        if not results.owed():
            scope.cancel()
        return added

    monkeypatch.setattr(ShardResults, "add", add_and_cancel)
    embedder = TestedEmbedder()
    tools = Tools(
        embedder=embedder,
        requester=requesting.Requester(embedder, Unlimited(), requesting.WorkerCounts()),
        worker="w",
        permits=anyio.CapacityLimiter(1),
        draining=anyio.Event(),
    )
    with anyio.CancelScope() as scope:
        await ShardEmbedding(tools, dataset, 0, deliveries=1).run()
    assert dataset.marker(0) is None
    await ShardEmbedding(tools, dataset, 0, deliveries=2).run()
    assert statuses(dataset) == [EMBEDDED] * 8
    assert set(embedder.times.values()) == {1}, "paid for twice"


@pytest.mark.parametrize("row", [0, 5, 7])
async def test_a_refused_passage_is_found_by_bisecting_and_is_the_only_dead_letter(
    dataset: Dataset, queue: Queue, row: int
) -> None:
    texts = texts_of(0)
    texts[row] = "poison"

    async def refuse(request: list[str]) -> None:
        if "poison" in request:
            raise InputRejected("this text is not allowed")

    embedder = TestedEmbedder(before=refuse, max_inputs=8)
    await owe(dataset, queue, texts)
    await work_off(queue, embedder)
    check(dataset)
    assert statuses(dataset) == [FAILED if position == row else EMBEDDED for position in range(8)]
    marker = dataset.marker(0)
    assert marker is not None
    assert [(f.row, f.id, f.code, f.cause) for f in marker.failures] == [
        (row, f"0-{row}", "input_rejected", "this text is not allowed")
    ]
    assert (await queue.depth()).dead == 1
    assert embedder.times["poison"] == 4
    # The canary is asked only where nothing was taken since the first refusal.
    assert len(embedder.requests) == 7 + (row == 0)
    assert embedder.times[requesting.CANARY] == int(row == 0)


async def test_a_provider_that_refuses_everything_stops_the_job_and_buries_nobody(
    dataset: Dataset, queue: Queue
) -> None:
    async def refuse(_: list[str]) -> None:
        raise InputRejected("422: no")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(JobFatalError, match="refuses every text"):
        await work_off(queue, TestedEmbedder(before=refuse))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_provider_without_a_usable_vector_for_anything_stops_the_job_and_buries_nobody(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    broken = TestedEmbedder(change=lambda _, vectors: np.full_like(vectors, np.nan))
    with pytest.raises(JobFatalError, match="no usable vector for any text"):
        await work_off(queue, broken)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_passage_beyond_the_keys_limits_stops_the_job_and_is_not_buried(dataset: Dataset, queue: Queue) -> None:
    async def too_large(request: list[str]) -> None:
        if any(text.endswith("shard 0") and " 3 " in text for text in request):
            raise RequestTooLarge("about 580 tokens, and this key may send 400 per minute")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(PassageTooLarge, match=r"passage 0-3 is too large: .* 400 per minute; nothing is lost"):
        await work_off(queue, TestedEmbedder(before=too_large))
    job = dataset.job("main")
    assert job is not None
    assert (job.state, job.stopped_by) == ("paused", "worker")
    dataset.change_job("main", lambda known: replace(known, state="running"))
    await reconcile(dataset, queue)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_texts_that_a_healthy_model_cannot_tell_apart_are_embedded(dataset: Dataset, queue: Queue) -> None:
    def same_for_all_but_the_canary(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        return vectors if texts == [requesting.CANARY] else np.ones_like(vectors)

    await owe(dataset, queue, texts_of(0))
    await work_off(queue, TestedEmbedder(change=same_for_all_but_the_canary))
    assert statuses(dataset) == [EMBEDDED] * 8


@pytest.mark.parametrize("rows", [2, 4])
async def test_one_vector_for_different_texts_is_asked_for_again_and_never_stored(
    dataset: Dataset, queue: Queue, rows: int
) -> None:
    slips = 0

    def slip_once(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        nonlocal slips
        slips += texts != [requesting.CANARY]
        return np.repeat(vectors[:1], len(texts), axis=0) if slips == 1 else vectors

    await owe(dataset, queue, texts_of(0, rows=rows))
    embedder = TestedEmbedder(change=slip_once)
    worker = await work_off(queue, embedder)
    check(dataset)
    assert (embedder.times[texts_of(0)[0]], embedder.times[requesting.CANARY]) == (2, 1)
    assert "one and the same vector" in worker.counts.last_trouble


def spoil(text: str, value: float) -> Callable[[list[str], np.ndarray], np.ndarray]:
    def change(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.copy()
        if text in texts:
            vectors[texts.index(text)] = value
        return vectors

    return change


@pytest.mark.parametrize(("value", "cause"), [(np.nan, "not finite"), (0.0, "zero")])
async def test_a_row_that_does_not_pass_the_gate_is_asked_for_alone_and_then_a_dead_letter(
    dataset: Dataset, queue: Queue, value: float, cause: str
) -> None:
    await owe(dataset, queue, texts_of(0))
    bad = texts_of(0)[2]
    embedder = TestedEmbedder(change=spoil(bad, value))
    await work_off(queue, embedder)
    check(dataset)
    assert [request for request in embedder.requests if bad in request] == [texts_of(0)[:4], [bad], [bad], [bad]]
    assert {embedder.times[text] for text in texts_of(0) if text != bad} == {1}
    marker = dataset.marker(0)
    assert marker is not None
    ((failure),) = marker.failures
    assert (failure.row, failure.code) == (2, "gate")
    assert cause in failure.cause


async def test_a_row_that_passes_the_gate_the_second_time_is_embedded(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0))
    bad = texts_of(0)[2]

    def change(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        return vectors if texts == [bad] else spoil(bad, np.nan)(texts, vectors)

    await work_off(queue, TestedEmbedder(change=change))
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _, vectors: vectors[:-1], id="a row is missing"),
        pytest.param(lambda _, vectors: vectors[:, :2], id="other dimensions"),
        pytest.param(lambda _, vectors: np.ones_like(vectors), id="all alike"),
    ],
)
async def test_answers_that_stay_malformed_stop_the_job_and_lose_nothing(
    dataset: Dataset,
    queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str], np.ndarray], np.ndarray],
) -> None:
    monkeypatch.setattr(requesting, "_MALFORMED_IN_A_ROW", 2)
    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(change=change)
    with pytest.raises(JobFatalError, match="answers cannot be used"):
        await work_off(queue, embedder)
    asked = [request for request in embedder.requests if request != [requesting.CANARY]]
    assert asked == [texts_of(0)[:4]] * 2
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    await work_off(queue, TestedEmbedder())
    check(dataset)
