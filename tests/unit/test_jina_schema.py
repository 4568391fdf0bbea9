"""Every request that can be asked for, held against the vendor's rules, and every refusal against what they leave.

`RULES` is written by hand from the vendor's OpenAPI description, which is not part of this repository. Where a copy lies
beside the checkout, the two are compared, and the requests are validated against the description itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.errors import ConfigurationError, OutcomeUnknown
from embedmill.models import MODELS
from worker.embedders.jina import JinaEmbedder, parse_embedding
from worker.embedders.jina_sparse import JinaSparseEmbedder

DESCRIPTION = Path(__file__).parents[3] / "shared" / "facts" / "jina_openapi.json"
needs_description = pytest.mark.skipif(
    not DESCRIPTION.exists(), reason="the vendor's OpenAPI description, which may not be copied here, is not beside it"
)


@dataclass(frozen=True)
class Rule:
    """What a model's schema allows beside `model`, `input`, `embedding_type` and `truncate`, which all have.

    dimensions: the most that may be asked for, None where the field does not exist.
    """

    tasks: frozenset[str] = frozenset()
    dimensions: int | None = None
    normalized: bool = False
    late_chunking: bool = False

    @property
    def fields(self) -> set[str]:
        optional = {"task": bool(self.tasks), "dimensions": self.dimensions is not None}
        optional |= {"normalized": self.normalized, "late_chunking": self.late_chunking}
        return {"model", "input", "embedding_type", "truncate", *(name for name, has in optional.items() if has)}


RETRIEVAL = {"retrieval.query", "retrieval.passage"}
V2 = Rule(normalized=True)
V5 = Rule(frozenset(RETRIEVAL | {"text-matching", "clustering", "classification"}), 1024, normalized=True)
CODE = frozenset(
    f"{family}.{side}"
    for family in ("nl2code", "qa", "code2code", "code2nl", "code2completion")
    for side in ("query", "passage")
)
RULES = {
    **{f"jina-embeddings-v2-base-{language}": V2 for language in ("en", "zh", "de", "es", "code")},
    "jina-embeddings-v3": Rule(
        frozenset(RETRIEVAL | {"text-matching", "classification", "separation"}),
        1024,
        normalized=True,
        late_chunking=True,
    ),
    "jina-embeddings-v4": Rule(
        frozenset(RETRIEVAL | {"text-matching", "code.query", "code.passage"}), 2048, late_chunking=True
    ),
    "jina-embeddings-v5-text-small": V5,
    "jina-embeddings-v5-text-nano": V5,
    "jina-code-embeddings-0.5b": Rule(CODE, 896),
    "jina-code-embeddings-1.5b": Rule(CODE, 1536),
}
# Its answers are sparse, and its fields fewer.
SPARSE = "elser-v2"
# Images, and a vector per token.
NOT_OFFERED = {"jina-clip-v1", "jina-clip-v2", "jina-colbert-v1-en", "jina-colbert-v2"}
NOT_SENT = {"return_multivector", "return_tokenized_input"}
EMBEDDING_TYPES = {"float", "base64", "binary", "ubinary"}
every_model = pytest.mark.parametrize("model", sorted(RULES))


def asked(model: str) -> Iterator[dict[str, Any]]:
    """Every combination of options, each with a few values; sizes with nothing else."""
    rule = RULES[model]
    tasks = [None, *sorted(rule.tasks)]
    flags = (None, True, False)
    for task, kind, normalized, truncate, late in product(tasks, sorted(EMBEDDING_TYPES), flags, flags, (False, True)):
        yield {
            "task": task,
            "embedding_type": kind,
            "normalized": normalized,
            "truncate": truncate,
            "late_chunking": late,
        }
    # The schema lets v5-text-nano be asked for 1,024, and it has 768.
    for dimensions in (1, 8, MODELS[f"jina/{model}"].native_dimensions):
        yield {"dimensions": dimensions}


def may_be_refused(rule: Rule, options: dict[str, Any]) -> bool:
    return (
        (options.get("late_chunking") and (not rule.late_chunking or options["truncate"]))
        or (options.get("normalized") is not None and not rule.normalized)
        or (options.get("dimensions") is not None and rule.dimensions is None and options["dimensions"] != 768)
    )


def bodies(model: str) -> Iterator[dict[str, Any]]:
    for options in asked(model):
        try:
            embedder = JinaEmbedder(f"jina/{model}", key="k", **options)
        except ConfigurationError:
            assert may_be_refused(RULES[model], options), options
            continue
        assert not may_be_refused(RULES[model], options), options
        for role in ("document", "query"):
            yield embedder.request_body(["one", "two"], role=role)


def test_every_model_that_is_offered_has_its_rule() -> None:
    assert {model.wire_name for model in MODELS.values()} == RULES.keys()


@every_model
def test_every_request_keeps_the_rules_of_its_model_and_every_refusal_is_of_what_they_lack(model: str) -> None:
    rule = RULES[model]
    for body in bodies(model):
        assert body.keys() == rule.fields - ({"normalized"} if "normalized" not in body else set())
        assert body["model"] == model
        assert body["input"] == ["one", "two"]
        assert body["embedding_type"] in EMBEDDING_TYPES
        assert isinstance(body["truncate"], bool)
        if rule.tasks:
            assert body["task"] in rule.tasks
        if rule.dimensions is not None:
            assert 0 < body["dimensions"] <= rule.dimensions


@needs_description
def test_the_rules_are_those_of_the_vendors_description() -> None:
    described = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    models = schemas_by_model(described)
    assert models.keys() == RULES.keys() | NOT_OFFERED | {SPARSE}
    for model, rule in RULES.items():
        properties = models[model]["properties"]
        assert properties.keys() - NOT_SENT == rule.fields, model
        assert set(choices(properties.get("task", {}))) == rule.tasks, model
        assert set(choices(properties["embedding_type"])) == EMBEDDING_TYPES, model
        maxima = [one["maximum"] for one in properties.get("dimensions", {}).get("anyOf", ()) if "maximum" in one]
        assert maxima == ([] if rule.dimensions is None else [rule.dimensions]), model


@needs_description
@every_model
def test_every_request_is_valid_by_the_vendors_description(model: str) -> None:
    described = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    schema = schemas_by_model(described)[model]
    for body in bodies(model):
        assert is_valid(body, schema, described), body
        assert body.keys() <= schema["properties"].keys()
    assert not is_valid({"model": model}, schema, described)
    assert not is_valid({"model": model, "input": ["a"], "embedding_type": "int8"}, schema, described)


@needs_description
@pytest.mark.parametrize("task", [None, "retrieval", "retrieval.passage", "retrieval.query"])
def test_every_request_of_the_sparse_model_is_valid_by_the_vendors_description(task: str | None) -> None:
    described = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    schema = schemas_by_model(described)[SPARSE]
    assert schema["properties"].keys() == {"model", "input", "task", "embedding_type"}
    assert set(choices(schema["properties"]["task"])) == RETRIEVAL
    embedder = JinaSparseEmbedder(f"jina/{SPARSE}", key="k", task=task)
    for body in (embedder.request_body(["one", "two"], role=role) for role in ("document", "query")):
        assert is_valid(body, schema, described), body
        assert body.keys() == {"model", "input", "task"}


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("jina-embeddings-v2-base-en", {"late_chunking": True}, "leave it out, or take jina/jina-embeddings-v3"),
        ("jina-embeddings-v5-text-small", {"late_chunking": True}, "take jina/jina-embeddings-v3"),
        ("jina-embeddings-v3", {"dimensions": 2000}, "nearest that works is --dimensions 1024"),
        ("jina-embeddings-v2-base-de", {"dimensions": 512}, "say 768"),
        ("jina-embeddings-v3", {"task": "clustering"}, "the nearest is separation"),
        ("jina-embeddings-v5-text-nano", {"task": "separation"}, "the nearest is clustering"),
        ("jina-embeddings-v4", {"task": "clustering"}, "the nearest is text-matching"),
        ("jina-embeddings-v4", {"task": "nl2code.passage"}, "the nearest is code.passage"),
        ("jina-embeddings-v3", {"task": "code.query"}, "the nearest is retrieval.query"),
        ("jina-embeddings-v3", {"task": "retreival.passage"}, "the nearest is retrieval.passage"),
        ("jina-code-embeddings-0.5b", {"task": "retrieval"}, "the nearest is nl2code"),
        ("jina-embeddings-v2-base-zh", {"task": "retrieval"}, "leave --task out"),
        ("jina-embeddings-v4", {"normalized": False}, "no choice of `normalized`: leave it out"),
        ("jina-code-embeddings-1.5b", {"normalized": True}, "leave it out"),
        ("jina-embeddings-v3", {"late_chunking": True, "truncate": True}, "leave truncate out"),
        ("jina-embeddings-v3", {"embedding_type": "float32"}, "did you mean float?"),
        ("jina-embeddings-v3", {"embedding_type": "int8"}, "binary"),
        ("jina-embeddings-v3", {"embedding_type": "binary", "dimensions": 100}, "the nearest that works is 96"),
        ("elser-v2", {}, "sparse vectors.*take jina/jina-embeddings-v3, or embed with embedmill.JinaEmbedding"),
        ("jina-colbert-v2", {}, "a vector per token.*take jina/jina-embeddings-v3"),
    ],
)
def test_a_wrong_combination_is_refused_with_the_nearest_thing_that_works(
    model: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        JinaEmbedder(f"jina/{model}", key="k", **options)
    assert "\n" not in str(caught.value)


def test_what_changes_vectors_changes_the_fingerprint_and_what_does_not_does_not() -> None:
    def fingerprint(**options: Any) -> str:
        return JinaEmbedder("jina/jina-embeddings-v3", key="k", **options).spec.fingerprint

    plain = fingerprint()
    # Of a dataset made by an earlier release.
    assert plain == "7670185bb5ab77ea01371970e3070a0e"
    assert fingerprint(embedding_type="float") == fingerprint(normalized=True) == fingerprint(truncate=True) == plain
    others = [{"normalized": False}, {"truncate": False}, {"embedding_type": "binary"}, {"embedding_type": "ubinary"}]
    assert len({plain, *(fingerprint(**options) for options in others)}) == 5


@pytest.mark.parametrize("embedding_type", ["binary", "ubinary"])
def test_a_dataset_takes_no_packed_bits_and_says_what_to_do(tmp_path: Path, embedding_type: str) -> None:
    spec = JinaEmbedder("jina/jina-embeddings-v3", key="k", embedding_type=embedding_type).spec
    with pytest.raises(ConfigurationError, match=r"floats only.*leave embedding_type out"):
        Dataset.open_or_create(str(tmp_path / "dataset"), embedder=spec)
    assert not (tmp_path / "dataset" / "dataset.json").exists()


@pytest.mark.parametrize(("embedding_type", "dtype"), [("binary", np.int8), ("ubinary", np.uint8)])
@pytest.mark.parametrize("written", ["numbers", "base64"])
def test_packed_bits_are_read_as_numbers_or_base64(embedding_type: str, dtype: Any, written: str) -> None:
    vector = np.array([3, 127], dtype)
    content = {"data": [{"index": 0, "embedding": "A38=" if written == "base64" else [3, 127]}]}
    body = json.dumps({**content, "usage": {"total_tokens": 1}}).encode()
    vectors = parse_embedding(body, rows=1, dimensions=16, embedding_type=embedding_type).vectors
    assert vectors.dtype == dtype
    assert vectors.tolist() == [vector.tolist()]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([3], "8 dimensions instead of 16"),
        ([3, 0.5], "not int8"),
        ([3, 200], "not int8"),
        ([3, 1e30], "not int8"),
        ("AwMD", "24 dimensions instead of 16"),
    ],
)
def test_packed_bits_that_are_none_are_an_unknown_outcome(numbers: object, said: str) -> None:
    body = json.dumps({"data": [{"index": 0, "embedding": numbers}], "usage": {"total_tokens": 1}}).encode()
    with pytest.raises(OutcomeUnknown, match=said):
        parse_embedding(body, rows=1, dimensions=16, embedding_type="binary")


def schemas_by_model(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    request = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {model: resolved({"$ref": place}, described) for model, place in request["discriminator"]["mapping"].items()}


def resolved(schema: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Any = described
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def choices(schema: dict[str, Any]) -> list[str]:
    """The values of an enumeration that may be null or a list, too."""
    return next((one["enum"] for one in schema.get("anyOf", ()) if "enum" in one), [])


def is_valid(value: object, schema: dict[str, Any], described: dict[str, Any]) -> bool:
    """As much of JSON Schema as the request schemas use."""
    schema = resolved(schema, described)
    known = {"$ref", "anyOf", "type", "enum", "const", "items", "properties", "required", "maximum", "exclusiveMinimum"}
    known |= {"title", "description", "default", "examples", "example"}
    assert schema.keys() <= known, schema.keys() - known
    types: dict[str, type | tuple[type, ...]] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    }  # fmt: skip
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        return False
    if schema.get("type") == "integer" and isinstance(value, bool):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, int) and not schema.get("exclusiveMinimum", -np.inf) < value <= schema.get("maximum", np.inf):
        return False
    if isinstance(value, list) and not all(is_valid(one, schema.get("items", {}), described) for one in value):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not set(schema.get("required", ())) <= value.keys():
            return False
        if not all(is_valid(one, properties[name], described) for name, one in value.items() if name in properties):
            return False
    return "anyOf" not in schema or any(is_valid(value, one, described) for one in schema["anyOf"])
