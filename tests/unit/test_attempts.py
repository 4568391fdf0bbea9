from collections.abc import Sequence
from contextlib import asynccontextmanager, suppress

import anyio
import numpy as np
import pytest

from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import EmbedderFailed, InputRejected, InvalidKey, OutcomeUnknown, Overloaded, RateLimited
from scheduler.budget import Grant, Unlimited
from worker.attempts import RetryBudget, RetryPolicy, embed_batch

FAST = RetryPolicy(base_s=0.0001, cap_s=0.001, limited_cap_s=0.001)


class ScriptedEmbedder:
    """Raises the given errors in turn, then answers."""

    spec = EmbedderSpec(model="scripted/one", dimensions=2)
    limits = BatchLimits(max_inputs=8, max_tokens=100, padded=False, concurrency=1)

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return Embedding(np.ones((len(texts), 2), dtype=np.float32), billed_tokens=5)

    async def aclose(self) -> None: ...


class RecordedBudget(Unlimited):
    def __init__(self) -> None:
        self.grants: list[Grant] = []

    def reserve(self, est_tokens, *, lane="bulk"):
        manager = super().reserve(est_tokens)
        grants = self.grants

        class Recorded:
            async def __aenter__(self):
                grants.append(await manager.__aenter__())
                return grants[-1]

            async def __aexit__(self, *raised):
                return await manager.__aexit__(*raised)

        return Recorded()


async def test_an_answer_settles_with_what_the_provider_counted():
    budget, events = RecordedBudget(), []
    embedding = await embed_batch(ScriptedEmbedder(), ["abc", "de"], budget=budget, on_event=events.append)
    assert embedding.billed_tokens == 5
    assert [(one.outcome, one.est_tokens, one.actual_tokens) for one in budget.grants] == [("used", 5, 5)]
    assert [(one.outcome, one.billed_tokens) for one in events] == [("ok", 5)]


async def test_being_rate_limited_never_spends_an_attempt():
    refusals = [RateLimited("no", limit="tokens", allowed=7)] * 40
    embedder, budget = ScriptedEmbedder(*refusals, *[Overloaded("no")] * 5), RecordedBudget()
    await embed_batch(embedder, ["a"], budget=budget, policy=FAST)
    assert embedder.calls == 46
    assert budget.grants[0].outcome == "limited"
    assert budget.grants[0].refusal is refusals[0]


@pytest.mark.parametrize("error", [Overloaded("busy"), OutcomeUnknown("lost")])
async def test_transient_failures_are_raised_after_six_attempts(error):
    embedder = ScriptedEmbedder(*[error] * 20)
    with pytest.raises(type(error)):
        await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST)
    assert embedder.calls == 6


@pytest.mark.parametrize("error", [InputRejected("bad text"), InvalidKey("bad key")])
async def test_what_cannot_pass_goes_up_at_once(error):
    embedder = ScriptedEmbedder(error, error)
    with pytest.raises(type(error)):
        await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST)
    assert embedder.calls == 1


class PanicException(BaseException):
    """What a panic in Rust looks like in Python."""


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), MemoryError(), PanicException("index out of bounds")])
async def test_what_nobody_foresaw_goes_up_at_once_under_our_name_and_is_charged_with_its_estimate(error):
    embedder, budget, events = ScriptedEmbedder(error, error), RecordedBudget(), []
    with pytest.raises(EmbedderFailed, match=type(error).__name__):
        await embed_batch(embedder, ["a"], budget=budget, policy=FAST, on_event=events.append)
    assert embedder.calls == 1
    assert budget.grants[0].outcome == "unknown"
    assert [(one.outcome, one.billed_tokens) for one in events] == [("embedder_failed", None)]


async def test_waiting_for_a_turn_and_before_the_next_try_is_outside_of_sending():
    inside, seen = [False], []

    class Watched(ScriptedEmbedder):
        async def embed(self, texts, *, role="document"):
            seen.append(("embed", inside[0]))
            return await super().embed(texts, role=role)

    class Waited(Unlimited):
        @asynccontextmanager
        async def reserve(self, est_tokens, *, lane="bulk"):
            seen.append(("reserve", inside[0]))
            yield Grant(est_tokens)

    @asynccontextmanager
    async def sending():
        inside[0] = True
        try:
            yield
        finally:
            inside[0] = False

    embedder = Watched(RateLimited("no"), Overloaded("busy"))
    await embed_batch(embedder, ["a"], budget=Waited(), policy=FAST, sending=sending)
    assert seen == [("reserve", False), ("embed", True)] * 3


async def test_only_an_unknown_outcome_is_charged_with_its_estimate():
    budget, events = RecordedBudget(), []
    embedder = ScriptedEmbedder(Overloaded("busy"), OutcomeUnknown("lost"))
    await embed_batch(embedder, ["abc"], budget=budget, policy=FAST, on_event=events.append)
    assert [(one.outcome, one.actual_tokens) for one in budget.grants] == [("used", 0), ("unknown", 0), ("used", 5)]
    assert [(one.outcome, one.billed_tokens) for one in events] == [
        ("overloaded", 0),
        ("outcome_unknown", None),
        ("ok", 5),
    ]


async def test_the_other_sides_own_word_on_how_long_to_wait_is_kept():
    embedder = ScriptedEmbedder(Overloaded("busy", retry_after_s=0.2))
    began = anyio.current_time()
    await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST)
    assert anyio.current_time() - began >= 0.2


async def test_cancelling_ends_an_endless_wait_for_the_rate():
    embedder = ScriptedEmbedder(*[RateLimited("no")] * 10_000)
    with anyio.move_on_after(0.1) as scope:
        await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST)
    assert scope.cancelled_caught


async def test_retries_of_all_requests_together_are_a_tenth_of_them(monkeypatch):
    retries, attempts = RetryBudget(left=3, every_s=float("inf")), 0
    for _ in range(200):
        embedder = ScriptedEmbedder(Overloaded("503"))
        with suppress(Overloaded):
            await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST, retries=retries)
        attempts += embedder.calls
    assert 200 + 3 <= attempts <= 200 + 3 + 0.1 * 200


async def test_without_retries_left_the_failure_goes_up_at_once_and_refusals_for_rate_are_waited_out_all_the_same():
    retries = RetryBudget(left=0, every_s=float("inf"))
    embedder = ScriptedEmbedder(*[RateLimited("429")] * 5, Overloaded("503"))
    with pytest.raises(Overloaded):
        await embed_batch(embedder, ["a"], budget=Unlimited(), policy=FAST, retries=retries)
    assert embedder.calls == 6


async def test_retries_that_were_saved_up_are_few_and_one_comes_back_in_a_while(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    retries = RetryBudget(left=0, most=2, every_s=10, _counted_at_s=0.0)
    for _ in range(1000):
        retries.earn()
    assert [retries.take() for _ in range(3)] == [True, True, False]
    now_s[0] = 9.0
    assert not retries.take()
    now_s[0] = 10.5
    assert retries.take()
