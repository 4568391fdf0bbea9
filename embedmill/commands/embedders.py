"""From `--model PROVIDER/NAME` to an embedder and the budget that its requests draw on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from embedmill.connection import Connection
from scheduler.budget import Budget, RequestBudget, Unlimited, key_id
from worker.embedders.jina import API_BASE, JinaEmbedder, key_from_environment

from ..embedder import BatchLimits, Embedder
from ..errors import ConfigurationError
from ..models import Tier, find_tier

REHEARSAL = "rehearsal"


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

    @property
    def limits(self) -> Tier:
        """The tier, but for what was said otherwise."""
        tier = find_tier(self.tier or "free")
        return Tier(tier.name, self.rpm or tier.requests, self.tpm or tier.tokens, self.concurrency or tier.concurrency)

    @property
    def key(self) -> str:
        """Raises ConfigurationError where the environment has none."""
        return REHEARSAL if self.rehearsed else key_from_environment()


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
    choice = ModelChoice(model, dimensions, task if isinstance(task, str) else None, api_base)
    embedder = make_embedder(choice)
    try:
        yield embedder
    finally:
        await embedder.aclose()


def make_embedder(choice: ModelChoice) -> Embedder:
    """Loads a local model, which takes a while; for a provider, checks key and options without sending anything."""
    provider, _, name = choice.model.partition("/")
    if provider in ("local", "null") and (choice.task or choice.api_base):
        option = "--task" if choice.task else "--api-base"
        raise ConfigurationError(f"{option} does not apply to {choice.model}: leave it out")
    if provider == "jina" and name:
        return _make_jina(choice)
    if provider == "null":
        return _make_null(choice, name)
    if provider == "local" and name:
        return _make_local(choice, name)
    raise ConfigurationError(
        f"unknown model {choice.model!r}: --model takes PROVIDER/NAME, for example local/minilm, local/PATH, "
        "jina/jina-embeddings-v3 or null/384"
    )


def make_budget(choice: ModelChoice, connection: Connection, *, namespace: str) -> RequestBudget:
    """The fleet's budget for the key in use; local models have none."""
    provider = choice.model.partition("/")[0]
    if provider in ("local", "null"):
        return Unlimited()
    limits = choice.limits
    return Budget(
        connection,
        namespace=namespace,
        key_id=key_id(provider, choice.key),
        rpm=limits.requests,
        tpm=limits.tokens,
        concurrency=limits.concurrency,
    )


def request_limits(model: str, tier: Tier) -> BatchLimits:
    """What one request of a provider's model may hold at a tier. Needs no key, and sends nothing."""
    return JinaEmbedder(model, key="unused", tokens_per_minute=tier.tokens, concurrency=tier.concurrency).limits


def _make_jina(choice: ModelChoice) -> Embedder:
    limits = choice.limits
    return JinaEmbedder(
        choice.model,
        key=choice.key,
        api_base=choice.api_base or API_BASE,
        dimensions=choice.dimensions,
        task=choice.task,
        concurrency=limits.concurrency,
        tokens_per_minute=limits.tokens,
        revision=REHEARSAL if choice.rehearsed else "",
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
