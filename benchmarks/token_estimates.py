"""How far token estimates are off, request by request, against a real tokenizer.

    python -m benchmarks.token_estimates --corpus corpus.jsonl [--tokenizer tokenizer.json]

The tokenizer (a file of Hugging Face's tokenizers) stands for the provider, which bills whole requests. A request has 16
texts, cut at 900 characters, drawn at random. Beside ours: a quarter of the UTF-8 bytes, as many clients count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from embedmill.token_estimates import TokenEstimator, features
from worker.embedders.minilm import find_weights

from .results import note, print_table, write_result

_TEXTS, _CHARS, _REQUESTS, _WARM_UP = 16, 900, 200, 20
_ALLOWED = 0.10


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when the mean error after 20 requests is over a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, action="append", help="JSON Lines with `text`")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; else that of local/minilm")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    path = options.tokenizer or find_weights() / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [text for corpus in options.corpus for text in _read(corpus)]
    ours, naive, seconds = measure(
        texts, lambda batch: sum(map(len, tokenizer.encode_batch(batch))), chance=random.Random(options.seed)
    )
    rows = [_row("learned per script", ours), _row("a quarter of the bytes", naive)]
    print_table(
        f"Error of a request's estimate, {len(ours)} requests of {_TEXTS} texts, {path.name}",
        ["estimate", "mean of the first 20", "mean after", "p95 after", "bias after"],
        rows,
    )
    note(f"{seconds * 1e9:.0f} ns of CPU per character")
    write_result("token_estimates", {"rows": rows, "seconds_per_character": seconds, "seed": options.seed})
    return int(float(np.abs(ours[_WARM_UP:]).mean()) > _ALLOWED)


def measure(
    texts: Sequence[str], count: Callable[[list[str]], int], *, chance: random.Random
) -> tuple[np.ndarray, np.ndarray, float]:
    """Relative errors of our estimates and of a quarter of the bytes, (requests,) each; CPU seconds per character."""
    estimator = TokenEstimator()
    ours, naive = [], []
    for _ in range(_REQUESTS):
        batch = chance.choices(texts, k=_TEXTS)
        billed = count(batch)
        ours.append(float(estimator.estimate(batch).sum()) / billed - 1)
        naive.append(sum(len(text.encode()) for text in batch) / 4 / billed - 1)
        estimator.learn(batch, billed)
    sample = chance.choices(texts, k=2000)
    began = time.process_time()
    features(sample)
    return np.array(ours), np.array(naive), (time.process_time() - began) / sum(map(len, sample))


def _read(path: Path) -> list[str]:
    texts = [str(json.loads(line).get("text") or "") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [text[start : start + _CHARS] for text in texts for start in range(0, len(text), _CHARS)]


def _row(name: str, errors: np.ndarray) -> list[object]:
    after = np.abs(errors[_WARM_UP:])
    return [
        name,
        *(
            f"{100 * float(value):.1f} %"
            for value in (
                np.abs(errors[:_WARM_UP]).mean(),
                after.mean(),
                np.quantile(after, 0.95),
                errors[_WARM_UP:].mean(),
            )
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
