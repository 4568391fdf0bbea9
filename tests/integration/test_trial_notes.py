"""A note of a trial stands exactly while the embedder has its passages: no wait counts against anybody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.embedder import Embedding, Role
from embedmill.errors import Overloaded
from embedmill.messages import Lane
from scheduler.budget import Grant, Unlimited
from tests.datasets import admit_texts
from tests.worker_bench import TestedEmbedder, texts_of
from worker import isolation, requesting
from worker.attempts import RetryPolicy, embed_batch
from worker.embedding import ShardEmbedding, Tools
from worker.requesting import CANARY, Requester, WorkerCounts
from worker.trials import SUSPECT_AFTER, Note, TrialNotes


def standing(dataset: Dataset) -> list[Note]:
    """The notes as another attempt sees them."""
    return TrialNotes(dataset, 0, attempt="other").left()


class WatchedBudget(Unlimited):
    """Looks at the notes while a request waits for its turn."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.waiting: list[list[Note]] = []

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        self.waiting.append(standing(self._dataset))
        yield Grant(est_tokens)


class WatchedEmbedder(TestedEmbedder):
    """Looks at the notes while it has texts; the first `busy` requests that are not the canary fail."""

    def __init__(self, dataset: Dataset, *, busy: int = 0) -> None:
        super().__init__(before=self._look)
        self._dataset = dataset
        self._busy = busy
        self.estimating: list[list[Note]] = []
        self.sending: list[list[Note]] = []

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        if list(texts) != [CANARY]:
            self.estimating.append(standing(self._dataset))
        return super().estimate_tokens(texts)

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        if list(texts) == [CANARY]:
            return Embedding((await super().embed(["c"])).vectors, 1)
        return await super().embed(texts, role=role)

    async def _look(self, texts: list[str]) -> None:
        if texts == ["c"]:
            return
        self.sending.append(standing(self._dataset))
        if self._busy:
            self._busy -= 1
            raise Overloaded("503")


async def work(dataset: Dataset, embedder: WatchedEmbedder, budget: WatchedBudget, *, deliveries: int) -> None:
    tools = Tools(
        embedder=embedder,
        requester=Requester(embedder, budget, WorkerCounts()),
        worker="w",
        permits=anyio.CapacityLimiter(2),
        draining=anyio.Event(),
    )
    assert await ShardEmbedding(tools, dataset, 0, deliveries=deliveries).run() is not None


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = RetryPolicy(base_s=0.0001, cap_s=0.001)
    monkeypatch.setattr(requesting, "embed_batch", partial(embed_batch, policy=fast))
    monkeypatch.setattr(isolation, "control_wait_s", lambda *_, **__: 0.001)


async def test_a_request_that_waits_for_the_budget_or_to_be_sent_again_is_not_noted(dataset: Dataset) -> None:
    admit_texts(dataset, 0, texts_of(0, rows=4))
    embedder, budget = WatchedEmbedder(dataset, busy=2), WatchedBudget(dataset)
    await work(dataset, embedder, budget, deliveries=SUSPECT_AFTER)
    assert embedder.estimating == [[Note((0, 1, 2, 3))]]
    assert embedder.sending == [[Note((0, 1, 2, 3))]] * 3
    assert budget.waiting == [[]] * 3


async def test_a_control_answers_for_one_request_and_no_more(dataset: Dataset) -> None:
    admit_texts(dataset, 0, texts_of(0, rows=1))
    died = Note((0,))
    TrialNotes(dataset, 0, attempt="-").write(died)
    embedder, budget = WatchedEmbedder(dataset, busy=2), WatchedBudget(dataset)
    await work(dataset, embedder, budget, deliveries=1)
    assert embedder.estimating == [[died, Note((0,), controlled=True)]]
    assert [notes[-1] for notes in embedder.sending] == [Note((0,), controlled=True), died, died]
    assert budget.waiting == [[died, Note((0,), control=True)], *[[died]] * 3]
