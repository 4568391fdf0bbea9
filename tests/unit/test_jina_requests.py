import base64
import json
from datetime import UTC, datetime

import numpy as np
import pytest

from embedmill.errors import (
    ConfigurationError,
    InputRejected,
    InputTooLong,
    InvalidKey,
    NoBalance,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
    TooManyInputs,
)
from worker.embedders.http import Answer, check_api_base, retry_after_s
from worker.embedders.jina import JinaEmbedder, error_for, parse_embedding

KEY = "jina_0123456789"


def embedder(model="jina/jina-embeddings-v3", **options):
    return JinaEmbedder(model, key=KEY, **options)


def answer(status, content, headers=None):
    body = json.dumps(content)
    return Answer(status, headers or {}, body.encode(), body)


def parse(content, **how):
    return parse_embedding(json.dumps(content).encode(), **how)


def item(index, vector):
    return {"object": "embedding", "index": index, "embedding": base64.b64encode(np.float32(vector).tobytes()).decode()}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("jina/jina-embeddings-v2-base-en", {"embedding_type", "truncate", "normalized"}),
        (
            "jina/jina-embeddings-v3",
            {"embedding_type", "truncate", "normalized", "task", "dimensions", "late_chunking"},
        ),
        ("jina/jina-embeddings-v4", {"embedding_type", "truncate", "task", "dimensions", "late_chunking"}),
        ("jina/jina-embeddings-v5-text-nano", {"embedding_type", "truncate", "normalized", "task", "dimensions"}),
        ("jina/jina-code-embeddings-0.5b", {"embedding_type", "truncate", "task", "dimensions"}),
    ],
)
def test_a_request_carries_only_the_fields_that_the_model_declares(model, fields):
    body = embedder(model).request_body(["a", "b"])
    assert set(body) == fields | {"model", "input"}
    assert body["model"] == model.removeprefix("jina/")
    assert body["input"] == ["a", "b"]


def test_the_role_decides_the_task_and_a_task_of_one_side_serves_both():
    retrieval, matching = embedder(), embedder(task="text-matching")
    assert retrieval.request_body(["a"])["task"] == "retrieval.passage"
    assert retrieval.request_body(["a"], role="query")["task"] == "retrieval.query"
    assert matching.request_body(["a"], role="query")["task"] == "text-matching"


def test_late_chunking_is_for_documents_and_never_truncates_silently():
    late = embedder(late_chunking=True)
    assert late.request_body(["a"])["late_chunking"] is True
    assert late.request_body(["a"])["truncate"] is False
    assert late.request_body(["a"], role="query")["late_chunking"] is False
    assert late.limits.max_tokens < 8192
    assert late.spec.fingerprint != embedder().spec.fingerprint
    with pytest.raises(ConfigurationError, match="no late chunking"):
        embedder("jina/jina-embeddings-v5-text-small", late_chunking=True)


def test_a_small_quota_makes_smaller_requests_but_one_passage_always_fits():
    assert embedder(tokens_per_minute=2_000_000).limits.max_tokens == 16_384
    assert embedder(tokens_per_minute=120_000).limits.max_tokens == 10_000
    assert embedder(tokens_per_minute=1_000).limits.max_tokens == 8_192


def test_estimates_stop_at_the_models_limit():
    empty, short, han, long = embedder().estimate_tokens(["", "a" * 40, "漢" * 40, "a" * 10**6])
    assert 1 <= empty < short < han < long == 8192


async def test_what_is_billed_is_learned_but_not_from_texts_that_may_have_been_cut(monkeypatch):
    jina = embedder()
    content = {"data": [item(0, [1.0] * 1024)], "usage": {"total_tokens": 7}}

    async def answer(*_, **__):
        return Answer(200, {}, json.dumps(content).encode())

    monkeypatch.setattr(jina._http, "post_json", answer)
    await jina.embed(["a" * 9000])
    assert jina.estimator.bills == 0
    for _ in range(20):
        await jina.embed(["seven of them"])
    assert jina.estimate_tokens(["seven of them"]) == [pytest.approx(7, abs=1)]


