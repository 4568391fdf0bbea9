"""The request that `run` and `push` send first: what they learn from it, and that it never holds them up for long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from embedmill.commands import probing
from embedmill.commands.probing import probe_provider
from embedmill.embedder import Embedding, Role
from embedmill.errors import BatchPending, InvalidKey, JobFatalError, OutcomeUnknown, RateLimited
from embedmill.messages import Lane
from scheduler.budget import Grant, Unlimited
from scheduler.caps import UNCAPPED, Hold, Uncapped
from worker.embedders.null import NullEmbedder


class Failing(NullEmbedder):
    """Every request ends with this error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(4)
        self.error = error

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        raise self.error


class Closed(Unlimited):
    """The breaker of the fleet is open."""

    trouble = "http://x fails again and again"

    @asynccontextmanager
    async def reserve(self, est_tokens: int, *, lane: Lane = "bulk") -> AsyncIterator[Grant]:
        await anyio.sleep_forever()
        yield Grant(est_tokens)


class Full(Uncapped):
    """Open batches have what is left of the cap."""

    @asynccontextmanager
    async def reserve(self, texts: Sequence[str], *, est_tokens: int) -> AsyncIterator[Hold]:
        raise BatchPending("full")
        yield Hold(est_tokens)


@pytest.mark.parametrize(
    ("embedder", "budget", "cause"),
    [
        (Failing(RateLimited("429", retry_after_s=0.02)), Unlimited(), "the last one: rate_limited"),
        (NullEmbedder(4), Closed(), "http://x fails again and again"),
    ],
    ids=["refused for its rate", "breaker open"],
)
async def test_a_first_request_that_has_to_wait_is_spoken_of_once_and_given_up_after_a_while(
    embedder: NullEmbedder,
    budget: Unlimited,
    cause: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "_SAID_AFTER_S", 0.1)
    monkeypatch.setattr(probing, "_LONGEST_S", 0.3)
    with anyio.fail_after(5):
        assert await probe_provider(embedder, budget, cap=UNCAPPED) == 0
    waits, goes_on = capsys.readouterr().err.splitlines()
    assert waits.startswith("embedmill: waiting for the provider")
    assert "going on all the same" in goes_on
    assert cause in waits
    assert cause in goes_on


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (InvalidKey("401"), InvalidKey, "401"),
        (OutcomeUnknown("hung up", retry_after_s=0.001), JobFatalError, "in vain: hung up; nothing was admitted"),
    ],
)
async def test_what_cannot_pass_ends_the_command(
    error: Exception, raised: type[Exception], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(raised, match=words):
        await probe_provider(Failing(error), Unlimited(), cap=UNCAPPED)
    assert capsys.readouterr().err == ""


async def test_an_answer_is_paid_for_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert await probe_provider(NullEmbedder(4), Unlimited(), cap=UNCAPPED) > 0
    assert await probe_provider(NullEmbedder(4), Unlimited(), cap=Full()) == 0
    assert capsys.readouterr().err == ""
