"""`embedmill search`: ask a collection, with the embedder that it was made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import click

from .options import output_options, shared

if TYPE_CHECKING:
    from loader.target import Hit

_SHOWN_TEXT = 300
_SHOWN_METADATA = 200
_EPILOG = """\b
Examples:
  embedmill search "how do I cancel a task" --milvus ./wiki/milvus.db
  embedmill search "tax rules" --milvus http://localhost:19530 --filter 'metadata["lang"] == "en"'
"""


@click.command(epilog=_EPILOG)
@click.argument("text")
@shared("milvus", "collection", "api_base")
@click.option(
    "--model", metavar="local/PATH", help="Where the collection's own model lies here, if not where its name says."
)
@click.option("--limit", default=5, show_default=True, help="How many hits.")
@click.option("--filter", "expression", default="", metavar="EXPR", help="Milvus' filter, over id and metadata.")
@output_options
def search(
    text: str,
    *,
    milvus: str | None,
    collection: str | None,
    api_base: str | None,
    model: str | None,
    limit: int,
    expression: str,
    as_json: bool,
) -> None:
    """Find the passages that are nearest to TEXT."""
    if not milvus:
        raise click.UsageError("--milvus URI is missing: a path like ./wiki/milvus.db, or http://HOST:19530")
    ask = partial(
        _search,
        milvus=milvus,
        collection=collection,
        api_base=api_base,
        model=model,
        limit=limit,
        expression=expression,
        as_json=as_json,
    )
    anyio.run(ask, text)


async def _search(
    text: str,
    *,
    milvus: str,
    collection: str | None,
    api_base: str | None,
    model: str | None,
    limit: int,
    expression: str,
    as_json: bool,
) -> None:
    from loader.search import check_query, choose_collection
    from loader.search import search as find
    from loader.target import open_target

    from .embedders import open_embedder

    check_query(text, limit=limit)
    async with open_target(milvus, collection=collection, must_exist=True, retry_for_s=20.0) as target:
        state = await choose_collection(target)
        made_with = state.description
        if made_with is None:
            raise RuntimeError("a collection without a description was chosen")
        async with open_embedder(
            model or made_with.model, dimensions=made_with.dimensions, api_base=api_base, options=made_with.options
        ) as embedder:
            hits = await find(target, embedder, text, limit=limit, filter=expression)
        empty = not hits and not await target.count()
    if as_json:
        click.echo(json.dumps({"collection": state.name, "hits": [_record(hit) for hit in hits]}, ensure_ascii=False))
    else:
        _show(hits, nothing=_why_nothing(state.name, expression, empty=empty))


def _why_nothing(collection: str, expression: str, *, empty: bool) -> str:
    if empty:
        return f"Collection {collection} is empty."
    return f"No hits: nothing in collection {collection} passes --filter {expression!r}." if expression else "No hits."


def _record(hit: Hit) -> dict[str, Any]:
    return {"id": hit.id, "score": round(hit.score, 6), "text": hit.text, "metadata": dict(hit.metadata)}


def _show(hits: Sequence[Hit], *, nothing: str) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    if not hits:
        console.print(Text(nothing))
    for number, hit in enumerate(hits, start=1):
        console.print(Text.assemble(f"{number}. ", (f"{hit.score:.4f}", "bold"), "  ", (hit.id, "cyan")))
        console.print(Padding(Text(_beginning(hit.text, _SHOWN_TEXT)), (0, 0, 0, 3), expand=False))
        if hit.metadata:
            line = _beginning(json.dumps(hit.metadata, ensure_ascii=False), _SHOWN_METADATA)
            console.print(Padding(Text(line, style="dim"), (0, 0, 0, 3), expand=False))


def _beginning(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"
