"""Which answers are believed: one vector for different texts, answers of another shape, and how often they are asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from embedmill.embedder import EmbedderSpec, Embedding
from embedmill.errors import InputRejected, JobFatalError, OutcomeUnknown
from embedmill.messages import Lane
from scheduler.budget import Grant, Unlimited
from tests.worker_bench import TestedEmbedder
from worker import requesting
from worker.embedders.null import hash_vectors
from worker.requesting import CANARY, Requester, WorkerCounts

API = EmbedderSpec("jina/m", 3, max_input_tokens=100, options={"truncate": True})
LOCAL = EmbedderSpec("local/m", 3, max_input_tokens=100)
SHORT = ["one", "two", "three"]
CUT = ["a" * 200 + end for end in "bcd"]
Change = Callable[[list[str], np.ndarray], np.ndarray]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requesting, "_FIRST_PAUSE_S", 0.0)


def broadcast(texts: list[str], vectors: np.ndarray) -> np.ndarray:
    """Each text gets the first one's vector."""
    return np.repeat(vectors[:1], len(texts), axis=0)


def changing() -> Change:
    """Each request gets one vector for all of its texts, another one each time."""
    times = 0

    def change(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        nonlocal times
        times += len(texts) > 1
        return vectors if len(texts) == 1 else np.full_like(vectors, times)

    return change


class Asked:
    """A requester with an embedder that misbehaves, and what was wasted."""

    def __init__(self, spec: EmbedderSpec, change: Change | None = None) -> None:
        self.embedder = TestedEmbedder(change=change, spec=spec)
        self.requester = Requester(self.embedder, Unlimited(), WorkerCounts())
        self.wasted: list[Embedding] = []

    async def ask(self, texts: list[str], *, on_trial: bool = False) -> Embedding:
        return await self.requester.ask(texts, est_tokens=10, on_waste=self.wasted.append, on_trial=on_trial)


@pytest.mark.parametrize("on_trial", [False, True])
@pytest.mark.parametrize("texts", [SHORT, SHORT[:2], [*CUT, "short"]], ids=["three", "two", "not all cut"])
async def test_one_vector_for_texts_that_an_api_can_tell_apart_is_never_believed(
    texts: list[str], on_trial: bool
) -> None:
    asked = Asked(API, broadcast)
    with pytest.raises(JobFatalError, match=f"{len(texts)} different texts got one and the same vector"):
        await asked.ask(texts, on_trial=on_trial)
    assert asked.embedder.requests == [texts] * 5
    assert len(asked.wasted) == 5, "all of it was billed"


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        pytest.param(API, CUT, id="cut by an API"),
        pytest.param(API, ["One two", "one  two"], id="one text to an API"),
        pytest.param(LOCAL, SHORT, id="a local model"),
    ],
)
async def test_one_vector_that_may_be_theirs_is_believed_the_second_time(spec: EmbedderSpec, texts: list[str]) -> None:
    asked = Asked(spec, broadcast)
    answer = await asked.ask(texts)
    assert np.array_equal(answer.vectors, broadcast(texts, hash_vectors(texts, 3)))
    assert asked.embedder.requests == [texts, [CANARY]] * 2


async def test_one_vector_is_not_believed_for_long_texts_in_requests_that_cut_nothing() -> None:
    asked = Asked(API, broadcast)
    refusing = TestedEmbedder(change=broadcast, spec=replace(API, options={"truncate": False}))
    with pytest.raises(JobFatalError, match="3 different texts got one and the same vector"):
        await asked.requester.ask(CUT, est_tokens=10, on_waste=asked.wasted.append, embedder=refusing)


@pytest.mark.parametrize("on_trial", [False, True])
@pytest.mark.parametrize(("spec", "texts"), [(LOCAL, SHORT), (API, CUT)])
async def test_one_vector_that_changes_from_try_to_try_stops_the_job(
    spec: EmbedderSpec, texts: list[str], on_trial: bool
) -> None:
    asked = Asked(spec, changing())
    with pytest.raises(JobFatalError, match="answers cannot be used"):
        await asked.ask(texts, on_trial=on_trial)
    assert asked.embedder.times[texts[0]] == 6, "doubted once, malformed five times"


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        pytest.param(LOCAL, changing(), id="another vector each time"),
        pytest.param(API, broadcast, id="always the same one"),
        pytest.param(API, lambda _, vectors: vectors[:-1], id="a row is missing"),
    ],
)
async def test_malformed_answers_to_some_texts_end_also_while_others_go_well(
    spec: EmbedderSpec, change: Change
) -> None:
    asked = Asked(spec)
    embedder = asked.embedder

    async def another_goes_well(texts: list[str]) -> None:
        if len(texts) > 1:
            await asked.requester.ask(["well"], est_tokens=1, on_waste=asked.wasted.append)

    embedder._before = another_goes_well
    embedder._change = lambda texts, vectors: change(texts, vectors) if len(texts) > 1 else vectors
    with pytest.raises(OutcomeUnknown, match="malformed answer 6 times"):
        await asked.ask(SHORT, on_trial=True)
    assert embedder.times["one"] == 6


class Laned(Unlimited):
    """Remembers in which lane it was asked."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        self.lanes.append(lane)
        async with super().reserve(est_tokens, lane=lane) as grant:
            yield grant


async def test_the_canary_goes_in_the_lane_of_what_it_is_asked_for() -> None:
    budget = Laned()
    requester = Requester(TestedEmbedder(change=broadcast, spec=LOCAL), budget, WorkerCounts())
    await requester.ask(SHORT, est_tokens=1, on_waste=lambda _: None, lane="live")
    await requester.require_well(since_s=float("inf"), complaint="refused", lane="live")
    assert budget.lanes == ["live"] * 5


async def test_a_canary_that_is_refused_names_the_complaint() -> None:
    async def refuse(_: list[str]) -> None:
        raise InputRejected("no")

    requester = Requester(TestedEmbedder(before=refuse, spec=API), Unlimited(), WorkerCounts())
    with pytest.raises(JobFatalError, match="refuses every text, so no document is to blame: too odd"):
        await requester.require_well(since_s=0.0, complaint="too odd")
