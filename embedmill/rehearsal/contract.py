"""Jina's models and the rules for a request body, written from its OpenAPI description of 2026-04 and not from our client.

Not in that document, and so from observation or model cards: 512 inputs per request, tokens per input of v4, the code
models, CLIP and ELSER, native dimensions of CLIP. The description does not forbid undeclared fields; the one of 2025 did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .behaviour import Rehearsal
from .refusals import input_too_long, invalid, unknown_model
from .vectors import count_tokens

_RETRIEVAL = ("retrieval.query", "retrieval.passage")
_CODE = tuple(
    f"{kind}.{side}"
    for kind in ("nl2code", "qa", "code2code", "code2nl", "code2completion")
    for side in ("query", "passage")
)
_V5_TASKS = (*_RETRIEVAL, "text-matching", "clustering", "classification")
ENCODINGS = ("float", "base64", "binary", "ubinary")
_ALWAYS = frozenset({"model", "input", "embedding_type"})
_V4_FLAGS = frozenset({"return_multivector", "return_tokenized_input"})
_FLAGS = frozenset({"late_chunking", "truncate", "normalized"}) | _V4_FLAGS


@dataclass(frozen=True, slots=True)
class ModelContract:
    """One model. fields: what its schema declares besides model, input and embedding_type; native_dimensions 0: sparse."""

    native_dimensions: int
    max_tokens: int
    fields: frozenset[str]
    tasks: tuple[str, ...] = ()
    max_dimensions: int = 0

    @property
    def sparse(self) -> bool:
        return not self.native_dimensions


def _v2() -> ModelContract:
    return ModelContract(768, 8192, frozenset({"normalized", "truncate"}))


def _v5(native_dimensions: int, max_tokens: int) -> ModelContract:
    fields = frozenset({"task", "dimensions", "normalized", "truncate"})
    return ModelContract(native_dimensions, max_tokens, fields, _V5_TASKS, 1024)


def _code(native_dimensions: int) -> ModelContract:
    fields = frozenset({"task", "dimensions", "truncate"})
    return ModelContract(native_dimensions, 32768, fields, _CODE, native_dimensions)


CONTRACTS: dict[str, ModelContract] = {
    **{f"jina-embeddings-v2-base-{language}": _v2() for language in ("en", "zh", "de", "es", "code")},
    "jina-embeddings-v3": ModelContract(
        1024,
        8192,
        frozenset({"task", "dimensions", "late_chunking", "normalized", "truncate"}),
        (*_RETRIEVAL, "text-matching", "classification", "separation"),
        1024,
    ),
    "jina-embeddings-v4": ModelContract(
        2048,
        32768,
        frozenset({"task", "dimensions", "late_chunking", "truncate"}) | _V4_FLAGS,
        ("text-matching", *_RETRIEVAL, "code.query", "code.passage"),
        2048,
    ),
    "jina-embeddings-v5-text-small": _v5(1024, 32768),
    "jina-embeddings-v5-text-nano": _v5(768, 8192),
    "jina-code-embeddings-0.5b": _code(896),
    "jina-code-embeddings-1.5b": _code(1536),
    "jina-clip-v1": ModelContract(768, 8192, frozenset({"normalized", "truncate"})),
    "jina-clip-v2": ModelContract(
        1024, 8192, frozenset({"task", "dimensions", "normalized", "truncate"}), ("retrieval.query",), 1024
    ),
    "elser-v2": ModelContract(0, 512, frozenset({"task"}), _RETRIEVAL),
}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A body that keeps the contract. tokens: per text, as billed; undeclared: its fields that the schema lacks; together:
    late chunking, so that the vector of each text knows the others."""

    model: str
    texts: list[str]
    tokens: list[int]
    dimensions: int
    encodings: tuple[str, ...]
    normalized: bool
    undeclared: tuple[str, ...]
    together: bool = False

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def sparse(self) -> bool:
        return CONTRACTS[self.model].sparse


