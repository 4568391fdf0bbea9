"""How fast everything around the model is: many short documents through the whole pipe, with an embedder that costs next to
nothing (`null/384`), beside what a script by hand would take for the same.

The floors are measured in the same run: reading and parsing the file and nothing else; and reading, the same vectors and
`np.save` with fsync, a file per shard: no queue, no document log, no index, no checksums, nothing that can be resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedmill.errors import EmbedmillError
from worker.embedders.null import hash_vectors

from .command import Cost, run_embedmill
from .results import note, print_table, write_result

_DIMENSIONS = 384
_SHARD_ROWS = 4096
_SYLLABLES = [consonant + vowel for consonant in "bdfklmnprst" for vowel in "aeiou"]
_SHOWN_FUNCTIONS = 15


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="embedmill-bench-", dir=options.folder) as folder:
            record = measure(Path(folder), documents=options.documents, seed=options.seed, profile=options.profile)
    except EmbedmillError as error:
        note(f"benchmarks.pipeline: {error}")
        return error.exit_status
    show(record)
    note(f"written to {write_result('pipeline', record)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=200_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the documents' words; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="where files are written meanwhile; fsync costs what its disk takes"
    )
    parser.add_argument("--profile", action="store_true", help="a second run, watched: where the time goes")
    return parser


def measure(folder: Path, *, documents: int, seed: int, profile: bool) -> dict[str, Any]:
    """Everything, below `folder`. Raises EmbedmillError when the pipe does not embed every document."""
    corpus = folder / "corpus.jsonl"
    note(f"making {documents:,} documents")
    corpus_bytes = write_corpus(corpus, documents=documents, seed=seed)
    note("reading them, as a floor")
    reading = _timed(lambda: read_all(corpus))
    note("reading, vectors and np.save, as a script by hand would")
    script = _timed(lambda: embed_by_hand(corpus, folder / "by-hand"))
    note("the whole pipe")
    pipe = _run(corpus, folder / "dataset", documents=documents)
    return {
        "documents": documents,
        "seed": seed,
        "corpus_mb": round(corpus_bytes / 1e6, 1),
        "floor_reading": reading.as_dict(),
        "floor_by_hand": script.as_dict(),
        "pipe": pipe.as_dict(),
        "documents_per_s": round(documents / pipe.wall_s),
        "ratios": {
            "wall_to_reading": round(pipe.wall_s / reading.wall_s, 2),
            "wall_to_by_hand": round(pipe.wall_s / script.wall_s, 2),
            "cpu_to_by_hand": round(pipe.cpu_s / script.cpu_s, 2),
        },
        "profile": _profile(corpus, folder, documents=documents) if profile else None,
    }


def write_corpus(path: Path, *, documents: int, seed: int) -> int:
    """Documents of 20 to 60 invented words with a little metadata; the file's bytes. One seed makes one file."""
    source = random.Random(seed)
    words = ["".join(source.choices(_SYLLABLES, k=source.randint(1, 4))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(source.choices(words, k=source.randint(20, 60)))
            record = {"id": f"doc-{number:07d}", "text": text, "lang": "xx", "number": number}
            file.write(json.dumps(record) + "\n")
    return path.stat().st_size


def read_all(corpus: Path) -> int:
    """Parse every line; how many there are."""
    with corpus.open(encoding="utf-8") as file:
        return sum(1 for line in file if json.loads(line)["text"])


def embed_by_hand(corpus: Path, folder: Path) -> None:
    """The same vectors, in one file per shard, each durable."""
    folder.mkdir()
    with corpus.open(encoding="utf-8") as lines:
        for number, texts in enumerate(_blocks((json.loads(line)["text"] for line in lines), size=_SHARD_ROWS)):
            with (folder / f"{number:08d}.npy").open("wb") as file:
                np.save(file, hash_vectors(texts, _DIMENSIONS))
                file.flush()
                os.fsync(file.fileno())


def show(record: dict[str, Any]) -> None:
    """The tables."""
    floors = {"reading and json.loads": "floor_reading", "reading, vectors, np.save": "floor_by_hand"}
    documents = record["documents"]
    rows = [
        (
            name,
            documents / record[key]["wall_s"],
            documents / record[key]["cpu_s"],
            record[key]["wall_s"],
            record[key]["cpu_s"],
            None,
            None,
        )
        for name, key in {**floors, "embedmill run": "pipe"}.items()
    ]
    pipe = record["pipe"]
    rows[-1] = (*rows[-1][:5], pipe["peak_mb"], pipe["children_peak_mb"])
    header = ("", "documents/s", "documents/CPU s", "wall s", "CPU s", "peak MB", "of children MB")
    print_table(f"{documents:,} documents, {record['corpus_mb']} MB, null/{_DIMENSIONS}", header, rows)
    ratios = record["ratios"]
    print(
        f"\n  embedmill takes {ratios['wall_to_by_hand']} times the wall time of the script by hand,"
        f" {ratios['cpu_to_by_hand']} times its CPU time, and {ratios['wall_to_reading']} times the reading"
    )
    if record["profile"]:
        _show_profile(record["profile"])


def _show_profile(profile: dict[str, Any]) -> None:
    total = profile["cpu_s"]
    stages: dict[str, dict[str, float]] = profile["stages"]
    rows: list[tuple[object, ...]] = [
        (name, spent["cpu_s"], f"{100 * spent['cpu_s'] / total:.0f} %", spent["wall_s"])
        for name, spent in stages.items()
    ]
    rows.append(("threads of libraries", profile["other_threads_s"], _percent(profile["other_threads_s"], total), None))
    rows.append(("the sampler itself", profile["sampler_cpu_s"], _percent(profile["sampler_cpu_s"], total), None))
    title = f"Where the time goes: {total:.1f} CPU s in {profile['wall_s']:.1f} s, {profile['samples']:,} looks"
    print_table(title, ("stage", "CPU s", "share", "busy or blocked s"), rows)
    functions: dict[str, float] = profile["functions"]
    print_table(
        "Innermost functions", ("function", "CPU s", "share"),
        [(name, spent, _percent(spent, total)) for name, spent in islice(functions.items(), _SHOWN_FUNCTIONS)],
    )  # fmt: skip


def _percent(part: float, total: float) -> str:
    return f"{100 * part / total:.0f} %"


def _run(corpus: Path, dataset: Path, *, documents: int, **how: Any) -> Cost:
    model = f"null/{_DIMENSIONS}"
    record, cost = run_embedmill(["run", str(corpus), "--to", str(dataset), "--model", model, "--no-milvus"], **how)
    if record["passages"]["embedded"] != documents:
        raise EmbedmillError(f"{record['passages']['embedded']:,} of {documents:,} documents were embedded")
    return cost


def _profile(corpus: Path, folder: Path, *, documents: int) -> dict[str, Any]:
    note("the whole pipe again, watched")
    out = folder / "profile.json"
    cost = _run(corpus, folder / "profiled", documents=documents, python=("-m", "benchmarks.sampling", str(out)))
    profile: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {"wall_s": round(cost.wall_s, 3), **profile}


def _timed(work: Callable[[], object]) -> Cost:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _blocks(texts: Iterator[str], *, size: int) -> Iterator[list[str]]:
    while block := list(islice(texts, size)):
        yield block


if __name__ == "__main__":
    sys.exit(main())
