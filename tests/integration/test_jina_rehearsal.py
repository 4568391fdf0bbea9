"""Jina's client against the simulator that was written from the published contract."""

import socket

import aiohttp
import aiohttp.web
import anyio
import numpy as np
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import (
    ConfigurationError,
    InputRejected,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
)
from embedmill.models import MODELS
from embedmill.rehearsal import Rehearsal, pretend_tokens, pretend_vector, serve_rehearsal
from scheduler.budget import Budget, Unlimited
from worker.attempts import RetryPolicy, embed_batch
from worker.embedders.jina import JinaEmbedder

KEY = "jina_rehearsal"
TEXTS = ["one", "zwei Wörter", "три", "四", "one"]
FAST = RetryPolicy(base_s=0.001, cap_s=0.01, limited_cap_s=0.01)
V3 = "jina/jina-embeddings-v3"


class Rehearsed:
    """A simulator and an embedder on it, opened together."""

    def __init__(self, *, model=V3, embedder=None, **behaviour):
        self._model, self._options = model, embedder or {"dimensions": 16}
        self._serving = serve_rehearsal(Rehearsal(**behaviour))

    async def __aenter__(self):
        self.api_base, self.simulator = await self._serving.__aenter__()
        self.embedder = JinaEmbedder(self._model, key=KEY, api_base=self.api_base, **self._options)
        return self

    async def __aexit__(self, *raised):
        await self.embedder.aclose()
        return await self._serving.__aexit__(*raised)

    @property
    def stats(self):
        return self.simulator.stats()


def expected(texts, *, model=V3, dimensions=16):
    name = model.removeprefix("jina/")
    return np.stack([pretend_vector(text, model=name, dimensions=dimensions) for text in texts])


@pytest.mark.parametrize("model", sorted(MODELS))
async def test_every_model_keeps_the_published_contract_in_both_roles(model):
    async with Rehearsed(model=model, embedder={"dimensions": None}) as on:
        for role in ("document", "query"):
            embedding = await on.embedder.embed(TEXTS, role=role)
            assert np.array_equal(
                embedding.vectors, expected(TEXTS, model=model, dimensions=MODELS[model].native_dimensions)
            )
            assert embedding.billed_tokens == sum(map(pretend_tokens, TEXTS))


async def test_rows_in_another_order_are_placed_by_index():
    async with Rehearsed(shuffle=1.0) as on:
        for _ in range(5):
            assert np.array_equal((await on.embedder.embed(TEXTS)).vectors, expected(TEXTS))


async def test_a_text_over_the_limit_is_truncated_and_counts_the_limit():
    async with Rehearsed() as on:
        assert (await on.embedder.embed(["word " * 20_000])).billed_tokens == 8192


async def test_late_chunking_over_its_limit_is_refused_and_not_cut():
    async with Rehearsed(embedder={"late_chunking": True}) as on:
        await on.embedder.embed(["word " * 3_000] * 2)
        with pytest.raises(InputRejected, match="8192"):
            await on.embedder.embed(["word " * 3_000] * 3)


@pytest.mark.parametrize(
    ("behaviour", "error", "said"),
    [
        ({"bad_key": True}, InvalidKey, "Invalid API key"),
        ({"error_500": 1.0}, Overloaded, "500"),
        ({"error_503": 1.0}, Overloaded, "503"),
        ({"burst_429": 1.0}, RateLimited, "1,000,00"),
        ({"drop_before": 1.0}, OutcomeUnknown, "did not answer"),
        ({"drop_after": 1.0}, OutcomeUnknown, "did not answer"),
        ({"truncated_body": 1.0}, OutcomeUnknown, "did not answer"),
        ({"missing_row": 1.0}, OutcomeUnknown, "4 vectors for 5 texts"),
        ({"duplicate_index": 1.0}, OutcomeUnknown, "index"),
        ({"reject_marker": "zwei"}, InputRejected, "422"),
        ({"rpm": 1}, RateLimited, "Request rate limit"),
        ({"tpm": 1}, RateLimited, "Token rate limit"),
    ],
)
async def test_every_fault_is_the_error_that_says_what_it_cost(behaviour, error, said):
    async with Rehearsed(**behaviour) as on:
        if "rpm" in behaviour:
            await on.embedder.embed(TEXTS)
        with pytest.raises(error, match=said) as caught:
            await on.embedder.embed(TEXTS)
        assert KEY not in str(caught.value)


async def test_an_empty_account_ends_the_job():
    async with Rehearsed(no_balance_after=10) as on:
        await on.embedder.embed(TEXTS)
        with pytest.raises(NoBalance, match="Insufficient account balance"):
            await on.embedder.embed(TEXTS)


