"""What is published about each provider's models and plans: sizes, limits, tasks and which fields a request may carry.

Source: Jina's OpenAPI description (2026-04) and its rate limit page. A model that is not here is refused by name, and so is
what a model does not have: a wrong field fails every request. Each refusal names the nearest thing that works.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

from embedmill.errors import ConfigurationError
from embedmill.sparse import SPARSE_DIMENSIONS

EmbeddingType = Literal["base64", "float", "binary", "ubinary"]
"""How a provider writes vectors: float32 in base64 or as numbers; one bit per dimension, eight to an int8 or a uint8."""

# What another generation or another family calls nearly the same, best first.
_NEAR_TASKS = {
    "clustering": ("separation", "text-matching"),
    "separation": ("clustering", "text-matching"),
    "classification": ("text-matching",),
    "text-matching": ("retrieval.passage",),
    "code": ("nl2code", "retrieval"),
    "nl2code": ("code", "retrieval"),
    "retrieval": ("nl2code",),
}


@dataclass(frozen=True, slots=True)
class ProviderModel:
    """One hosted model.

    name: `PROVIDER/NAME`; native_dimensions: length of its vectors when nothing is asked for; max_dimensions: the largest
    Matryoshka size (0: only the native size); max_input_tokens: of one text; tasks: accepted values of `task`;
    document_task, query_task: what is sent for the two roles by default; fields: what a request may carry besides `model`
    and `input`; late_chunking_tokens: of all inputs of one late-chunking request together; sparse: makes weights of tokens.
    """

    name: str
    native_dimensions: int
    max_dimensions: int
    max_input_tokens: int
    tasks: tuple[str, ...]
    document_task: str | None
    query_task: str | None
    fields: frozenset[str]
    late_chunking_tokens: int = 0
    sparse: bool = False

    @property
    def provider(self) -> str:
        return self.name.partition("/")[0]

    @property
    def wire_name(self) -> str:
        """What the provider calls it."""
        return self.name.partition("/")[2]

    def check_dimensions(self, dimensions: int | None) -> int:
        """The length of the vectors. Raises ConfigurationError that names the nearest size that works."""
        if dimensions is None or dimensions == self.native_dimensions:
            return self.native_dimensions
        if self.sparse:
            raise ConfigurationError(
                f"{self.name} makes sparse vectors, which have no size to choose: leave dimensions out"
            )
        if not self.max_dimensions:
            raise ConfigurationError(
                f"{self.name} has no choice of dimensions: leave --dimensions out, or say {self.native_dimensions}"
            )
        if not 1 <= dimensions <= self.max_dimensions:
            nearest = min(max(dimensions, 1), self.max_dimensions)
            raise ConfigurationError(
                f"{self.name} cannot make {dimensions} dimensions; the nearest that works is --dimensions {nearest}"
                f" (1 to {self.max_dimensions})"
            )
        return dimensions

    def tasks_by_role(self, task: str | None) -> tuple[str | None, str | None]:
        """`task` for documents and for queries.

        A task with two sides may be named by its family (`retrieval`) or by its document side (`retrieval.passage`);
        any other task serves both roles. Raises ConfigurationError that names the nearest task and lists the others.
        """
        if task is None:
            return self.document_task, self.query_task
        family = task.removesuffix(".passage")
        if f"{family}.passage" in self.tasks and f"{family}.query" in self.tasks:
            return f"{family}.passage", f"{family}.query"
        if task in self.tasks:
            return task, task
        if not self.tasks:
            raise ConfigurationError(f"{self.name} has no tasks: leave --task out")
        raise ConfigurationError(
            f"{self.name} has no task {task!r}; the nearest is {self._nearest_task(task)}, of {', '.join(self.tasks)}"
        )

    def check_late_chunking(self, late_chunking: bool) -> None:
        """Raises ConfigurationError that names a model that has it."""
        if late_chunking and "late_chunking" not in self.fields:
            raise ConfigurationError(f"{self.name} has no late chunking: leave it out, or take jina/jina-embeddings-v3")

    def check_normalized(self, normalized: bool | None) -> bool | None:
        """Whether vectors are scaled to unit length, None where the model leaves no choice.

        Raises ConfigurationError for a choice that it does not leave.
        """
        if "normalized" in self.fields:
            return True if normalized is None else normalized
        if normalized is not None:
            raise ConfigurationError(
                f"{self.name} has no choice of `normalized`: leave it out, or take jina/jina-embeddings-v3"
            )
        return None

    def check_truncate(self, truncate: bool | None) -> None:
        """Raises ConfigurationError for a choice that the model does not leave."""
        if truncate is not None and "truncate" not in self.fields:
            raise ConfigurationError(
                f"{self.name} has no choice of `truncate`: leave it out, or take jina/jina-embeddings-v3"
            )

    def check_embedding_type(self, embedding_type: str, *, dimensions: int) -> EmbeddingType:
        """Raises ConfigurationError for a type that no model has, bits of sparse vectors, or dimensions that do not fill
        whole bytes of bits."""
        known = get_args(EmbeddingType)
        if embedding_type not in known:
            raise ConfigurationError(f"no embedding type {embedding_type!r}; {_suggestion(embedding_type, known)}")
        if self.sparse and embedding_type in ("binary", "ubinary"):
            raise ConfigurationError(
                f"{self.name} makes sparse vectors, and no {embedding_type} ones: leave embedding_type out"
            )
        if embedding_type in ("binary", "ubinary") and dimensions % 8:
            nearest = max(8, dimensions // 8 * 8)
            raise ConfigurationError(
                f"{embedding_type} vectors hold eight dimensions in a byte, and {dimensions} is no multiple of eight;"
                f" the nearest that works is {nearest}"
            )
        return cast("EmbeddingType", embedding_type)

    def _nearest_task(self, task: str) -> str:
        family, dot, side = task.partition(".")
        takes = {*self.tasks, *(one.removesuffix(".passage") for one in self.tasks)}
        near = [*(f"{one}{dot}{side}" for one in _NEAR_TASKS.get(family, ())), *_NEAR_TASKS.get(family, ())]
        found = [one for one in near if one in takes]
        return (found or difflib.get_close_matches(task, self.tasks, n=1, cutoff=0.0))[0]


@dataclass(frozen=True, slots=True)
class Tier:
    """What one API key may do. requests, tokens: per minute; concurrency: requests at the same time."""

    name: str
    requests: int
    tokens: int
    concurrency: int


_RETRIEVAL = ("retrieval.query", "retrieval.passage")
_CODE_TASKS = tuple(
    f"{family}.{side}"
    for family in ("nl2code", "qa", "code2code", "code2nl", "code2completion")
    for side in ("query", "passage")
)
_COMMON = frozenset({"embedding_type", "truncate"})
_V5_FIELDS = _COMMON | {"normalized", "task", "dimensions"}
_V5_TASKS = (*_RETRIEVAL, "text-matching", "clustering", "classification")


def _v2(language: str) -> ProviderModel:
    name = f"jina/jina-embeddings-v2-base-{language}"
    return ProviderModel(name, 768, 0, 8192, (), None, None, _COMMON | {"normalized"})


def _v5(size: str, *, dimensions: int, max_input_tokens: int) -> ProviderModel:
    name = f"jina/jina-embeddings-v5-text-{size}"
    query_task, document_task = _RETRIEVAL
    return ProviderModel(
        name, dimensions, dimensions, max_input_tokens, _V5_TASKS, document_task, query_task, _V5_FIELDS
    )


def _code(size: str, *, dimensions: int) -> ProviderModel:
    return ProviderModel(
        f"jina/jina-code-embeddings-{size}",
        dimensions,
        dimensions,
        32768,
        _CODE_TASKS,
        "nl2code.passage",
        "nl2code.query",
        _COMMON | {"task", "dimensions"},
    )


_JINA_V3 = ProviderModel(
    "jina/jina-embeddings-v3",
    1024,
    1024,
    8192,
    (*_RETRIEVAL, "text-matching", "classification", "separation"),
    "retrieval.passage",
    "retrieval.query",
    _V5_FIELDS | {"late_chunking"},
    late_chunking_tokens=8192,
)
_JINA_V4 = ProviderModel(
    "jina/jina-embeddings-v4",
    2048,
    2048,
    32768,
    ("text-matching", *_RETRIEVAL, "code.query", "code.passage"),
    "retrieval.passage",
    "retrieval.query",
    _COMMON | {"task", "dimensions", "late_chunking"},
    # Nothing is published for v4: the limit of v3, which is safe.
    late_chunking_tokens=8192,
)

MODELS = {
    model.name: model
    for model in (
        _JINA_V3,
        _JINA_V4,
        _v5("small", dimensions=1024, max_input_tokens=32768),
        _v5("nano", dimensions=768, max_input_tokens=8192),
        _code("0.5b", dimensions=896),
        _code("1.5b", dimensions=1536),
        *(_v2(language) for language in ("en", "zh", "de", "es", "code")),
    )
}

# Its schema declares `embedding_type`, too. What other types than numbers would make of weights is not described, so it is
# left out. The limit of a text is the one that Elastic gives for the model, Jina gives none.
SPARSE_MODELS = {
    "jina/elser-v2": ProviderModel(
        "jina/elser-v2",
        SPARSE_DIMENSIONS,
        0,
        512,
        _RETRIEVAL,
        "retrieval.passage",
        "retrieval.query",
        frozenset({"task"}),
        sparse=True,
    )
}

_UNSTORABLE = {
    "jina/jina-colbert-v2": "a vector per token",
    "jina/jina-colbert-v1-en": "a vector per token",
}

# Published plans disagree with each other; these are the figures of the rate limit page, the free one as enforced in 2026.
# What a 429 announces is believed over them.
TIERS = {
    tier.name: tier
    for tier in (
        Tier("free", 100, 100_000, 2),
        Tier("paid", 500, 2_000_000, 50),
        Tier("premium", 5_000, 50_000_000, 500),
    )
}


def find_model(name: str) -> ProviderModel:
    """The model of that name whose vectors a dataset holds. Raises ConfigurationError that names the near one."""
    if name in MODELS:
        return MODELS[name]
    if name in SPARSE_MODELS:
        raise ConfigurationError(
            f"{name} makes sparse vectors, which a dataset cannot hold yet: take jina/jina-embeddings-v3, or embed with"
            " embedmill.JinaEmbedding and store them yourself"
        )
    if name in _UNSTORABLE:
        raise ConfigurationError(
            f"{name} makes {_UNSTORABLE[name]}, which a dataset cannot hold yet: take jina/jina-embeddings-v3"
        )
    raise ConfigurationError(f"no model {name!r}; {_suggestion(name, MODELS)}")


def find_sparse_model(name: str) -> ProviderModel:
    """The model of that name that makes sparse vectors. Raises ConfigurationError that names the near one."""
    if name in SPARSE_MODELS:
        return SPARSE_MODELS[name]
    raise ConfigurationError(f"no sparse model {name!r}; {_suggestion(name, SPARSE_MODELS)}")


def find_tier(name: str) -> Tier:
    """The plan of that name. Raises ConfigurationError that names the near one."""
    if name in TIERS:
        return TIERS[name]
    raise ConfigurationError(f"no tier {name!r}; {_suggestion(name, TIERS)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
