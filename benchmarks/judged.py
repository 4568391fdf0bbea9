"""Does a corpus that went through the whole pipe answer its queries as well as the model can? With exit status.

`embedmill run` in a process of its own; then the dataset is opened, the queries are embedded by the same embedder, and
every query is compared with every vector (exact cosine). A swapped row, a lost title, wrong pooling or a wrong id falls far
outside of the expected figures. With --milvus the same through the collection and the code of `embedmill search`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from embedmill.commands.embedders import open_embedder
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED
from embedmill.embedder import Embedder
from embedmill.errors import ConfigurationError, EmbedmillError
from worker.packing import pack

from .command import run_embedmill
from .results import note, write_result
from .retrieval import Quality, evaluate

DEPTH = 100
_TEXT_FIELDS = ("title", "text")
_LOOKED_AT = 200
_LITE = "lite"


@dataclass(frozen=True, slots=True)
class Queries:
    """Position i of both belongs to one query."""

    ids: list[str]
    texts: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="embedmill-judged-") as scratch:
            return anyio.run(_judge, options, options.to or str(Path(scratch) / "dataset"))
    except EmbedmillError as error:
        note(f"benchmarks.judged: {error}")
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judged", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="JSON Lines with id (or _id), text, perhaps title")
    parser.add_argument("--queries", type=Path, required=True, help="JSON Lines with id (or _id) and text")
    parser.add_argument("--qrels", type=Path, required=True, help="tab-separated: query id, document id, score")
    parser.add_argument("--model", default="local/minilm")
    parser.add_argument("--to", metavar="DATASET", help="keep the dataset there, or judge the one that is there")
    parser.add_argument(
        "--milvus", nargs="?", const=_LITE, metavar="URI", help="search in Milvus too (no URI: Milvus Lite)"
    )
    parser.add_argument("--expect-ndcg", type=float, metavar="X")
    parser.add_argument("--expect-recall", type=float, metavar="X")
    parser.add_argument("--tolerance", type=float, default=0.005, help="default: %(default)s")
    return parser


async def _judge(options: argparse.Namespace, url: str) -> int:
    queries, relevant = read_queries(options.queries), read_judgements(options.qrels)
    milvus = str(Path(url) / "milvus.db") if options.milvus == _LITE else options.milvus
    fields = find_text_fields(options.corpus)
    note(f"embedding {options.corpus} ({' and '.join(fields)}) with {options.model}")
    place = ["--milvus", milvus] if milvus else ["--no-milvus"]
    record, cost = run_embedmill(
        ["run", str(options.corpus), "--to", url, "--model", options.model, "--text-field", ",".join(fields), *place],
        allowed=(0, 1),
    )
    qualities = {"exact": evaluate(await _rank_exactly(Dataset.open(url), queries), relevant=relevant)}
    if milvus:
        rankings = await _rank_by_search(milvus, record["collection"], queries)
        qualities["milvus"] = evaluate(rankings, relevant=relevant)
    problems = [problem for name, found in qualities.items() for problem in differences(name, found, options=options)]
    result: dict[str, Any] = {
        "model": options.model,
        "text_fields": list(fields),
        "documents": record["documents"],
        "passages": record["passages"],
        "cost": cost.as_dict(),
        **{name: {k: round(v, 4) for k, v in found.as_dict().items()} for name, found in qualities.items()},
        "problems": problems,
    }
    path = write_result("judged", result)
    print(json.dumps(result, indent=2))
    note(f"written to {path}")
    for problem in problems:
        note(f"benchmarks.judged: {problem}")
    return int(bool(problems))


def differences(name: str, found: Quality, *, options: argparse.Namespace) -> list[str]:
    """What is not as expected, in sentences."""
    pairs = {
        "nDCG@10": (found.ndcg_at_10, options.expect_ndcg),
        "recall@100": (found.recall_at_100, options.expect_recall),
    }
    return [
        f"{name}: {measure} is {value:.4f}, expected {expected} within {options.tolerance}"
        for measure, (value, expected) in pairs.items()
        if expected is not None and abs(value - expected) > options.tolerance
    ]


def find_text_fields(corpus: Path) -> tuple[str, ...]:
    """Of title and text those that the first records have."""
    fields = {field for record in islice(_records(corpus), _LOOKED_AT) for field in record}
    found = tuple(field for field in _TEXT_FIELDS if field in fields)
    if not found:
        raise ConfigurationError(f"{corpus}: its records have neither a title nor a text")
    return found


def read_queries(path: Path) -> Queries:
    records = list(_records(path))
    try:
        return Queries([str(r.get("id", r.get("_id"))) for r in records], [r["text"] for r in records])
    except KeyError as error:
        raise ConfigurationError(f"{path}: a query has no field {error}") from error


def read_judgements(path: Path) -> dict[str, set[str]]:
    """Per query the documents with a score above zero. A header line is passed over."""
    relevant: dict[str, set[str]] = {}
    with _opened(path) as file:
        for number, line in enumerate(file):
            try:
                query, document, score = line.split("\t")
                if number == 0 and not score.strip().lstrip("-").isdecimal():
                    continue
                if int(score) > 0:
                    relevant.setdefault(query, set()).add(document)
            except ValueError as error:
                raise ConfigurationError(
                    f"{path}:{number + 1}: not `query id, document id, score` with tabs"
                ) from error
    if not relevant:
        raise ConfigurationError(f"{path}: no document is judged relevant")
    return relevant


def rank_exactly(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], *, ids: Sequence[str], depth: int = DEPTH
) -> list[list[str]]:
    """The `depth` ids of highest cosine for every query, best first; equal ones in the order of `ids`.

    queries (m, dimensions), vectors (n, dimensions), none of them zero; ids[i] belongs to vectors[i].
    """
    cosines = _unit(queries) @ _unit(vectors).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :depth]
    return [[ids[position] for position in row] for row in order.tolist()]


async def _rank_exactly(dataset: Dataset, queries: Queries) -> Mapping[str, Sequence[str]]:
    ids, vectors = read_vectors(dataset)
    async with _embedder_of(dataset) as embedder:
        asked = await embed_queries(embedder, queries.texts)
    return dict(zip(queries.ids, rank_exactly(asked, vectors, ids=ids), strict=True))


def read_vectors(dataset: Dataset) -> tuple[list[str], NDArray[np.float32]]:
    """Ids and vectors of everything that is embedded."""
    ids: list[str] = []
    parts = [np.empty((0, dataset.info.dimensions), np.float32)]
    for shard in dataset.committed():
        marker = dataset.marker(shard)
        table, _ = dataset.documents(shard, columns=["id"])
        rows = np.flatnonzero(marker.statuses == EMBEDDED) if marker else np.empty(0, np.intp)
        own = [str(id_) for id_ in table.column("id").to_pylist()]
        ids += [own[row] for row in rows]
        parts.append(dataset.vectors(shard)[rows].astype(np.float32))
    return ids, np.concatenate(parts)


async def embed_queries(embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float32]:
    """(n, dimensions), row i belongs to texts[i]."""
    vectors = np.empty((len(texts), embedder.spec.dimensions), np.float32)
    for batch in pack(embedder.estimate_tokens(texts), limits=embedder.limits):
        vectors[batch] = (await embedder.embed([texts[position] for position in batch], role="query")).vectors
    return vectors


async def _rank_by_search(milvus: str, collection: str, queries: Queries) -> Mapping[str, Sequence[str]]:
    """One search after the other, as `embedmill search` does it."""
    from loader.search import choose_collection, search
    from loader.target import open_target

    async with open_target(milvus, collection=collection, must_exist=True) as target:
        made_with = (await choose_collection(target)).description
        if made_with is None:
            raise ConfigurationError(f"collection {collection} does not say what made it: load it again")
        async with open_embedder(
            made_with.model, dimensions=made_with.dimensions, options=made_with.options
        ) as embedder:
            hits = [await search(target, embedder, text, limit=DEPTH) for text in queries.texts]
    return {id_: [hit.id for hit in found] for id_, found in zip(queries.ids, hits, strict=True)}


@asynccontextmanager
async def _embedder_of(dataset: Dataset) -> AsyncIterator[Embedder]:
    spec = dataset.info.embedder
    async with open_embedder(spec.model, dimensions=spec.dimensions, options=spec.options) as embedder:
        dataset.require(embedder.spec)
        yield embedder


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _records(path: Path) -> Any:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigurationError(f"{path}:{number}: not JSON: {error}") from error


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be opened: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
