"""The simulator over HTTP, without our client: keys, limits, faults and counters."""

import asyncio
import json
import math
from contextlib import asynccontextmanager

import aiohttp
import anyio
import pytest

from embedmill.rehearsal import Rehearsal, account_name, pretend_tokens, serve_rehearsal

BODY = {"model": "jina-embeddings-v3", "input": ["one", "zwei Wörter", "three"], "dimensions": 8}
TOKENS = sum(map(pretend_tokens, BODY["input"]))
TPM, RPM = "RATE_TOKEN_LIMIT_EXCEEDED", "RATE_REQUEST_LIMIT_EXCEEDED"


class Client:
    """What a program without our code sees. `stats` reads the counters over HTTP, too."""

    def __init__(self, base, session):
        self.base, self._session = base, session

    async def send(self, method, path, *, key="jina_a", **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self._session.request(method, f"{self.base}{path}", headers=headers, **options) as response:
            return response.status, response.headers, await response.read()

    async def embed(self, body=BODY, *, key="jina_a", **options):
        status, headers, content = await self.send("POST", "/v1/embeddings", key=key, json=body, **options)
        return status, headers, json.loads(content)

    async def stats(self):
        return json.loads((await self.send("GET", "/stats"))[2])

    async def idle(self):
        with anyio.fail_after(10):
            while True:
                if not (await self.stats())["in_flight"]:
                    return
                await anyio.sleep(0.01)


@asynccontextmanager
async def rehearsed(**behaviour):
    async with serve_rehearsal(Rehearsal(**behaviour)) as (api_base, _), aiohttp.ClientSession() as session:
        yield Client(api_base.removesuffix("/v1"), session)


async def test_an_answer_has_a_row_for_each_text_and_the_bill():
    async with rehearsed() as client:
        status, headers, content = await client.embed()
    assert status == 200
    assert [row["index"] for row in content["data"]] == [0, 1, 2]
    assert {len(row["embedding"]) for row in content["data"]} == {8}
    assert content["usage"] == {"total_tokens": TOKENS, "prompt_tokens": TOKENS}
    assert "X-RateLimit-Remaining-Tokens" not in headers


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "AUTH_MISSING_API_KEY"),
        ({"Authorization": "Basic x"}, "AUTH_INVALID_FORMAT"),
        ({"Authorization": "Bearer jina_revoked"}, "AUTH_INVALID_API_KEY"),
    ],
)
async def test_a_request_without_a_usable_key_is_refused_with_its_reason(headers, code):
    async with rehearsed(bad_key_marker="revoked") as client, aiohttp.ClientSession() as session:
        async with session.post(f"{client.base}/v1/embeddings", json=BODY, headers=headers) as response:
            assert (response.status, (await response.json())["code"]) == (401, code)
        assert (await client.embed())[0] == 200


async def test_two_keys_have_limits_balance_and_counters_of_their_own():
    async with rehearsed(rpm=1, no_balance_after=1, window_s=0.5) as client:
        assert [(await client.embed(key=key))[0] for key in ("jina_a", "jina_b")] == [200, 200]
        assert [(await client.embed(key=key))[0] for key in ("jina_a", "jina_b", "jina_c")] == [403, 403, 200]
        stats = await client.stats()
    assert stats["tokens_billed"] == 3 * TOKENS
    assert stats["keys"][account_name("jina_a")]["refusals"] == {"AUTHZ_INSUFFICIENT_BALANCE": 1}
    assert stats["keys"][account_name("jina_c")]["requests"] == 1
    assert "jina_" not in json.dumps(stats["keys"])
    assert stats["texts_by_payments"] == {"3": 3}


@pytest.mark.parametrize(("limits", "code"), [({"rpm": 2}, RPM), ({"tpm": 2 * TOKENS}, TPM)])
async def test_what_is_left_is_in_the_headers_and_a_refusal_has_no_retry_after(limits, code):
    async with rehearsed(**limits) as client:
        name = "X-RateLimit-Remaining-" + ("Requests" if "rpm" in limits else "Tokens")
        left = [int((await client.embed())[1][name]) for _ in range(2)]
        status, headers, content = await client.embed()
    assert left == [1, 0] if "rpm" in limits else [TOKENS, 0]
    assert (status, content["code"], headers[name]) == (429, code, "0")
    assert "Retry-After" not in headers


