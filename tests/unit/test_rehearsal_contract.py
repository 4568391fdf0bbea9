"""The simulator's rules for bodies against the vendor's own schemas, and the shapes of its answers against them."""

import base64
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.rehearsal import Rehearsal, pretend_tokens, pretend_vector
from embedmill.rehearsal.answers import answer
from embedmill.rehearsal.batch import BatchDesk
from embedmill.rehearsal.contract import CONTRACTS, model_card, parse_request
from embedmill.rehearsal.faults import Dice
from embedmill.rehearsal.refusals import Refused
from embedmill.rehearsal.vectors import count_tokens, pretend_vectors

VENDOR = json.loads((Path(__file__).parent.parent / "data" / "jina_openapi_excerpt.json").read_text())
MULTI_VECTOR = {"jina-colbert-v1-en", "jina-colbert-v2"}
CALM = Rehearsal()
JSON_VALUES = [
    None, True, False, 0, 1, 64, 768, 896, 897, 1024, 1025, 1536, 1537, 2048, 2049, -1, 8.0, 8.5, "8", "", "float",
    "base64", "binary", "ubinary", "int8", [], ["float"], ["float", "base64"], ["float", "int8"], [None], {}, [8],
    "retrieval", "retrieval.query", "retrieval.passage", "text-matching", "classification", "separation", "clustering",
    "code.query", "nl2code.passage", "code2completion.query", "query",
]  # fmt: skip
FIELDS = ["task", "dimensions", "embedding_type", "normalized", "truncate", "late_chunking", "input_type", "unknown"]


def schema(name):
    return {"$ref": f"#/components/schemas/{name}", "components": VENDOR["components"]}


def vendor_accepts(body, name):
    return jsonschema.Draft202012Validator(schema(name)).is_valid(body)


def parsed(body, rehearsal=CALM):
    return parse_request(json.dumps(body).encode(), rehearsal)


def accepted(body, rehearsal=CALM):
    try:
        parsed(body, rehearsal)
    except Refused as refused:
        return refused.status != 422
    return True


def test_the_models_are_those_of_the_vendor_that_return_single_vectors():
    assert set(CONTRACTS) == set(VENDOR["discriminator"]) - MULTI_VECTOR


@pytest.mark.parametrize("model", sorted(CONTRACTS))
def test_the_declared_fields_are_those_of_the_vendors_schema(model):
    declared = VENDOR["components"]["schemas"][VENDOR["discriminator"][model]]["properties"]
    assert CONTRACTS[model].fields == set(declared) - {"model", "input", "embedding_type"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("model", sorted(CONTRACTS))
def test_every_value_of_every_field_is_judged_as_the_vendors_schema_judges_it(model, field):
    for value in JSON_VALUES:
        body = {"model": model, "input": ["text"], field: value}
        assert accepted(body) == vendor_accepts(body, VENDOR["discriminator"][model]), body


@given(
    model=st.sampled_from(sorted(CONTRACTS)),
    fields=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(JSON_VALUES), max_size=5),
)
def test_fields_together_are_judged_as_the_vendors_schema_judges_them(model, fields):
    body = {"model": model, "input": "text", **fields}
    assert accepted(body) == vendor_accepts(body, VENDOR["discriminator"][model])


@pytest.mark.parametrize("given_", ["one", {"text": "one"}, ["one", {"text": "two"}], [""], 1, None, [1], {"txt": "x"}])
@pytest.mark.parametrize("model", sorted(CONTRACTS))
def test_inputs_are_judged_as_the_vendors_schema_judges_them(model, given_):
    body = {"model": model, "input": given_}
    assert accepted(body) == vendor_accepts(body, VENDOR["discriminator"][model])


@pytest.mark.parametrize("given_", [[], ["a"] * 513, {"image": "https://example.org/a.png"}])
def test_what_the_schema_allows_and_the_rehearsal_refuses(given_):
    assert not accepted({"model": "jina-clip-v2", "input": given_})


def test_more_inputs_pass_where_they_are_asked_for():
    body = {"model": "jina-embeddings-v3", "input": ["a"] * 2048}
    assert accepted(body, Rehearsal(max_inputs=2048))
    with pytest.raises(Refused, match="Each input list can contain at most 512 items"):
        parsed(body)


def test_undeclared_fields_are_named_and_refused_where_that_is_asked_for():
    body = {"model": "jina-embeddings-v2-base-en", "input": "x", "task": "retrieval.query", "dimensions": 64}
    assert parsed(body).undeclared == ("task", "dimensions")
    assert parsed(body).dimensions == 768
    with pytest.raises(Refused, match="Extra inputs are not permitted"):
        parsed(body, Rehearsal(undeclared_fields="refused"))


def test_an_unknown_model_is_refused_with_those_that_exist():
    with pytest.raises(Refused, match=r"Model 'jina-embeddings-v9' not found\. Available models: jina-") as caught:
        parsed({"model": "jina-embeddings-v9", "input": "x"})
    assert (caught.value.status, caught.value.kind) == (400, "INPUT_MODEL_NOT_FOUND")