async def test_a_concurrency_refusal_names_its_limit():
    async with Rehearsed(concurrency=1, latency_ms=200) as on:
        refusals = []

        async def one():
            try:
                await on.embedder.embed(TEXTS)
            except RateLimited as error:
                refusals.append((error.limit, error.allowed))

        async with anyio.create_task_group() as requests:
            for _ in range(3):
                requests.start_soon(one)
    assert refusals == [("concurrency", 1)] * 2


async def test_too_many_inputs_and_an_unknown_address_are_told_apart():
    async with Rehearsed() as on:
        with pytest.raises(InputRejected, match="at most 512 items"):
            await on.embedder.embed(["a"] * 513)
        lost = JinaEmbedder(V3, key=KEY, api_base=on.api_base.replace("/v1", "/v9"))
        with pytest.raises(ConfigurationError, match="404"):
            await lost.embed(TEXTS)
        await lost.aclose()


async def test_a_refused_connection_was_not_executed():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        embedder = JinaEmbedder(V3, key=KEY, api_base=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(Overloaded, match="cannot connect"):
            await embedder.embed(TEXTS)
        await embedder.aclose()


async def test_an_answer_that_takes_too_long_is_an_unknown_outcome():
    async with Rehearsed(latency_ms=400, embedder={"attempt_timeout_s": 0.05}) as on:
        with pytest.raises(OutcomeUnknown):
            await on.embedder.embed(TEXTS)


async def test_200_with_a_login_page_is_an_unknown_outcome_with_an_excerpt():
    async def login(_request):
        return aiohttp.web.Response(text="<html>please log in</html>", content_type="text/html")

    app = aiohttp.web.Application()
    app.router.add_post("/v1/embeddings", login)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    embedder = JinaEmbedder(V3, key=KEY, api_base=f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
    with pytest.raises(OutcomeUnknown, match="please log in"):
        await embedder.embed(TEXTS)
    await embedder.aclose()
    await runner.cleanup()


async def test_a_provider_that_fails_often_is_paid_for_what_it_executed_and_answers_in_the_end():
    faults = {"error_500": 0.15, "error_503": 0.1, "drop_before": 0.05, "burst_429": 0.05}
    async with Rehearsed(**faults, seed=1, shuffle=0.5) as on:
        events = []
        for number in range(40):
            texts = [f"text {number} {row}" for row in range(8)]
            embedding = await embed_batch(on.embedder, texts, budget=Unlimited(), policy=FAST, on_event=events.append)
            assert np.array_equal(embedding.vectors, expected(texts))
        billed = sum(event.billed_tokens or 0 for event in events)
        assert on.stats["tokens_billed"] == billed
        assert on.stats["max_per_text"] == 1
        assert {event.outcome for event in events} == {"ok", "overloaded", "outcome_unknown", "rate_limited"}


async def test_a_connection_lost_after_the_work_is_charged_to_the_budget():
    async with Rehearsed(drop_after=1.0) as on:
        connection = Connection(FAKE_URL)
        budget = Budget(connection, namespace="t", key_id="k", tpm=10**6)
        with pytest.raises(OutcomeUnknown):
            await embed_batch(on.embedder, TEXTS, budget=budget, policy=FAST, est_tokens=100)
        assert on.stats["max_per_text"] == 12
        window = await connection.command("HVALS", budget._keys[3])
        assert sum(int(value.split()[1]) for value in window) == 600
        await connection.aclose()


async def test_a_limit_lower_than_configured_is_learned_from_the_refusal():
    async with Rehearsed(tpm=3_000, window_s=1.0) as on:
        connection = Connection(FAKE_URL)
        budget = Budget(connection, namespace="t", key_id="k", tpm=10**6, window_s=1.0)
        for _ in range(14):
            await embed_batch(on.embedder, ["word " * 290], budget=budget, policy=FAST, est_tokens=600)
        assert on.stats["refusals"].get("RATE_TOKEN_LIMIT_EXCEEDED", 0) <= 4
        assert on.stats["peak_window_tokens"] <= 3_000
        await connection.aclose()


async def test_floats_and_base64_are_the_same_unit_vectors():
    body = {"model": "jina-embeddings-v3", "input": ["a"], "dimensions": 32}
    async with Rehearsed(embedder={"dimensions": 32}) as on, aiohttp.ClientSession() as session:
        headers = {"Authorization": "Bearer jina_x"}
        async with session.post(f"{on.api_base}/embeddings", json=body, headers=headers) as response:
            floats = (await response.json())["data"][0]["embedding"]
        encoded = (await on.embedder.embed(["a"])).vectors[0]
    assert np.array_equal(np.float32(floats), encoded)
    assert np.linalg.norm(encoded) == pytest.approx(1, abs=1e-5)