async def test_retry_after_is_announced_and_limit_headers_are_left_out_where_asked_for():
    async with rehearsed(rpm=1, retry_after=1.5, limit_headers=False) as client:
        await client.embed()
        _, headers, _ = await client.embed()
    assert headers["Retry-After"] == "1.5"
    assert not [name for name in headers if name.startswith("X-RateLimit")]


@pytest.mark.parametrize(
    ("fault", "status", "code", "billed"),
    [
        ("error_500", 500, "INTERNAL_ERROR", False),
        ("error_503", 503, "SERVICE_UNAVAILABLE", False),
        ("error_504", 504, "SERVICE_TIMEOUT", True),
        ("error_200", 200, "INTERNAL_ERROR", True),
        ("request_429", 429, RPM, False),
        ("token_429", 429, TPM, False),
        ("burst_429", 429, TPM, False),
        ("concurrency_429", 429, "RATE_CONCURRENCY_LIMIT_EXCEEDED", False),
        ("ip_429", 429, "RATE_IP_LIMIT_EXCEEDED", False),
    ],
)
async def test_a_refusing_fault_has_the_vendors_code_and_is_billed_only_if_the_work_was_done(
    fault, status, code, billed
):
    async with rehearsed(**{fault: 1.0}) as client:
        answered, _, content = await client.embed()
        stats = await client.stats()
    assert (answered, content["code"]) == (status, code)
    assert {"detail", "code", "request_id"} <= set(content)
    assert stats["tokens_billed"] == (TOKENS if billed else 0)
    assert stats["faults"] == {fault: 1}


@pytest.mark.parametrize(("fault", "status"), [("error_502", 502), ("html_200", 200)])
async def test_a_page_of_a_proxy_is_html_and_costs_nothing(fault, status):
    async with rehearsed(**{fault: 1.0}) as client:
        answered, headers, content = await client.send("POST", "/v1/embeddings", json=BODY)
        stats = await client.stats()
    assert (answered, headers["Content-Type"].split(";")[0]) == (status, "text/html")
    assert content.startswith(b"<html>")
    assert (stats["tokens_billed"], stats["ok"]) == (0, 0)


@pytest.mark.parametrize(
    ("fault", "error", "billed"),
    [
        ("drop_before", aiohttp.ClientOSError, 0),
        ("drop_after", aiohttp.ClientOSError, TOKENS),
        ("truncated_body", aiohttp.ClientPayloadError, TOKENS),
    ],
)
async def test_a_lost_connection_says_nothing_about_the_bill(fault, error, billed):
    async with rehearsed(**{fault: 1.0}) as client:
        with pytest.raises(error):
            await client.embed()
        assert (await client.stats())["tokens_billed"] == billed


async def test_a_hanging_request_is_billed_and_frees_its_place_when_the_client_gives_up():
    async with rehearsed(hang=1.0, concurrency=1) as client:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await client.embed(timeout=aiohttp.ClientTimeout(total=0.2))
            await client.idle()
        stats = await client.stats()
    assert stats["tokens_billed"] == 2 * TOKENS
    assert stats["statuses"]["hung"] == 2


async def test_a_request_whose_client_did_not_wait_is_billed_all_the_same():
    async with rehearsed(latency_ms=300) as client:
        with pytest.raises(TimeoutError):
            await client.embed(timeout=aiohttp.ClientTimeout(total=0.1))
        await client.idle()
        assert (await client.stats())["tokens_billed"] == TOKENS


async def rows_with(fault):
    async with rehearsed(**{fault: 1.0}, seed=1) as client:
        status, _, content = await client.embed()
    assert status == 200
    return [row["index"] for row in content["data"]], [row["embedding"] for row in content["data"]]