def test_refusals_have_the_vendors_shape():
    for body, name in (({"model": "x", "input": "x"}, "ErrorResponse"), ({"model": 1}, "HTTPValidationError")):
        with pytest.raises(Refused) as caught:
            parsed(body)
        jsonschema.validate(json.loads(caught.value.body), schema(name))


@pytest.mark.parametrize("encoding", [None, "float", "base64", "binary", "ubinary"])
@pytest.mark.parametrize("model", sorted(CONTRACTS))
def test_answers_have_the_vendors_shape(model, encoding):
    request = parsed({"model": model, "input": ["one two", "three"], "embedding_type": encoding})
    for bare in (False, True):
        body = json.loads(answer(request, fault=None, shuffle_seed=None, bare_sparse=bare))
        jsonschema.validate(body, schema("EmbeddingResponse"))
        assert len(body["data"]) == 2
        assert body["usage"]["total_tokens"] == request.total_tokens


def test_all_encodings_are_the_same_vector():
    body = {"model": "jina-embeddings-v3", "input": "x", "dimensions": 64}
    kinds = ["float", "base64", "binary", "ubinary"]
    both = json.loads(
        answer(parsed({**body, "embedding_type": kinds}), fault=None, shuffle_seed=None, bare_sparse=False)
    )["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(both["base64"]), "<f4")
    assert np.array_equal(np.float32(both["float"]), vector)
    bits = np.unpackbits(np.uint8(both["ubinary"]))
    assert np.array_equal(bits, vector > 0)
    assert [number - 128 for number in both["ubinary"]] == both["binary"]


def test_sparse_rows_are_scores_of_words():
    request = parsed({"model": "elser-v2", "input": ["Fish and fish", "!"]})
    rows = json.loads(answer(request, fault=None, shuffle_seed=None, bare_sparse=True))["data"]
    assert set(rows[0]) == {"fish", "and"}
    assert all(score > 0 for score in rows[0].values())
    assert rows[1] == {}


def test_fewer_dimensions_are_the_first_of_more():
    few = pretend_vectors(["x"], model="m", dimensions=8, normalized=False)
    assert np.array_equal(few, pretend_vectors(["x"], model="m", dimensions=64, normalized=False)[:, :8])
    assert np.linalg.norm(pretend_vector("x", model="m", dimensions=8)) == pytest.approx(1, abs=1e-6)
    assert not np.array_equal(few, pretend_vectors(["x"], model="n", dimensions=8, normalized=False))


@given(st.lists(st.text(st.characters(codec="ascii")) | st.text(), max_size=5))
def test_tokens_counted_together_are_those_counted_alone(texts):
    assert count_tokens(texts) == [pretend_tokens(text) for text in texts]


def test_a_text_over_the_limit_is_refused_or_cut_and_late_chunking_counts_all_texts_together():
    long = {"model": "jina-embeddings-v3", "input": ["word " * 5_000, "word " * 5_000]}
    assert parsed(long).tokens == [5_002, 5_002]
    with pytest.raises(Refused, match="maximum of 8192 tokens"):
        parsed({**long, "late_chunking": True})
    assert parsed({**long, "late_chunking": True, "truncate": True}).tokens == [5_002, 3_190]
    over = {**long, "input": "word " * 9_000}
    with pytest.raises(Refused, match="maximum of 8192 tokens") as caught:
        parsed(over)
    assert (caught.value.status, caught.value.kind) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert parsed({**over, "truncate": True}).tokens == [8_192]
    assert parsed({"model": "elser-v2", "input": "word " * 600}).tokens == [512]


def test_model_cards_have_the_vendors_shape():
    jsonschema.validate({"data": [model_card(name) for name in CONTRACTS]}, schema("ModelListResponse"))


@pytest.mark.parametrize("field", ["model", "task", "dimensions", "normalized", "input", "webhook_url"])
def test_batches_are_judged_as_the_vendors_schema_judges_them_but_for_the_tasks_that_only_its_prose_lists(field):
    desk = BatchDesk(CALM, Dice(CALM), lambda *_: None)
    for value in [*JSON_VALUES, "jina-embeddings-v5-text-nano", "jina-embeddings-v3", [{}], [{"custom_id": "a"}]]:
        body = {"model": "jina-embeddings-v5-text-small", "input": [{"custom_id": "a", "body": {"input": "x"}}]}
        body[field] = value
        if field == "webhook_url" or (field == "input" and value in (None, [])):
            continue
        try:
            desk.submit(json.dumps(body).encode(), None, now=0.0)
            taken = True
        except Refused:
            taken = False
        known = field != "task" or value in (None, "retrieval", "text-matching", "clustering", "classification")
        assert taken == (vendor_accepts(body, "BatchEmbeddingRequest") and known), body
