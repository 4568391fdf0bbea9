"""One process of the quota benchmark: sends requests of texts until it is told to stop, in one of these ways.

budget    through the fleet's budget in Redis, as a worker does
backoff   asyncio.gather and exponential backoff with jitter on every 429
throttle  a limiter in this process with its share of the limits, as in OpenAI's cookbook: it counts down what is left and
          sleeps, and pauses for 15 s scaled after a 429
calls     through the budget, without anything behind it: a request is a pause of its latency
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pydoc_data.topics import topics
from typing import Any

import anyio

from embedmill.connection import Connection
from embedmill.errors import RateLimited, TransientError
from scheduler.breaker import Breaker
from scheduler.budget import Budget
from scheduler.keyring import Key, KeyRing
from worker.attempts import embed_batch
from worker.embedders.jina import JinaEmbedder

from .processes import say_result, wait_for_go

_TEXTS = [text[start : start + 400] for text in topics.values() for start in range(0, len(text) - 400, 400)]
_PAUSE_S = 15.0
# As in a minute that lasts one: the budget's own.
_SLACK_S, _AHEAD_S = 0.25, 5.0
_BACKOFF_S = (0.5, 20.0)
_LATENCY_S = 0.12

Send = Callable[[list[str]], Awaitable[None]]


class Traffic:
    """Batches of texts of about so many tokens, and what became of them."""

    def __init__(self, embedder: JinaEmbedder, *, tokens: int, seed: int) -> None:
        self.embedder = embedder
        self._tokens = tokens
        self._chance = random.Random(seed)
        self.requests = 0

    def batch(self) -> list[str]:
        """A third more or less than the mean; none where tokens are not what is measured."""
        if not self._tokens:
            return []
        wanted = self._tokens * self._chance.uniform(0.65, 1.35)
        texts, tokens = [], 0.0
        while tokens < wanted:
            texts.append(self._chance.choice(_TEXTS))
            tokens += len(texts[-1]) / 3.7
        return texts


async def _with_budget(traffic: Traffic, options: dict[str, Any]) -> Send:
    connection = Connection(options["redis"])
    limits = {name: options[name] for name in ("rpm", "tpm", "concurrency")}
    scale = options["window_s"] / 60
    budget = Budget(
        connection, namespace=options["namespace"], key_id="k",
        window_s=options["window_s"], slack_s=_SLACK_S * scale, max_wait_s=_AHEAD_S * scale, **limits,
    )  # fmt: skip

    breaker = Breaker(connection, namespace=options["namespace"], key_id="k", api_base=options["api_base"])
    ring = KeyRing(["rehearsal"], open_key=lambda secret: Key(secret, budget, breaker))

    async def send(texts: list[str]) -> None:
        await embed_batch(traffic.embedder, texts, budget=ring)

    async def pause(_texts: list[str]) -> None:
        async with budget.reserve(1) as grant:
            await anyio.sleep(_LATENCY_S)
            grant.settle(1)

    return pause if options["way"] == "calls" else send


async def _with_backoff(traffic: Traffic, options: dict[str, Any]) -> Send:
    scale = options["window_s"] / 60

    async def send(texts: list[str]) -> None:
        wait_s, longest_s = (s * scale for s in _BACKOFF_S)
        while True:
            try:
                await traffic.embedder.embed(texts)
                return
            except TransientError:
                await anyio.sleep(random.uniform(0, wait_s))
                wait_s = min(longest_s, 2 * wait_s)

    return send


async def _with_throttle(traffic: Traffic, options: dict[str, Any]) -> Send:
    """This process' share of the limits, refilled continuously, full at the start."""
    share = 1 / options["processes"]
    rates = [options["rpm"] * share / options["window_s"], options["tpm"] * share / options["window_s"]]
    full = [options["rpm"] * share, options["tpm"] * share]
    left, at, paused_until = list(full), anyio.current_time(), 0.0
    turn = anyio.Lock()

    async def acquire(tokens: int) -> None:
        nonlocal left, at
        async with turn:
            while True:
                now = anyio.current_time()
                left = [min(f, amount + rate * (now - at)) for f, amount, rate in zip(full, left, rates, strict=True)]
                at = now
                if now >= paused_until and left[0] >= 1 and left[1] >= tokens:
                    left = [left[0] - 1, left[1] - tokens]
                    return
                await anyio.sleep(0.01)

    async def send(texts: list[str]) -> None:
        nonlocal paused_until
        while True:
            await acquire(sum(traffic.embedder.estimate_tokens(texts)))
            try:
                await traffic.embedder.embed(texts)
                return
            except RateLimited:
                paused_until = anyio.current_time() + _PAUSE_S * options["window_s"] / 60
            except TransientError:
                pass

    return send


_WAYS = {"budget": _with_budget, "calls": _with_budget, "backoff": _with_backoff, "throttle": _with_throttle}


async def _run(options: dict[str, Any]) -> dict[str, Any]:
    embedder = JinaEmbedder(
        "jina/jina-embeddings-v3", key="rehearsal", api_base=options["api_base"], dimensions=8,
        concurrency=options["slots"], tokens_per_minute=options["tpm"],
    )  # fmt: skip
    traffic = Traffic(embedder, tokens=options["tokens"], seed=options["seed"])
    send = await _WAYS[options["way"]](traffic, options)
    wait_for_go()
    began_cpu_s = time.process_time()
    deadline = time.monotonic() + options["seconds"]

    async def slot() -> None:
        while True:
            await send(traffic.batch())
            traffic.requests += 1

    with anyio.move_on_after(deadline - time.monotonic()):
        async with anyio.create_task_group() as group:
            for _ in range(options["slots"]):
                group.start_soon(slot)
    spent_s = time.process_time() - began_cpu_s
    await embedder.aclose()
    return {"requests": traffic.requests, "sending_cpu_s": spent_s, "error": embedder.estimator.error}


if __name__ == "__main__":
    say_result(anyio.run(_run, json.loads(sys.argv[1])))