async def test_where_a_tokenizer_counts_bills_teach_nothing(monkeypatch):
    class Counter:
        def count(self, texts):
            return [3] * len(texts)

        def checks_bills(self):
            return False

    jina = embedder(tokenizer=Counter())
    content = {"data": [item(0, [1.0] * 1024)], "usage": {"total_tokens": 7}}

    async def answer(*_, **__):
        return Answer(200, {}, json.dumps(content).encode())

    monkeypatch.setattr(jina._http, "post_json", answer)
    await jina.embed(["seven of them"])
    assert jina.estimator.bills == 0


def test_where_long_texts_are_refused_the_spec_says_so():
    jina = embedder()
    refusing = jina.refusing_long()
    assert refusing.request_body(["a"])["truncate"] is False
    assert refusing.spec.options == {**jina.spec.options, "truncate": False}
    assert jina.spec.options["truncate"] is True


def test_rows_are_placed_by_index_whatever_their_order():
    content = {"data": [item(1, [3, 4]), item(0, [1, 2])], "usage": {"total_tokens": 9}}
    embedding = parse(content, rows=2, dimensions=2)
    assert embedding.vectors.dtype == np.float32
    assert embedding.vectors.tolist() == [[1, 2], [3, 4]]
    assert embedding.billed_tokens == 9


def test_lists_of_floats_are_read_too():
    content = {"data": [{"index": 0, "embedding": [0.5, 0.25]}], "usage": {"total_tokens": 1}}
    assert parse(content, rows=1, dimensions=2).vectors.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "array"),
        ({"data": [item(0, [1, 2]), item(1, [1, 2])]}, "usage"),
        ({"data": [item(0, [1, 2])], "usage": {"total_tokens": 1}}, "1 vectors for 2 texts"),
        ({"data": [item(0, [1, 2]), item(0, [1, 2])], "usage": {"total_tokens": 1}}, "`index` 0"),
        ({"data": [item(0, [1, 2]), item(2, [1, 2])], "usage": {"total_tokens": 1}}, "`index` 2"),
        ({"data": [item(0, [1, 2]), item(1, [1, 2, 3])], "usage": {"total_tokens": 1}}, "3 dimensions instead of 2"),
        ({"data": [item(0, [1, 2]), {"index": 1, "embedding": "?"}], "usage": {"total_tokens": 1}}, "base64"),
        (
            {"data": [item(0, [1, 2]), {"index": 1, "embedding": "YWJj"}], "usage": {"total_tokens": 1}},
            "3 bytes, not float32",
        ),
        (
            {"data": [item(0, [1, 2]), {"index": 1, "embedding": ["x"]}], "usage": {"total_tokens": 1}},
            "Expected `float`",
        ),
        ({"data": [item(0, [1, 2]), {"embedding": "YWJj"}], "usage": {"total_tokens": 1}}, "field `index`"),
    ],
)
def test_an_answer_that_was_paid_but_cannot_be_used_is_an_unknown_outcome(content, said):
    with pytest.raises(OutcomeUnknown, match=said):
        parse(content, rows=2, dimensions=2)


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (302, None, ConfigurationError),
        (
            400,
            {"detail": "Model 'x' not found. Available models: y.", "code": "INPUT_MODEL_NOT_FOUND"},
            ConfigurationError,
        ),
        (400, {"detail": "Input text exceeds …", "code": "INPUT_TOKEN_LIMIT_EXCEEDED"}, InputTooLong),
        (400, {"detail": "Single text cannot exceed 8192 tokens. 9237 tokens given."}, InputTooLong),
        (401, {"detail": "Invalid API key.", "code": "AUTH_INVALID_API_KEY"}, InvalidKey),
        (402, None, NoBalance),
        (403, {"detail": "Insufficient account balance.", "code": "AUTHZ_INSUFFICIENT_BALANCE"}, NoBalance),
        (403, {"detail": "Resource limit exceeded", "code": "AUTHZ_RESOURCE_LIMIT_EXCEEDED"}, NoBalance),
        (404, {"detail": "Not Found", "code": "RESOURCE_NOT_FOUND"}, ConfigurationError),
        (405, None, ConfigurationError),
        (408, None, Overloaded),
        (409, {"detail": "busy", "code": "CONFLICT_RESOURCE_BUSY"}, Overloaded),
        (413, None, TooManyInputs),
        (422, {"detail": "[RID: 1] Validation error"}, InputRejected),
        (422, {"detail": [{"loc": ["body", "input", 3], "msg": "str type expected", "type": "t"}]}, InputRejected),
        (422, {"detail": "…", "errors": [{"field": "body -> jina-embeddings-v3 -> input"}]}, InputRejected),
        (422, {"detail": "…", "errors": [{"field": "body -> jina-embeddings-v3 -> task"}]}, ConfigurationError),
        (422, {"detail": [{"loc": ["body", "dimensions"], "msg": "too large"}]}, ConfigurationError),
        (429, {"detail": "…"}, RateLimited),
        (500, {"detail": "An unexpected error occurred.", "code": "INTERNAL_ERROR"}, Overloaded),
        (502, None, Overloaded),
        (503, {"detail": "Service temporarily unavailable.", "code": "SERVICE_UNAVAILABLE"}, Overloaded),
        (504, {"detail": "Service request timed out.", "code": "SERVICE_TIMEOUT"}, OutcomeUnknown),
        (521, None, Overloaded),
        (524, None, OutcomeUnknown),
    ],
)
def test_every_status_has_its_error(status, content, expected):
    error = error_for(answer(status, content))
    assert type(error) is expected
    assert f"Jina answered {status}" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("detail", "code", "limit", "allowed"),
    [
        ("Request rate limit exceeded: 101/100 requests per minute. …", "RATE_REQUEST_LIMIT_EXCEEDED", "requests", 100),
        ("Token rate limit exceeded: 101,274/100,000 tokens per minute. …", "", "tokens", 100_000),
        ("Token rate limit exceeded: 5/4 tokens per minute.", "RATE_TOKEN_LIMIT_EXCEEDED", "tokens", 4),
        ("Concurrency limit exceeded: 2/2 concurrent requests. Wait …", None, "concurrency", 2),
        ("IP rate limit exceeded. Too many requests from this IP address.", "RATE_IP_LIMIT_EXCEEDED", "address", None),
        ("slow down", None, "unknown", None),
    ],
)
def test_a_429_says_which_limit_and_its_value(detail, code, limit, allowed):
    error = error_for(answer(429, {"detail": detail, "code": code}, {"Retry-After": "7"}))
    assert isinstance(error, RateLimited)
    assert (error.limit, error.allowed, error.retry_after_s) == (limit, allowed, 7.0)


