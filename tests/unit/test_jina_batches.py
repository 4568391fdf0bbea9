"""Jina's batch endpoint as its description fixes it: what is sent, and what every answer means."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from aiohttp import web

from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputRejected,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
    RequestTooLarge,
)
from worker.batch_endpoint import BatchLine, EmbedsInBatches, OutputMissing
from worker.embedders.jina import JinaEmbedder
from worker.embedders.jina_batches import JinaBatches

VENDOR = json.loads((Path(__file__).parent.parent / "data" / "jina_openapi_excerpt.json").read_text())
REQUEST_SCHEMA = {"$ref": "#/components/schemas/BatchEmbeddingRequest", "components": VENDOR["components"]}
SMALL = "jina/jina-embeddings-v5-text-small"
STATUS = {
    "batch_id": "batch_abc123",
    "status": "completed",
    "model": "jina-embeddings-v5-text-small",
    "created_at": "2024-01-15T10:30:00Z",
    "stats": {"total": 1000, "completed": 998, "failed": 2, "total_tokens": 77},
}


@asynccontextmanager
async def endpoint(
    answer: Any, *, status: int = 200, model: str = SMALL, **options: Any
) -> AsyncIterator[tuple[JinaBatches, list[tuple[str, str, bytes]]]]:
    """The endpoint on a server that gives everybody this answer, and what it was asked."""
    asked: list[tuple[str, str, bytes]] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append((request.method, request.path_qs, await request.read()))
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return web.Response(body=body, status=status, content_type="application/json")

    application = web.Application(client_max_size=2**26)
    application.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    embedder = JinaEmbedder(
        model,
        key="jina_secret",
        api_base=f"http://127.0.0.1:{runner.addresses[0][1]}/v1",
        **{"dimensions": 2, **options},
    )
    batches = embedder.batch_endpoint()
    try:
        yield batches, asked
    finally:
        await batches.aclose()
        await embedder.aclose()
        await runner.cleanup()


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {"task": "retrieval", "dimensions": 2, "normalized": True}),
        ({"task": "clustering", "dimensions": None}, {"task": "clustering", "dimensions": 1024}),
        ({"task": "text-matching", "normalized": False}, {"task": "text-matching", "normalized": False}),
    ],
)
async def test_what_is_submitted_is_what_the_description_declares(
    options: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    async with endpoint(STATUS, **options) as (batches, asked):
        status = await batches.submit({"a-0": "one", "a-7": 'sieben "7"'})
    [(method, path, raw)] = asked
    body = json.loads(raw)
    assert (method, path) == ("POST", "/v1/batch/embeddings")
    jsonschema.validate(body, REQUEST_SCHEMA)
    assert set(body) == {"model", "task", "dimensions", "normalized", "input"}
    assert body["input"] == [
        {"custom_id": "a-0", "body": {"input": "one"}},
        {"custom_id": "a-7", "body": {"input": 'sieben "7"'}},
    ]
    assert {name: body[name] for name in fields} == fields
    assert (status.batch_id, status.state, status.total, status.failed, status.tokens) == (
        "batch_abc123", "completed", 1000, 2, 77,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, InvalidKey),
        (403, NoBalance),
        (400, InputRejected),
        (404, ConfigurationError),
        (409, Overloaded),
        (413, RequestTooLarge),
        (422, InputRejected),
        (429, RateLimited),
        (503, Overloaded),
        # A batch may have come of these.
        (201, OutcomeUnknown),
        (202, OutcomeUnknown),
        (204, OutcomeUnknown),
        (307, OutcomeUnknown),
        (408, OutcomeUnknown),
        (500, OutcomeUnknown),
        (502, OutcomeUnknown),
        (504, OutcomeUnknown),
    ],
)
async def test_only_a_refusal_that_comes_instead_of_beginning_says_that_there_is_no_batch(
    status: int, error: type[EmbedmillError]
) -> None:
    async with endpoint({"detail": "no"}, status=status) as (batches, _):
        with pytest.raises(error):
            await batches.submit({"a-0": "one"})


@pytest.mark.parametrize("status", [201, 202])
async def test_a_batch_that_is_said_to_be_created_or_accepted_is_one(status: int) -> None:
    async with endpoint(STATUS, status=status) as (batches, _):
        assert (await batches.submit({"a-0": "one"})).batch_id == "batch_abc123"


@pytest.mark.parametrize(
    "rubbish",
    [
        {},
        [],
        {"batch_id": "batch_1"},
        {**STATUS, "status": "lost"},
        {**STATUS, "batch_id": "../../classifiers/1"},
        {**STATUS, "batch_id": 7},
        b"<html>a proxy</html>",
        b"",
    ],
)
async def test_an_answer_that_is_no_status_leaves_the_outcome_unknown(rubbish: Any) -> None:
    async with endpoint(rubbish) as (batches, _):
        with pytest.raises(OutcomeUnknown):
            await batches.submit({"a-0": "one"})
        with pytest.raises(OutcomeUnknown):
            await batches.status("batch_1")


@pytest.mark.parametrize("stats", [None, {}, {"total": 0}, {"total": "many", "failed": -1}])
async def test_a_status_without_numbers_is_one_all_the_same(stats: Any) -> None:
    async with endpoint({**STATUS, "stats": stats}) as (batches, _):
        status = await batches.status("batch_abc123")
    assert status is not None
    assert (status.total, status.completed, status.failed, status.tokens) == (None, 0, 0, 0)


async def test_an_id_that_would_lead_elsewhere_is_never_asked_for() -> None:
    async with endpoint(STATUS) as (batches, asked):
        with pytest.raises(ConfigurationError, match="is no batch's id"):
            await batches.cancel("../classifiers/1")
    assert asked == []


@pytest.mark.parametrize("status", [404, 410])
async def test_a_batch_that_the_key_does_not_know_is_none(status: int) -> None:
    async with endpoint({"detail": "not found"}, status=status) as (batches, asked):
        assert await batches.status("batch_1") is None
        assert await batches.cancel("batch_1") is None
    assert [(method, path) for method, path, _ in asked] == [
        ("GET", "/v1/batch/batch_1"), ("DELETE", "/v1/batch/batch_1"),
    ]  # fmt: skip


async def test_a_list_is_all_there_is_when_it_is_shorter_than_the_shortest_limit() -> None:
    async with endpoint([STATUS] * 19) as (batches, _):
        assert (await batches.recent())[1]
    async with endpoint([STATUS] * 20) as (batches, asked):
        listed, is_all = await batches.recent()
    assert (len(listed), is_all) == (20, False)
    assert asked[0][1] == "/v1/batches?limit=100"


async def test_what_the_list_says_in_another_way_is_a_batch_that_may_be_anything() -> None:
    odd = [{**STATUS, "status": "cancelling"}, {**STATUS, "model": None}, {"batch_id": "batch_abc123"}]
    async with endpoint([STATUS, *odd]) as (batches, _):
        listed, is_all = await batches.recent()
    assert [one.batch_id for one in listed] == ["batch_abc123"] * 4
    assert [one.is_open for one in listed] == [False, True, True, True]
    assert is_all


@pytest.mark.parametrize("rubbish", [{}, {"id": "batch_1"}, {**STATUS, "batch_id": "../1"}, "text", None, 7])
async def test_what_the_list_says_without_an_id_is_passed_over_and_may_be_one_that_is_not_listed(rubbish: Any) -> None:
    async with endpoint([rubbish, STATUS]) as (batches, _):
        listed, is_all = await batches.recent()
    assert [one.batch_id for one in listed] == ["batch_abc123"]
    assert not is_all


def answered(embedding: Any, *, status_code: int = 200, **body: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "index": 0, "embedding": embedding}]
    return {"custom_id": "a-0", "response": {"status_code": status_code, "body": {"data": data, **body}}, "error": None}


BASE64 = base64.b64encode(np.array([1.0, 2.0], "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("line", "vector", "said"),
    [
        (answered([1.0, 2.0]), [1, 2], ""),
        (answered(BASE64), [1, 2], ""),
        (answered([1.0]), None, "1 dimensions instead of 2"),
        (answered("!"), None, "not what Jina's API promises"),
        (answered([1e300, 1.0]), [float("inf"), 1], ""),
        ({"custom_id": "a-0"}, None, "neither a vector nor an error"),
        ({"custom_id": "a-0", "response": {"body": {"data": []}}}, None, "0 vectors for a text"),
        ({"custom_id": "a-0", "error": {"code": "422", "message": "bad text"}}, None, "bad text"),
        ({"custom_id": "a-0", "error": {"code": "INPUT_EMPTY", "message": "empty"}}, None, "empty"),
        ({"custom_id": "a-0", "error": {"code": "INPUT_TOKEN_LIMIT_EXCEEDED", "message": "long"}}, None, "long"),
        ({"custom_id": "a-0", "error": {"code": "INTERNAL_ERROR", "message": "oops"}}, None, "oops"),
        ({"custom_id": "a-0", "error": "all in one"}, None, "all in one"),
        (
            {"custom_id": "a-0", "response": {"status_code": 400, "body": {"error": {"message": "bad"}}}},
            None, "bad",
        ),
        (
            {"custom_id": "a-0", "response": {"status_code": 503, "body": {"detail": "later"}}},
            None, "later",
        ),
    ],
)  # fmt: skip
async def test_a_line_is_a_vector_or_says_why_not(line: dict[str, Any], vector: list[float] | None, said: str) -> None:
    async with endpoint(json.dumps(line).encode()) as (batches, asked):
        [read] = [each async for each in batches.output("batch_1")]
    assert asked[0][1] == "/v1/batch/batch_1/output"
    assert read.custom_id == "a-0"
    assert (None if read.vector is None else read.vector.tolist()) == vector
    assert said in read.error


@pytest.mark.parametrize("rubbish", [b"<html>", b'{"custom_id": "a-0"', b"[]", b"null", b'{"custom_id": {}}'])
async def test_a_line_that_is_none_has_no_id_and_no_vector(rubbish: bytes) -> None:
    async with endpoint(rubbish + b"\n\n" + json.dumps(answered([1.0, 2.0])).encode() + b"\n") as (batches, _):
        first, second = [each async for each in batches.errors("batch_1")]
    assert (first.custom_id, first.vector) == ("", None)
    assert isinstance(second, BatchLine)
    assert second.vector is not None


async def test_a_line_without_an_end_is_not_collected_for_ever() -> None:
    async with endpoint(b"x" * (2**24)) as (batches, _):
        with pytest.raises(OutcomeUnknown, match="line without an end"):
            _ = [each async for each in batches.output("batch_1")]


async def test_an_output_that_is_gone_may_be_there_later_and_a_bad_key_is_said() -> None:
    async with endpoint({"detail": "gone"}, status=404) as (batches, _):
        with pytest.raises(OutputMissing, match="gone"):
            _ = [each async for each in batches.output("batch_1")]
    async with endpoint({"detail": "bad key"}, status=401) as (batches, _):
        with pytest.raises(InvalidKey):
            _ = [each async for each in batches.output("batch_1")]


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        (
            "jina/jina-embeddings-v3",
            None,
            "cannot be had in batches: leave --batch out, or take jina/jina-embeddings-v5-",
        ),
        ("jina/jina-embeddings-v2-base-en", None, "cannot be had in batches"),
        (SMALL, "retrieval.query", "the task retrieval.query cannot be had in batches"),
    ],
)
def test_what_the_endpoint_does_not_make_is_refused_with_what_works(model: str, task: str | None, said: str) -> None:
    embedder = JinaEmbedder(model, key="k", task=task)
    assert isinstance(embedder, EmbedsInBatches)
    with pytest.raises(ConfigurationError, match=said):
        embedder.batch_endpoint()
