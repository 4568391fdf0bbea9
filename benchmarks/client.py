"""How many vectors a second a core gets out of an embeddings API: our client, the openai SDK, JinaEmbeddingFunction.

A canned server in a process of its own answers at once, so that the clients are all that is measured. All take turns in each
round; the table shows medians over the rounds, and ratios are made within a round. The floor is what cannot be saved: bytes
over loopback, and base64. The peers are installed apart, see --peers-python; without them the rest is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .peers import find_packages
from .processes import Child, ChildFailed
from .results import note, print_table, write_result

# JinaEmbeddingFunction imports requests, which its package does not ask for.
REQUIREMENTS = ("openai>=3.54", "pymilvus.model>=0.3.4", "pybase64>=1.5", "requests>=2.32")
_TIMES_THE_SDK = 5.0
_PACKAGES = {"openai": "openai", "pymilvus.model": "pymilvus.model", "pybase64": "pybase64", "numpy": "numpy"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """needs: the package of the peers' environment, None for ours; blocking: one request at a time."""

    who: str
    what: str
    needs: str | None = None
    blocking: bool = False


CONTESTANTS = (
    Contestant("client", "embedmill, the worker's client"),
    Contestant("face", "embedmill.AsyncJinaEmbedding"),
    Contestant("sdk", "openai SDK, async, its default (base64 to lists)", "openai"),
    Contestant("sdk-base64", "openai SDK, async, base64 decoded by hand", "openai"),
    Contestant("sdk-float", "openai SDK, async, float", "openai"),
    Contestant("jina-function", "pymilvus' JinaEmbeddingFunction (float)", "pymilvus.model", blocking=True),
    Contestant("floor", "floor: loopback and base64 alone", "pybase64", blocking=True),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """inputs: of one request; seconds: of one contestant in one round; in_flight: requests of those that do not block."""

    inputs: tuple[int, ...] = (64, 512)
    dimensions: int = 1024
    seconds: float = 2.0
    rounds: int = 5
    in_flight: int = 4


QUICK = Sizes(seconds=0.3, rounds=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: a minute")
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="PYTHON",
        help="the interpreter that has openai, pymilvus.model and pybase64; default: this one",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        record = measure(QUICK if options.quick else Sizes(), python=options.peers_python)
    except ChildFailed as error:
        note(f"benchmarks.client: a measured process failed: {error}")
        return 1
    path = write_result("client", record)
    show(record)
    note(f"written to {path}")
    return 0


def measure(sizes: Sizes, *, python: str) -> dict[str, Any]:
    found = find_packages(python, _PACKAGES)
    present = [one for one in CONTESTANTS if one.needs is None or one.needs in found]
    measured = [row for inputs in sizes.inputs for row in _in_turns(present, inputs, sizes=sizes, python=python)]
    return {"sizes": asdict(sizes), "peers": found, "measured": measured}


def _in_turns(present: Sequence[Contestant], inputs: int, *, sizes: Sizes, python: str) -> list[dict[str, Any]]:
    """A row for each contestant. per_core: vectors per CPU second of the client's process."""
    runs: dict[str, list[dict[str, float]]] = {one.who: [] for one in present}
    for number in range(sizes.rounds):
        note(f"{inputs} inputs a request, round {number + 1} of {sizes.rounds}")
        with Child("benchmarks.canned_server", {"inputs": [inputs], "dimensions": sizes.dimensions}) as server:
            server.wait_until_ready()
            serving = server.result()
            for one in present:
                runs[one.who].append(_run(one, inputs, sizes=sizes, python=python, serving=serving))
    per_core = {who: [run["vectors"] / run["client_cpu_s"] for run in found] for who, found in runs.items()}
    return [
        {
            "who": one.who,
            "inputs": inputs,
            "per_core": statistics.median(per_core[one.who]),
            "per_core_best": max(per_core[one.who]),
            "cpu_us_per_vector": 1e6 / statistics.median(per_core[one.who]),
            "per_s": statistics.median(run["vectors"] / run["wall_s"] for run in runs[one.who]),
            "client_is_times_it": statistics.median(
                ours / theirs for ours, theirs in zip(per_core["client"], per_core[one.who], strict=True)
            ),
            "runs": runs[one.who],
        }
        for one in present
    ]


def _run(one: Contestant, inputs: int, *, sizes: Sizes, python: str, serving: dict[str, Any]) -> dict[str, float]:
    options = {
        "who": one.who, "inputs": inputs, "dimensions": sizes.dimensions, "seconds": sizes.seconds,
        "in_flight": 1 if one.blocking else sizes.in_flight, "url": f"http://127.0.0.1:{serving['port']}",
        "sum": serving["sums"][str(inputs)],
    }  # fmt: skip
    with Child(
        "benchmarks.client_contestants", options, python=sys.executable if one.needs is None else python
    ) as contestant:
        contestant.wait_until_ready()
        contestant.go()
        return contestant.result()


def show(record: dict[str, Any]) -> None:
    names = {one.who: one.what for one in CONTESTANTS}
    for inputs in record["sizes"]["inputs"]:
        rows = [row for row in record["measured"] if row["inputs"] == inputs]
        print_table(
            f"{inputs} inputs a request, {record['sizes']['dimensions']:,} dimensions",
            ("", "vectors/s per core", "best", "CPU us a vector", "vectors/s", "the client is"),
            [
                (
                    names[row["who"]], row["per_core"], row["per_core_best"], row["cpu_us_per_vector"], row["per_s"],
                    f"{row['client_is_times_it']:.2f} x",
                )
                for row in rows
            ],
        )  # fmt: skip
        for row in rows:
            if row["who"] == "sdk":
                held = "held" if row["client_is_times_it"] >= _TIMES_THE_SDK else "MISSED"
                print(f"\n  at least {_TIMES_THE_SDK:.0f} times the SDK: {row['client_is_times_it']:.2f} x, {held}")
    if not _PACKAGES.keys() <= record["peers"].keys():
        wanted = " ".join(f"'{requirement}'" for requirement in REQUIREMENTS)
        print(
            f"\n  not all peers are installed: python -m venv PEERS && PEERS/bin/pip install {wanted},"
            " then --peers-python PEERS/bin/python"
        )


if __name__ == "__main__":
    sys.exit(main())