def test_retry_after_is_read_as_seconds_or_as_a_date():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after_s({"retry-after": "1.5"}) == 1.5
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 2026 00:00:30 GMT"}, now=now) == 30
    assert retry_after_s({"Retry-After": "Wed, 31 Dec 2025 00:00:00 GMT"}, now=now) == 0
    assert retry_after_s({"Retry-After": "soon"}) is None
    assert retry_after_s({}) is None


@pytest.mark.parametrize(
    "url",
    [
        "api.jina.ai/v1",
        "ftp://api.jina.ai",
        "http://",
        "https://me:secret@api.jina.ai/v1",
        "https://api.jina.ai/v1?x=1",
        "https://api.jina.ai/v1/embeddings",
        "http://host:port/v1",
        "",
    ],
)
def test_an_api_base_that_cannot_work_is_refused_with_a_good_one(url):
    with pytest.raises(ConfigurationError, match="--api-base") as caught:
        check_api_base(url)
    assert "secret@" not in str(caught.value)


def test_an_api_base_loses_its_last_slash():
    assert check_api_base(" https://api.jina.ai/v1/ ") == "https://api.jina.ai/v1"


@pytest.mark.parametrize("key", ["", " ", "jina_a\nX-Evil: 1", "jina_ü", "two words"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key):
    with pytest.raises(ConfigurationError, match="JINA_API_KEY") as caught:
        JinaEmbedder("jina/jina-embeddings-v3", key=key)
    assert not key.strip() or key not in str(caught.value)