async def test_spoiled_answers_are_spoiled_as_named():
    assert (await rows_with("missing_row"))[0] == [0, 1]
    assert (await rows_with("extra_row"))[0] == [0, 1, 2, 3]
    assert (await rows_with("duplicate_index"))[0] == [0, 1, 0]
    assert sorted((await rows_with("shuffle"))[0]) == [0, 1, 2]
    assert all(map(math.isnan, (await rows_with("nan_row"))[1][2]))
    assert (await rows_with("zero_row"))[1][2] == [0.0] * 8
    same = (await rows_with("same_vectors"))[1]
    assert same[0] == same[1] == same[2]


async def test_the_same_seed_gives_the_same_faults_and_their_share_is_what_was_asked_for():
    async def outcomes(seed):
        async with rehearsed(error_503=0.2, token_429=0.1, missing_row=0.1, seed=seed) as client:
            statuses = [(await client.embed())[0] for _ in range(300)]
            return statuses, (await client.stats())["faults"]

    first, again, other = [await outcomes(seed) for seed in (5, 5, 6)]
    assert first == again != other
    assert first[1]["error_503"] == pytest.approx(60, abs=25)
    assert first[1]["missing_row"] == pytest.approx(30, abs=18)


async def test_latency_grows_with_tokens():
    async with rehearsed(ms_per_1k_tokens=100.0) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await client.embed({**BODY, "input": "word " * 2_998})
        assert loop.time() - began >= 0.3


async def test_a_reset_begins_a_new_period_and_keeps_the_whole():
    async with rehearsed(tpm=TOKENS * 10) as client:
        await client.embed()
        ended = json.loads((await client.send("POST", "/stats/reset"))[2])
        await client.embed()
        await client.embed()
        stats = await client.stats()
    assert (ended["tokens_admitted"], stats["tokens_admitted"]) == (TOKENS, 3 * TOKENS)
    period = stats["since_reset"]
    assert (period["ok"], period["tokens_admitted"], sum(period["tokens_admitted_by_second"])) == (
        2,
        2 * TOKENS,
        2 * TOKENS,
    )
    assert period["utilisation"] == pytest.approx(period["tokens_admitted_per_s"] / (TOKENS / 6), rel=1e-3)
    assert set(period["keys"]) == {account_name("jina_a")}


async def test_fields_that_a_model_does_not_have_are_ignored_and_counted():
    async with rehearsed() as client:
        status, _, content = await client.embed({**BODY, "model": "jina-embeddings-v2-base-en", "late_chunking": True})
        stats = await client.stats()
    assert (status, len(content["data"][0]["embedding"])) == (200, 768)
    assert set(stats["undeclared_fields"]) == {
        "jina-embeddings-v2-base-en: dimensions",
        "jina-embeddings-v2-base-en: late_chunking",
    }


async def test_models_and_health_need_no_key_and_what_is_not_there_is_said_in_json():
    async with rehearsed() as client:
        status, _, content = await client.send("GET", "/v1/models", key="")
        assert status == 200
        ids = {model["id"] for model in json.loads(content)["data"]}
        assert {"jina-ai/jina-embeddings-v3", "jina-ai/elser-v2"} <= ids
        for name in ("jina-ai/jina-embeddings-v4", "jina-embeddings-v4"):
            status, _, content = await client.send("GET", f"/v1/models/{name}", key="")
            assert (status, json.loads(content)["id"]) == (200, "jina-ai/jina-embeddings-v4")
        assert (await client.send("GET", "/v1/models/jina-x"))[0] == 404
        assert (await client.send("GET", "/health", key=""))[0] == 200
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/embeddings", 405)):
            answered, _, content = await client.send(method, path)
            assert (answered, "detail" in json.loads(content)) == (status, True)


@pytest.mark.parametrize("window", ["sliding", "fixed", "bucket"])
async def test_every_window_admits_a_quota_and_then_refuses(window):
    async with rehearsed(tpm=TOKENS * 3, window=window, window_s=30) as client:
        assert [(await client.embed())[0] for _ in range(4)] == [200, 200, 200, 429]
        stats = await client.stats()
    assert stats["limits"]["window"] == window
    assert stats["peak_window_tokens"] == 3 * TOKENS
