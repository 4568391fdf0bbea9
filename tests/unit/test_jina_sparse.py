"""Answers of Jina's sparse model: both shapes of the description are read, and nothing that is not exactly one of them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from embedmill.errors import ConfigurationError, OutcomeUnknown
from embedmill.models import SPARSE_MODELS
from embedmill.sparse import SparseRows, token_index
from worker.embedders.jina_sparse import JinaSparseEmbedder, parse_weights

VENDOR = json.loads((Path(__file__).parent.parent / "data" / "jina_openapi_excerpt.json").read_text())
USAGE = {"total_tokens": 7, "input_tokens": 5, "output_tokens": 2}
ROWS: list[dict[str, float]] = [{"fish": 0.5, "index": 2, "embedding": 0.25}, {}, {"mine": 1.5}]


def body(data: list[Any], usage: Any = USAGE) -> bytes:
    return json.dumps({"model": "elser-v2", "object": "list", "usage": usage, "data": data}).encode()


def indexed(*rows: Any) -> list[dict[str, Any]]:
    return [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]


def embedder(**options: Any) -> JinaSparseEmbedder:
    return JinaSparseEmbedder("jina/elser-v2", key="k", **options)


def vendor_accepts(content: bytes, schema: str) -> bool:
    rules = {"$ref": f"#/components/schemas/{schema}", "components": VENDOR["components"]}
    return bool(jsonschema.Draft202012Validator(rules).is_valid(json.loads(content)))


@pytest.mark.parametrize("task", [None, "retrieval", "retrieval.passage", "retrieval.query"])
@pytest.mark.parametrize("role", ["document", "query"])
def test_requests_have_the_task_and_nothing_that_the_vendors_schema_lacks(task: str | None, role: Any) -> None:
    request = embedder(task=task).request_body(["one", "two"], role=role)
    asked = task if task == "retrieval.query" else {"document": "retrieval.passage", "query": "retrieval.query"}[role]
    assert request == {"model": "elser-v2", "input": ["one", "two"], "task": asked}
    assert vendor_accepts(json.dumps(request).encode(), "ELSERV2Request")
    assert request.keys() <= VENDOR["components"]["schemas"]["ELSERV2Request"]["properties"].keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dimensions": 256}, "no size to choose: leave dimensions out"),
        ({"embedding_type": "binary"}, "no binary ones: leave embedding_type out"),
        ({"embedding_type": "sparse"}, "no embedding type"),
        ({"normalized": True}, "leave it out"),
        ({"truncate": True}, "no choice of `truncate`: leave it out"),
        ({"truncate": False}, "no choice of `truncate`: leave it out"),
        ({"late_chunking": True}, "no late chunking: leave it out"),
        ({"task": "text-matching"}, "the nearest is retrieval.passage"),
    ],
)
def test_what_its_schema_lacks_is_refused_with_what_works(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        embedder(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [ROWS, indexed(*ROWS), indexed(*ROWS)[::-1]], ids=["bare", "indexed", "reversed"])
def test_every_shape_that_the_description_allows_is_read(data: list[Any]) -> None:
    content = body(data)
    assert vendor_accepts(content, "EmbeddingResponse")
    assert parse_weights(content, rows=3) == (ROWS, 7)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        body(ROWS)[:-20],
        body(ROWS[:2]),
        body([*ROWS, {"more": 1.0}]),
        body(indexed(*ROWS)[:2]),
        body(indexed(*ROWS, {"more": 1.0})),
        body([*indexed(*ROWS)[:2], {"index": 0, "embedding": {}}]),
        body([*indexed(*ROWS)[:2], {"index": 3, "embedding": {}}]),
        body([*indexed(*ROWS)[:2], {"index": -1, "embedding": {}}]),
        body([*indexed(*ROWS)[:2], {"embedding": {}}]),
        body([*indexed(*ROWS)[:2], {"mine": 1.0}]),
        body(indexed({"a": 1}, {}, [0.5, 0.25])),
        body(indexed({"a": 1}, {}, "AACAPw==")),
        body(indexed({"a": "1"}, {}, {})),
        body(indexed({"a": None}, {}, {})),
        body([{"a": float("nan")}, {}, {}]),
        body([{"a": True}, {}, {}]),
        body(ROWS, usage={}),
        body(ROWS, usage={"total_tokens": -1}),
    ],
)
def test_anything_else_is_an_unknown_outcome(content: bytes) -> None:
    with pytest.raises(OutcomeUnknown):
        parse_weights(content, rows=3)


@pytest.mark.parametrize("weight", [0, -0.5, 1e39, 1e-60])
def test_a_weight_that_is_no_float32_above_zero_makes_the_answer_useless(weight: float) -> None:
    with pytest.raises(OutcomeUnknown, match="text 1 of its request has a weight that is no number above 0"):
        embedder()._parsed(body([{"a": 1}, {"a": 1, "b": weight}]), ["a", "b"])


@pytest.mark.parametrize(("text", "empty"), [("", True), (" ?!\n", True), ("三", True), ("a", False), ("42", False)])
def test_only_a_text_without_latin_letters_and_digits_may_have_no_token(text: str, empty: bool) -> None:
    content = body(indexed({"fish": 1}, {}))
    if empty:
        assert [len(row) for row in embedder()._parsed(content, ["fish", text]).vectors] == [1, 0]
    else:
        with pytest.raises(OutcomeUnknown, match="text 1 of its request has words, and no token"):
            embedder()._parsed(content, ["fish", text])


def test_texts_of_different_words_with_one_row_make_the_answer_useless() -> None:
    same, long = [{"fish": 1.0}] * 3, ["word " * 600 + end for end in "abc"]
    for texts, billed in ((["fish", "meat", "salt"], 9), (["words " * 150 + end for end in "abc"], 3 * 152)):
        with pytest.raises(OutcomeUnknown, match="3 different texts got the same weights"):
            embedder()._parsed(body(same, {"total_tokens": billed}), texts)
    for texts, billed in ((["Fish", "FISH", "fish!"], 9), (["fish", "meat", "Fish"], 9), (long, 3 * 510)):
        assert len(embedder()._parsed(body(same, {"total_tokens": billed}), texts).vectors) == 3


def test_rows_of_one_length_stay_rows() -> None:
    embedding = embedder()._parsed(body([{"a": 1, "b": 2}, {"b": 3, "c": 4}]), ["a b", "b c"])
    assert embedding.vectors.shape == (2,)
    assert list(SparseRows.joined(list(embedding.vectors))) == [
        {token_index("a"): 1, token_index("b"): 2},
        {token_index("b"): 3, token_index("c"): 4},
    ]
    assert embedding.billed_tokens == 7


def test_long_texts_share_requests_since_no_bill_says_what_was_cut() -> None:
    limits = embedder(requests_per_minute=100, tokens_per_minute=100_000).limits
    assert limits.alone_tokens == 0
    assert limits.max_inputs == 512


def test_a_sparse_model_has_the_fields_that_are_sent_and_two_sides() -> None:
    assert SPARSE_MODELS.keys() == {"jina/elser-v2"}
    model = SPARSE_MODELS["jina/elser-v2"]
    assert model.fields == {"task"}
    assert model.tasks_by_role(None) == ("retrieval.passage", "retrieval.query")
