"""From `--model PROVIDER/NAME` to an embedder and the budget that its requests draw on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from embedmill.connection import Connection
from scheduler.breaker import Breaker
from scheduler.budget import Budget, RequestBudget, Unlimited, key_id
from scheduler.keyring import Key, KeyRing
from worker.embedders.jina import API_BASE, JinaEmbedder
from worker.keys import FoundKeys, keys_from_environment

from ..embedder import BatchLimits, Embedder, EmbedderSpec, is_local
from ..errors import ConfigurationError
from ..exact_tokens import ExactTokens
from ..models import Tier, find_tier

REHEARSAL = "rehearsal"
LARGEST_TIER = "premium"
_UNUSED_KEY = "unused"


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What the user asked for. rpm, tpm, concurrency override those of the tier; rehearsed: a simulator answers, no key is
    needed, and the vectors are of no model."""

    model: str
    dimensions: int | None = None
    task: str | None = None
    api_base: str | None = None
    tier: str | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    rehearsed: bool = False
    late_chunking: bool = False
    tokenizer: str | None = None

    @property
    def limits(self) -> Tier:
        """The tier, but for what was said otherwise."""
        tier = find_tier(self.tier or "free")
        return Tier(tier.name, self.rpm or tier.requests, self.tpm or tier.tokens, self.concurrency or tier.concurrency)

    @property
    def keys(self) -> FoundKeys:
        """Raises ConfigurationError where the environment has none."""
        return FoundKeys((REHEARSAL,)) if self.rehearsed else keys_from_environment()


@asynccontextmanager
async def open_embedder(
    model: str,
    *,
    dimensions: int | None = None,
    api_base: str | None = None,
    options: Mapping[str, object] | None = None,
) -> AsyncIterator[Embedder]:
    """The embedder of a stored spec, for a few queries. Raises ConfigurationError when it cannot be had here."""
    task = (options or {}).get("task")
    late_chunking = (options or {}).get("late_chunking") is True
    choice = ModelChoice(
        model, dimensions, task if isinstance(task, str) else None, api_base, late_chunking=late_chunking
    )
    embedder = make_embedder(choice)
    try:
        yield embedder
    finally:
        await embedder.aclose()


def make_spec(choice: ModelChoice) -> EmbedderSpec:
    """The spec of that embedder, which a dataset keeps; needs no key."""
    return make_embedder(choice, key=_UNUSED_KEY).spec


def make_embedder(choice: ModelChoice, *, key: str | None = None) -> Embedder:
    """Loads a local model, which takes a while; for a provider, checks key and options without sending anything.

    key: in place of the environment's first one.
    """
    provider, _, name = choice.model.partition("/")
    if is_local(choice.model):
        named = ("task", "api_base", "late_chunking", "tokenizer")
        for option in (f"--{name.replace('_', '-')}" for name in named if getattr(choice, name)):
            raise ConfigurationError(f"{option} does not apply to {choice.model}: leave it out")
    if provider == "jina" and name:
        return _make_jina(choice, key or choice.keys.keys[0])
    if provider == "null":
        return _make_null(choice, name)
    if provider == "local" and name:
        return _make_local(choice, name)
    raise ConfigurationError(
        f"unknown model {choice.model!r}: --model takes PROVIDER/NAME, for example local/minilm, local/PATH, "
        "jina/jina-embeddings-v3 or null/384"
    )


def make_budget(choice: ModelChoice, connection: Connection, *, namespace: str) -> RequestBudget:
    """The fleet's budgets for the keys in use, each of which has the limits for itself; local models have none."""
    provider = choice.model.partition("/")[0]
    if is_local(choice.model):
        return Unlimited()
    limits = choice.limits

    def open_key(secret: str) -> Key:
        id_ = key_id(provider, secret)
        budget = Budget(
            connection,
            namespace=namespace,
            key_id=id_,
            rpm=limits.requests,
            tpm=limits.tokens,
            concurrency=limits.concurrency,
        )
        api_base = (choice.api_base or API_BASE).rstrip("/")
        return Key(secret, budget, Breaker(connection, namespace=namespace, key_id=id_, api_base=api_base))

    found = choice.keys
    return KeyRing(found.keys, open_key=open_key, source=found.file)


def request_limits(model: str, tier: Tier, *, late_chunking: bool = False) -> BatchLimits:
    """What one request of a provider's model may hold at a tier. Needs no key, and sends nothing."""
    return JinaEmbedder(
        model,
        key=_UNUSED_KEY,
        late_chunking=late_chunking,
        requests_per_minute=tier.requests,
        tokens_per_minute=tier.tokens,
        concurrency=tier.concurrency,
    ).limits


def _make_jina(choice: ModelChoice, key: str) -> Embedder:
    limits = choice.limits
    return JinaEmbedder(
        choice.model,
        key=key,
        api_base=choice.api_base or API_BASE,
        dimensions=choice.dimensions,
        task=choice.task,
        late_chunking=choice.late_chunking,
        concurrency=limits.concurrency,
        requests_per_minute=limits.requests,
        tokens_per_minute=limits.tokens,
        revision=REHEARSAL if choice.rehearsed else "",
        tokenizer=ExactTokens(choice.tokenizer) if choice.tokenizer else None,
    )


def _make_null(choice: ModelChoice, name: str) -> Embedder:
    from worker.embedders.null import DEFAULT_DIMENSIONS, NullEmbedder

    if name and not (name.isdecimal() and int(name) > 0):
        raise ConfigurationError(f"{choice.model}: the null embedder's name is its dimensions, for example null/384")
    return NullEmbedder(choice.dimensions or int(name or DEFAULT_DIMENSIONS))


def _make_local(choice: ModelChoice, name: str) -> Embedder:
    if name == "minilm":
        from worker.embedders.minilm import OnnxEmbedder

        embedder: Embedder = OnnxEmbedder()
    else:
        from worker.embedders.sentence_transformers import SentenceTransformerEmbedder

        embedder = SentenceTransformerEmbedder(name)
    if choice.dimensions not in (None, embedder.spec.dimensions):
        raise ConfigurationError(
            f"{choice.model} makes {embedder.spec.dimensions} dimensions: leave --dimensions out, or say that number"
        )
    return embedder
