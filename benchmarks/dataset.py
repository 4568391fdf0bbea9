"""How fast committed shards reach the disk and come back: ours, raw files with fsync, np.save, zarr-python, tensorstore.

Every contestant is a process of its own with the same vectors; all take turns in each round, the writers two shards in
flight. The table shows medians over the rounds, ratios are made within a round. CPU is of the whole process, all threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .processes import Child, ChildFailed
from .results import note, print_table, write_result

_WRITE_SHARE = 0.8
_CPU_US_PER_ROW = 10.0
_ROWS_PER_CORE = 300_000.0
_MEMORY_SHARDS = 2.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """needs: a package that may be missing."""

    who: str
    what: str
    needs: str = "numpy"


WRITERS = (
    Contestant("ours", "embedmill: vectors, marker, all durable"),
    Contestant("raw", "raw files of the same bytes, fsync"),
    Contestant("npy", "np.save, fsync"),
    Contestant("zarr-default", "zarr-python, its defaults, not durable"),
    Contestant("zarr", "zarr-python, our layout, not durable"),
    Contestant("tensorstore", "tensorstore, our layout, durable", "tensorstore"),
)
READERS = (
    Contestant("ours", "embedmill, every checksum verified"),
    Contestant("reader", "embedmill.open_dataset, with ids and texts"),
    Contestant("raw", "the bytes of the files"),
    Contestant("npy", "np.load"),
    Contestant("zarr", "zarr-python, checksums verified"),
    Contestant("tensorstore", "tensorstore, checksums verified", "tensorstore"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """shards: of 4,096 rows, written by each contestant in each round."""

    shards: int = 48
    rounds: int = 5
    dimensions: int = 1024


QUICK = Sizes(shards=3, rounds=1, dimensions=64)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataset", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few small shards, one round: seconds")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            record = measure(sizes, folder=Path(folder))
    except ChildFailed as error:
        note(f"benchmarks.dataset: a measured process failed: {error}")
        return 1
    path = write_result("dataset", record)
    show(record)
    note(f"written to {path}")
    return 0


def measure(sizes: Sizes, *, folder: Path) -> dict[str, Any]:
    measured: list[dict[str, Any]] = []
    for dtype in ("float32", "float16"):
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for number in range(sizes.rounds):
            note(f"{dtype}, round {number + 1} of {sizes.rounds}")
            place = folder / f"{dtype}-{number}"
            place.mkdir()
            for one in _present(WRITERS):
                runs.setdefault(("write", one.who), []).append(_run("write", one, dtype, sizes, place))
            for what in ("warm", "cold"):
                for one in _present(READERS):
                    runs.setdefault((what, one.who), []).append(_run(what, one, dtype, sizes, place))
            # A folder of its own in each round: nobody writes over what the cache holds.
            _remove(place)
        measured += [_summary(dtype, what, who, found, runs) for (what, who), found in runs.items()]
    return {"sizes": asdict(sizes), "measured": measured}


def _present(contestants: Sequence[Contestant]) -> list[Contestant]:
    return [one for one in contestants if find_spec(one.needs)]


def _run(what: str, one: Contestant, dtype: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    options = {
        "what": what, "who": one.who, "dtype": dtype, "folder": str(folder),
        "shards": sizes.shards, "dimensions": sizes.dimensions,
    }  # fmt: skip
    with Child("benchmarks.dataset_contestants", options) as contestant:
        contestant.wait_until_ready()
        contestant.go()
        return contestant.result()


def _summary(
    dtype: str, what: str, who: str, found: Sequence[dict[str, float]], runs: dict[Any, list[dict[str, float]]]
) -> dict[str, Any]:
    """share_of_raw: our speed is so much of raw's, or whoever's; medians over the rounds."""
    pairs = zip(found, runs[what, "raw"], strict=True)
    return {
        "dtype": dtype,
        "what": what,
        "who": who,
        "rows_per_s": statistics.median(run["rows"] / run["wall_s"] for run in found),
        "mb_per_s": statistics.median(run["bytes"] / run["wall_s"] / 1e6 for run in found),
        "cpu_us_per_row": statistics.median(1e6 * run["work_cpu_s"] / run["rows"] for run in found),
        "rows_per_core": statistics.median(run["rows"] / run["work_cpu_s"] for run in found),
        "memory_shards": max(run["memory_shards"] for run in found),
        "share_of_raw": statistics.median(
            (one["bytes"] / one["wall_s"]) / (raw["bytes"] / raw["wall_s"]) for one, raw in pairs
        ),
        "runs": list(found),
    }


def show(record: dict[str, Any]) -> None:
    names = {("write", one.who): one.what for one in WRITERS}
    names |= {(what, one.who): one.what for one in READERS for what in ("warm", "cold")}
    titles = {"write": "written, two shards in flight", "warm": "read, warm", "cold": "read, cold"}
    for dtype in ("float32", "float16"):
        for what, title in titles.items():
            rows = [row for row in record["measured"] if (row["dtype"], row["what"]) == (dtype, what)]
            print_table(
                f"{record['sizes']['dimensions']:,} x {dtype}, {title}",
                ("", "MB/s", "of raw", "rows/s", "CPU us a row", "rows/s per core", "memory in shards"),
                [
                    (
                        names[what, row["who"]], row["mb_per_s"], f"{row['share_of_raw']:.0%}", row["rows_per_s"],
                        row["cpu_us_per_row"], row["rows_per_core"], row["memory_shards"],
                    )
                    for row in rows
                ],
            )  # fmt: skip
    print()
    for line in judge(record):
        print(f"  {line}")


def judge(record: dict[str, Any]) -> list[str]:
    """Each bound, what was measured, and whether it holds."""
    ours = {(row["dtype"], row["what"]): row for row in record["measured"] if row["who"] == "ours"}

    def line(text: str, value: float, bound: float, *, at_least: bool) -> str:
        held = value >= bound if at_least else value <= bound
        return f"{text}: {value:,.2f}, {'at least' if at_least else 'at most'} {bound:,.2f}: {'held' if held else 'MISSED'}"

    lines: list[str] = []
    for dtype in ("float32", "float16"):
        write, warm, cold = (ours[dtype, what] for what in ("write", "warm", "cold"))
        lines += [
            line(
                f"{dtype}, durable commits, share of raw with fsync", write["share_of_raw"], _WRITE_SHARE, at_least=True
            ),
            line(f"{dtype}, CPU us a committed row", write["cpu_us_per_row"], _CPU_US_PER_ROW, at_least=False),
            line(f"{dtype}, memory of a writer in shards", write["memory_shards"], _MEMORY_SHARDS, at_least=False),
            line(f"{dtype}, verified rows/s per core, warm", warm["rows_per_core"], _ROWS_PER_CORE, at_least=True),
            line(f"{dtype}, cold, share of reading the bytes", cold["share_of_raw"], _WRITE_SHARE, at_least=True),
        ]
    return lines


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
