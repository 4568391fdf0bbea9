"""The embedder port: what turns texts into vectors, and what identifies the vector space.

Every adapter (a provider's API, a local model) keeps these rules: row i of the result belongs to `texts[i]`; one call of
`embed` is one request, never retried inside; failures are raised as the errors of `embedmill.errors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError

Role = Literal["document", "query"]


def is_local(model: str) -> bool:
    """Whether nothing is sent for a model, and nothing paid."""
    return model.partition("/")[0] in ("local", "null")


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """What decides the vector of a text. Two embedders with one fingerprint write into one vector space.

    model: `PROVIDER/NAME`; dimensions: length of a vector; revision: of the weights, or of the provider's model;
    max_input_tokens: where longer passages are cut; options: what else changes vectors (task, late chunking).
    """

    model: str
    dimensions: int
    revision: str = ""
    max_input_tokens: int = 0
    options: Mapping[str, str | int | bool | None] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over every field that is not at its default, independent of key order.

        So a field that a later release adds changes no fingerprint until it is used.
        """
        used = {key: value for key, value in self.as_dict().items() if value not in ("", 0, None, {})}
        canonical = json.dumps(used, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    @property
    def packs_bits(self) -> bool:
        """Whether a vector is bits, eight dimensions to a byte, instead of float32."""
        return self.options.get("embedding_type") in ("binary", "ubinary")

    @property
    def late_chunking(self) -> bool:
        """Whether the vector of a passage depends on the other passages of its document."""
        return self.options.get("late_chunking") is True

    def require_floats(self) -> None:
        """Raises ConfigurationError for vectors that a dataset cannot store."""
        if self.packs_bits:
            raise ConfigurationError(
                f"a dataset stores floats only, and {self.model} is asked for {self.options['embedding_type']} vectors:"
                " leave embedding_type out, or embed with embedmill.JinaEmbedding and store them yourself"
            )

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "options": dict(self.options)}


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one request may hold.

    max_inputs: passages; max_tokens: estimated tokens, counted as passages times the longest one when `padded`
    (local models pay for padding) and as their sum otherwise; concurrency: requests in flight that make sense.
    least_tokens: what a request should hold, since the key's requests per minute would run out before its tokens
    otherwise; most_inputs: passages that it may have for that (0: max_inputs). alone_tokens: a passage of so many goes
    alone, so that its bill says whether it was cut (0: none does).
    """

    max_inputs: int
    max_tokens: int
    padded: bool
    concurrency: int
    least_tokens: int = 0
    most_inputs: int = 0
    alone_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to one request.

    vectors: (n, dimensions) float32, row i belongs to texts[i], or where the spec `packs_bits` (n, dimensions / 8) int8 for
    `binary` and uint8 for `ubinary`; a sparse model's: (n,) object, see `embedmill.sparse.sparse_row`;
    billed_tokens: what the provider counts (a local model: the tokens it computed); truncated: positions of the texts that
    were cut to the model's limit.
    """

    vectors: NDArray[np.float32]
    billed_tokens: int
    truncated: tuple[int, ...] = ()


@runtime_checkable
class RefusesLong(Protocol):
    """An embedder that can also refuse texts over the model's limit instead of cutting them."""

    def refusing_long(self) -> Embedder:
        """The same embedder, for requests in which nothing is cut. Closed with the one that it comes from."""
        ...


@runtime_checkable
class EmbedsTogether(Protocol):
    """An embedder with late chunking: a document request is one document, or a window of one."""

    @property
    def window_tokens(self) -> int:
        """The most that a window may hold, as `planned_tokens` counts."""
        ...

    def planned_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens by a rule that learns nothing, so that the same document always makes the same windows."""
        ...


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def spec(self) -> EmbedderSpec: ...

    @property
    def limits(self) -> BatchLimits: ...

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text will count, at most the model's limit. Runs in a thread: no loop, no I/O."""
        ...

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """Embed within `limits`, in one request.

        Raises: RateLimited, Overloaded, OutcomeUnknown, InputRejected, InvalidKey, NoBalance. Cancelling it abandons the
        request; what it cost is then unknown.
        """
        ...

    async def aclose(self) -> None: ...


@runtime_checkable
class TakesKeys(Protocol):
    """An embedder whose requests may go with any of several API keys of one owner. Others know nothing of keys."""

    async def embed_with(self, key: str, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        """As `Embedder.embed`, with this key."""
        ...
