"""Nearest passages of a question, by the embedder that the collection was made with."""

from __future__ import annotations

import numpy as np

from embedmill.embedder import Embedder
from embedmill.errors import ConfigurationError

from .description import CollectionDescription
from .target import MAX_HITS, CollectionState, Hit, MilvusTarget


async def choose_collection(target: MilvusTarget) -> CollectionState:
    """The collection to search: the one that was asked for, else the only one of ours; `target.collection` is set.

    Raises ConfigurationError when there is none, or when there are several.
    """
    ours = await target.collections()
    names = [state.name for state in ours]
    listed = ", ".join(names)
    if not ours:
        raise ConfigurationError(f"{target.address.shown} has no collection of embedmill: `embedmill load` makes one")
    if target.collection is None and len(ours) > 1:
        raise ConfigurationError(
            f"{target.address.shown} has several collections: choose one with --collection, of {listed}"
        )
    if target.collection is None:
        target.collection = names[0]
    if target.collection not in names:
        raise ConfigurationError(
            f"{target.address.shown} has no collection {target.collection} of embedmill; it has: {listed}"
        )
    return ours[names.index(target.collection)]


def check_query(text: str, *, limit: int) -> None:
    """Raises ConfigurationError for a question or a number of hits that cannot be answered."""
    if not text.strip():
        raise ConfigurationError("the question is empty: say what to search for")
    if not 1 <= limit <= MAX_HITS:
        raise ConfigurationError(f"--limit {limit}: give a number from 1 to {MAX_HITS}")


def require_embedder(description: CollectionDescription, embedder: Embedder) -> None:
    """Raises ConfigurationError when the embedder's vectors cannot be compared with the collection's."""
    spec = embedder.spec
    if spec.fingerprint == description.fingerprint:
        return
    pairs = {
        "model": (description.model, spec.model),
        "dimensions": (description.dimensions, spec.dimensions),
        "revision": (description.revision, spec.revision),
        "options": (dict(description.options), dict(spec.options)),
    }
    differences = [f"{name} {ours!r}, here {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    raise ConfigurationError(
        f"the collection was made by another embedder ({'; '.join(differences) or 'its limits differ'}): "
        "search with the one that made it"
    )


async def search(
    target: MilvusTarget,
    embedder: Embedder,
    text: str,
    *,
    limit: int = 5,
    filter: str = "",  # noqa: A002
) -> list[Hit]:
    """The nearest passages, best first, of those that `filter` (Milvus' own expression) lets through.

    Raises ConfigurationError for an empty question, a bad limit, a bad filter, or an embedder of another vector space.
    """
    check_query(text, limit=limit)
    state = await choose_collection(target)
    if state.description is not None:
        require_embedder(state.description, embedder)
    embedding = await embedder.embed([text], role="query")
    await target.make_searchable()
    return await target.search(np.asarray(embedding.vectors[0], dtype=np.float32), limit=limit, expression=filter)