def parse_body(raw: bytes) -> dict[str, Any]:
    """Raises Refused (422)."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise invalid("body", "JSON decode error", "json_invalid") from None
    if not isinstance(body, dict):
        raise invalid("body", "Input should be a valid dictionary or object to extract fields from", "dict_type")
    return body


def parse_request(raw: bytes, rehearsal: Rehearsal) -> EmbeddingRequest:
    """Raises Refused: 400 or 422, as the contract words it."""
    body = parse_body(raw)
    model = body.get("model")
    if not isinstance(model, str):
        raise invalid("model", "Unable to extract tag using discriminator 'model'", "union_tag_not_found")
    if model not in CONTRACTS:
        raise unknown_model(model, CONTRACTS)
    contract = CONTRACTS[model]
    undeclared = tuple(name for name in body if name not in contract.fields and name not in _ALWAYS)
    if undeclared and rehearsal.undeclared_fields == "refused":
        raise invalid(f"{model} -> {undeclared[0]}", "Extra inputs are not permitted", "extra_forbidden")
    _check_fields(body, model=model, contract=contract)
    texts = _texts(body, model=model, max_inputs=rehearsal.max_inputs)
    marker = rehearsal.reject_marker
    if marker and any(marker in text for text in texts):
        raise invalid(f"{model} -> input", "Input cannot be processed", "value_error")
    declared = {name: value for name, value in body.items() if name in contract.fields and value is not None}
    return EmbeddingRequest(
        model=model,
        texts=texts,
        tokens=_billed(texts, declared, contract=contract),
        dimensions=int(declared.get("dimensions", contract.native_dimensions)),
        encodings=_encodings(body.get("embedding_type")),
        normalized=declared.get("normalized", True),
        undeclared=undeclared,
        together=bool(declared.get("late_chunking")),
    )


def check_dimensions(value: object, maximum: int, place: str) -> None:
    """Raises Refused (422) unless it is a whole number from 1 to maximum, or null."""
    if value is None:
        return
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, int | float) or not whole:
        raise invalid(f"{place} -> dimensions", "Input should be a valid integer", "int_type", value)
    if value <= 0:
        raise invalid(f"{place} -> dimensions", "Input should be greater than 0", "greater_than", value)
    if value > maximum:
        said = f"Input should be less than or equal to {maximum}"
        raise invalid(f"{place} -> dimensions", said, "less_than_equal", value)


def check_choice(value: object, allowed: Sequence[str], place: str) -> None:
    """Raises Refused (422) unless it is one of these, or null."""
    if value is not None and value not in allowed:
        raise invalid(place, f"Input should be {', '.join(map(repr, allowed))}", "literal_error", value)


def check_flag(value: object, place: str) -> None:
    if not isinstance(value, bool | None):
        raise invalid(place, "Input should be a valid boolean", "bool_type", value)


def _check_fields(body: Mapping[str, Any], *, model: str, contract: ModelContract) -> None:
    if "task" in contract.fields:
        check_choice(body.get("task"), contract.tasks, f"{model} -> task")
    if "dimensions" in contract.fields:
        check_dimensions(body.get("dimensions"), contract.max_dimensions, model)
    for name in contract.fields & _FLAGS:
        check_flag(body.get(name), f"{model} -> {name}")
    asked = body.get("embedding_type")
    for one in asked if isinstance(asked, list) else [asked]:
        check_choice(one, ENCODINGS, f"{model} -> embedding_type")
    if isinstance(asked, list) and None in asked:
        check_choice("null", ENCODINGS, f"{model} -> embedding_type")
    if "return_multivector" in contract.fields:
        _refuse_multivectors(body, model=model)


def _refuse_multivectors(body: Mapping[str, Any], *, model: str) -> None:
    if body.get("return_multivector"):
        both = body.get("dimensions") is not None
        said = "cannot be used with `dimensions`" if both else "the rehearsal makes single vectors only"
        raise invalid(f"{model} -> return_multivector", said, "value_error", True)
    if body.get("return_tokenized_input"):
        raise invalid(f"{model} -> return_tokenized_input", "requires `return_multivector=true`", "value_error", True)


def _texts(body: Mapping[str, Any], *, model: str, max_inputs: int) -> list[str]:
    place = f"{model} -> input"
    if "input" not in body:
        raise invalid(place, "Field required", "missing")
    given = body["input"]
    items = given if isinstance(given, list) else [given]
    if not items:
        raise invalid(place, "List should have at least 1 item", "too_short")
    if len(items) > max_inputs:
        raise invalid(model, f"Each input list can contain at most {max_inputs} items.", "value_error")
    texts = []
    for item in items:
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise invalid(place, "Input should be a valid string; the rehearsal embeds text only", "string_type")
        texts.append(text)
    return texts


def _encodings(asked: str | list[str] | None) -> tuple[str, ...]:
    kinds = asked if isinstance(asked, list) else [asked or "float"]
    return tuple(dict.fromkeys(kinds)) or ("float",)


def _billed(texts: list[str], declared: Mapping[str, Any], *, contract: ModelContract) -> list[int]:
    counts = count_tokens(texts)
    if declared.get("late_chunking"):
        return _billed_together(counts, cut=declared.get("truncate", False), max_tokens=contract.max_tokens)
    if max(counts) <= contract.max_tokens:
        return counts
    # ELSER has no `truncate`; what it reads ends at its limit.
    if not declared.get("truncate") and "truncate" in contract.fields:
        raise input_too_long(contract.max_tokens)
    return [min(count, contract.max_tokens) for count in counts]


def _billed_together(counts: list[int], *, cut: bool, max_tokens: int) -> list[int]:
    """Late chunking reads all texts as one: what is over the limit is refused, or lost at the end."""
    if sum(counts) > max_tokens and not cut:
        raise input_too_long(max_tokens)
    billed, left = [], max_tokens
    for count in counts:
        billed.append(min(count, left))
        left -= billed[-1]
    return billed


def model_card(name: str) -> dict[str, object]:
    """An entry of GET /v1/models. Release date and price are v3's for every model: the description gives no others."""
    contract = CONTRACTS[name]
    price = dict.fromkeys(("completion", "image", "input_cache_read", "input_cache_write", "request"), "0")
    return {
        "id": f"jina-ai/{name}",
        "hugging_face_id": f"jinaai/{name}",
        "name": f"Jina AI: {name}",
        "created": 1725840000,
        "input_modalities": ["text"],
        "output_modalities": ["embeddings"],
        "quantization": "",
        "context_length": contract.max_tokens,
        "max_output_length": contract.native_dimensions,
        "pricing": {"prompt": "0.00000005", **price},
        "supported_sampling_parameters": [],
        "supported_features": [],
        "description": f"{name}, rehearsed: its vectors mean nothing",
        "datacenters": [{"country_code": "US"}],
    }
