"""How fast `local/minilm` embeds Python's own documentation, and what sorting by length buys.

All in one run, on the same passages, in alternating rounds of which the fastest counts: embedmill's batches (passages of
like length together, a bound on rows times the longest) beside batches of 32 as they arrive, through the same session of
ONNX Runtime; and sentence-transformers' own `encode`, where that is installed. Tokens are real ones: after the cut at 256,
without padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray

from embedmill.errors import EmbedmillError
from embedmill.sources.pydoc import collect_passages
from worker.embedders.minilm import OnnxEmbedder, find_weights
from worker.packing import pack

from .command import Cost
from .results import note, print_table, write_result

_NAIVE_BATCH = 32
_SAME_COSINE = 0.9999
_OURS, _NAIVE, _PEER = "embedmill, sorted by length", "batches of 32 as they arrive", "sentence-transformers encode"

Vectors = NDArray[np.float32]


@dataclass(slots=True)
class Variant:
    """One way to embed all passages. padding: tokens computed / real tokens, None where that is not known."""

    name: str
    embed: Callable[[], Vectors]
    padding: float | None = None
    best: Cost | None = None
    vectors: Vectors | None = None

    def time(self) -> None:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        self.vectors = self.embed()
        cost = Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s)
        if self.best is None or cost.wall_s < self.best.wall_s:
            self.best = cost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm", description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=400, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the sample; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="cores to use; default: all")
    options = parser.parse_args(arguments)
    try:
        record = measure(passages=options.passages, seed=options.seed, rounds=options.rounds, threads=options.threads)
    except EmbedmillError as error:
        note(f"benchmarks.minilm: {error}")
        return error.exit_status
    show(record)
    note(f"written to {write_result('minilm', record)}")
    return 0


def measure(*, passages: int, seed: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Raises EmbedmillError when two ways do not give the same vectors: then they cannot be compared."""
    texts = sample_texts(passages, seed=seed)
    embedder = OnnxEmbedder(threads=threads)
    tokens = embedder.estimate_tokens(texts)
    sorted_batches = pack(tokens, limits=embedder.limits)
    naive_batches = arrival_batches(len(texts))
    variants = [
        Variant(_OURS, partial(_embed_sorted, embedder, texts), padding_factor(tokens, batches=sorted_batches)),
        Variant(
            _NAIVE,
            partial(_embed_batches, embedder, texts, naive_batches),
            padding_factor(tokens, batches=naive_batches),
        ),
    ]
    peer = _load_peer(threads)
    if peer is None:
        note("sentence-transformers is not installed: it is left out (pip install 'embedmill[transformers]')")
    else:
        variants.append(Variant(_PEER, partial(peer, texts)))
    _embed_batches(embedder, texts, naive_batches[:1])
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            note(f"round {number + 1} of {rounds}: {variant.name}")
            variant.time()
    _require_same(variants)
    return {
        "passages": len(texts),
        "seed": seed,
        "rounds": rounds,
        "tokens": sum(tokens),
        "threads": threads,
        "variants": {variant.name: _describe(variant, passages=len(texts), tokens=sum(tokens)) for variant in variants},
    }


def sample_texts(count: int, *, seed: int) -> list[str]:
    """Passages of `pydoc:`, drawn without repetition, in the order of the draw; all of them when there are fewer."""
    texts = [passage.text for passage in collect_passages()]
    return random.Random(seed).sample(texts, min(count, len(texts)))


def arrival_batches(count: int) -> list[list[int]]:
    return [list(range(start, min(start + _NAIVE_BATCH, count))) for start in range(0, count, _NAIVE_BATCH)]


def padding_factor(tokens: Sequence[int], *, batches: Sequence[Sequence[int]]) -> float:
    """Tokens that are computed, padding included, over real ones."""
    return sum(len(batch) * max(tokens[position] for position in batch) for batch in batches) / sum(tokens)


def show(record: dict[str, Any]) -> None:
    variants: dict[str, dict[str, float]] = record["variants"]
    base = variants[_NAIVE]
    rows = [
        (
            name, v["documents_per_s"], v["tokens_per_s"], v["documents_per_cpu_s"], v["padding"],
            f"{v['documents_per_s'] / base['documents_per_s']:.2f}",
            f"{v['documents_per_cpu_s'] / base['documents_per_cpu_s']:.2f}",
        )
        for name, v in variants.items()
    ]  # fmt: skip
    header = ("", "docs/s", "tokens/s", "docs/CPU s", "computed/real", "x naive, wall", "x naive, CPU")
    print_table(f"{record['passages']:,} passages of pydoc:, {record['tokens']:,} tokens", header, rows)


def _describe(variant: Variant, *, passages: int, tokens: int) -> dict[str, float | None]:
    cost = variant.best or Cost()
    return {
        "wall_s": round(cost.wall_s, 3),
        "cpu_s": round(cost.cpu_s, 3),
        "documents_per_s": round(passages / cost.wall_s, 2),
        "tokens_per_s": round(tokens / cost.wall_s, 1),
        "documents_per_cpu_s": round(passages / cost.cpu_s, 2),
        "padding": None if variant.padding is None else round(variant.padding, 3),
    }


def _embed_sorted(embedder: OnnxEmbedder, texts: Sequence[str]) -> Vectors:
    """As a worker does it, counting tokens and packing included."""
    return _embed_batches(embedder, texts, pack(embedder.estimate_tokens(texts), limits=embedder.limits))


def _embed_batches(embedder: OnnxEmbedder, texts: Sequence[str], batches: Sequence[Sequence[int]]) -> Vectors:
    vectors = np.zeros((len(texts), embedder.spec.dimensions), np.float32)

    async def embed() -> None:
        for batch in batches:
            vectors[batch] = (await embedder.embed([texts[position] for position in batch])).vectors

    anyio.run(embed)
    return vectors


def _load_peer(threads: int | None) -> Callable[[Sequence[str]], Vectors] | None:
    """`SentenceTransformer.encode` with its defaults, on the same weights and the CPU; None where it is not installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    import torch
    from sentence_transformers import SentenceTransformer

    if threads:
        torch.set_num_threads(threads)
    model = SentenceTransformer(str(find_weights()), device="cpu")
    model.encode(["warm"])
    return lambda texts: np.asarray(model.encode(list(texts)), dtype=np.float32)


def _require_same(variants: Sequence[Variant]) -> None:
    first = variants[0].vectors
    for variant in variants[1:]:
        if first is None or variant.vectors is None:
            raise EmbedmillError("nothing was measured: --rounds takes 1 or more")
        worst = float((first * variant.vectors).sum(axis=1).min())
        if worst < _SAME_COSINE:
            raise EmbedmillError(f"{variant.name} gives other vectors (cosine {worst:.4f}): it cannot be compared")


if __name__ == "__main__":
    sys.exit(main())
