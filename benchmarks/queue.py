"""How fast the queue is, what it costs, and what it moves beside streaq and taskiq-redis on the same server.

Each measure is repeated in turn with those that it is compared with; the table shows the median and the best. The peers are
installed apart, see --peers-python; without them the rest is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio

from embedmill.connection import FAKE_URL
from embedmill.errors import ConfigurationError, EmbedmillError
from scheduler.embedded import embedded_server

from . import peers, queue_measures
from .pipeline import write_corpus
from .processes import ChildFailed
from .queue_measures import SHARD_ROWS, Server
from .results import note, print_table, write_result

_BATCH = 64
_MIB_PER_MILLION = 1.0
_SHARE = 0.01
_TIMES_THE_PEERS = 5.0
# Ways of a document from a producer's memory until a worker has acknowledged it.
_OURS = {
    "references": f"the queue alone, a reference to {SHARD_ROWS:,} documents a task",
    "log": "pushed into the document log (Parquet, fsync, index), task, texts read back",
    "inbox": "Producer, inbox, scheduler, document log, receipts, task, texts read back",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. documents: of the pushes and of the comparison; job_documents: of the null job."""

    documents: int = 100_000
    trial_documents: int = 40_000
    job_documents: int = 200_000
    tasks: int = 4_000
    wake_samples: int = 600
    memory_shards: tuple[int, ...] = (245, 2_450)
    processes: int = 8
    rounds: int = 3


QUICK = Sizes(
    documents=20_000, trial_documents=5_000, job_documents=40_000, tasks=800, wake_samples=200, processes=8, rounds=1
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmill-bench-", dir=options.folder))
            url = options.redis or stack.enter_context(embedded_server())
            record = measure(Path(folder), url=url, sizes=sizes, seed=options.seed, python=options.peers_python)
    except EmbedmillError as error:
        note(f"benchmarks.queue: {error}")
        return error.exit_status
    except ChildFailed as error:
        note(f"benchmarks.queue: a measured process failed: {error}")
        return 1
    path = write_result("queue", record)
    show(record)
    note(f"written to {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, once: half a minute")
    parser.add_argument("--seed", type=int, default=1, help="of the documents' words; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="where files are written meanwhile; fsync costs what its disk takes"
    )
    parser.add_argument("--redis", metavar="URL", help="an idle server of yours instead of a private one in memory")
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="PYTHON",
        help="the interpreter that has streaq and taskiq-redis; default: this one",
    )  # fmt: skip
    return parser


def measure(folder: Path, *, url: str, sizes: Sizes, seed: int, python: str) -> dict[str, Any]:
    """Everything, below `folder`. Raises EmbedmillError or ChildFailed when a part of it does not come to its end."""
    if url == FAKE_URL:
        raise ConfigurationError("no embedded server runs on this machine: name one with --redis URL")
    server = Server(url)
    corpus, job_corpus = folder / "corpus.jsonl", folder / "job.jsonl"
    corpus_bytes = write_corpus(corpus, documents=sizes.documents, seed=seed)
    write_corpus(job_corpus, documents=sizes.job_documents, seed=seed)
    note("lease, renew, commit")
    cycles = measure_cycles(server, sizes)
    note("memory")
    memory = queue_measures.measure_memory(server, shards=sizes.memory_shards)
    note("wake to lease")
    wake = queue_measures.measure_wake(server, samples=sizes.wake_samples, seed=seed)
    note("a null-embedder job")
    share = queue_measures.measure_share(job_corpus, folder, documents=sizes.job_documents)
    full_cycle_ms = cycles["one process"]["cpu_ms_per_task"]
    share["cpu_share_by_cycles"] = full_cycle_ms / 1000 * share["calls"]["finish"]["calls"] / share["cpu_s"]
    note("push, and the same documents through the peers")
    return {
        "seed": seed,
        "sizes": asdict(sizes),
        "server": _server_name(server),
        "corpus_mb": round(corpus_bytes / 1e6, 1),
        "cycles": cycles,
        "memory": memory,
        "wake": wake,
        "share": share,
        "push": measure_push(server, corpus, folder, sizes),
        "moved": compare(server, corpus, folder, sizes=sizes, seed=seed, python=python),
    }


def measure_cycles(server: Server, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Of one worker process with one task at a time, of one with eight, and of eight with one each."""
    shapes = {
        "one process": (1, 1),
        "one process, 8 tasks at once": (1, 8),
        f"{sizes.processes} processes": (sizes.processes, 1),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in shapes}
    for _ in range(sizes.rounds):
        for name, (processes, in_flight) in shapes.items():
            runs[name].append(
                queue_measures.measure_cycles(server, tasks=sizes.tasks, processes=processes, in_flight=in_flight)
            )
    return {name: _summary_of_cycles(found) for name, found in runs.items()}


def _summary_of_cycles(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    worker = statistics.median(r["worker_cpu_ms_per_task"] for r in runs)
    server = statistics.median(r["server_cpu_ms_per_task"] for r in runs)
    return {
        **_summary([r["tasks_per_s"] for r in runs]),
        "worker_cpu_ms_per_task": worker,
        "server_cpu_ms_per_task": server,
        "cpu_ms_per_task": worker + server,
    }


def measure_push(server: Server, corpus: Path, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """`embedmill push` of the file, and of a file of one document: what starting up takes."""
    single = folder / "single.jsonl"
    write_corpus(single, documents=1, seed=0)
    walls, starts = [], []
    for _ in range(sizes.rounds):
        starts.append(queue_measures.measure_push_command(server, single, folder).wall_s)
        walls.append(queue_measures.measure_push_command(server, corpus, folder).wall_s)
    start_s = min(starts)
    rates = [sizes.documents / max(wall_s - start_s, 1e-3) for wall_s in walls]
    return {
        "start_up_s": start_s,
        "documents_per_s": _summary(rates),
        "mb_per_s": _summary([rate * corpus.stat().st_size / sizes.documents / 1e6 for rate in rates]),
        "documents_per_s_with_start_up": _summary([sizes.documents / wall_s for wall_s in walls]),
    }


def compare(server: Server, corpus: Path, folder: Path, *, sizes: Sizes, seed: int, python: str) -> dict[str, Any]:
    """Documents a second, ours and the peers', taken in turns; each peer with the setting that a trial found best."""
    found = peers.find_peers(python)
    how: dict[str, Any] = {"python": python, "url": server.url, "batch": _BATCH, "uvloop": "uvloop" in found}
    best: dict[str, peers.Setting] = {}
    if found.keys() & {"streaq", "taskiq-redis"}:
        trial = folder / "trial.jsonl"
        write_corpus(trial, documents=sizes.trial_documents, seed=seed)
        best = peers.choose(peers.usable(peers.SETTINGS, found), documents=trial, count=sizes.trial_documents, **how)
    inbox_runs: list[dict[str, float]] = []

    def through_inbox() -> float:
        inbox_runs.append(queue_measures.measure_through_inbox(server, corpus, folder, count=sizes.documents))
        return inbox_runs[-1]["documents_per_s"]

    lines: dict[str, Callable[[], float]] = {
        "log": lambda: queue_measures.measure_through_log(server, corpus, folder, count=sizes.documents)[
            "documents_per_s"
        ],
        "inbox": through_inbox,
        "references": lambda: queue_measures.measure_references(server, tasks=sizes.tasks)["documents_per_s"],
    }
    for setting in best.values():
        lines[setting.name] = _mover(setting, documents=corpus, count=sizes.documents, **how)
    runs: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(sizes.rounds):
        for name, run in lines.items():
            runs[name].append(run())
    speeds = {name: _summary(values) for name, values in runs.items()}
    theirs = max((speeds[s.name]["median"] for s in best.values()), default=None)
    return {
        "peers": found,
        "ours": {name: speeds[name] for name in _OURS},
        "inbox": {
            "receipts_per_s": _summary([run["receipts_per_s"] for run in inbox_runs]),
            "redis_peak_mib": max(run["redis_peak_mib"] for run in inbox_runs),
        },
        "theirs": {setting.name: speeds[setting.name] for setting in best.values()},
        "ratios": {name: None if theirs is None else speeds[name]["median"] / theirs for name in _OURS},
    }


def _mover(setting: peers.Setting, **how: Any) -> Callable[[], float]:
    return lambda: peers.move(setting, **how)["documents_per_s"]


def show(record: dict[str, Any]) -> None:
    """The tables."""
    sizes = record["sizes"]
    moved, share, wake, push = record["moved"], record["share"], record["wake"], record["push"]
    ratios = moved["ratios"]
    receipts, mb_per_document = moved["inbox"]["receipts_per_s"], record["corpus_mb"] / sizes["documents"]
    print(f"\n{record['server']}; rounds: {sizes['rounds']}; the first figure is the median")
    rows: list[tuple[object, ...]] = []
    for name, what in _OURS.items():
        if ratios[name] is not None:
            held = _verdict(ratios[name] >= _TIMES_THE_PEERS, ">= 5 x")
            rows.append((f"documents moved against the best peer: {what}", f"{ratios[name]:.2f} x", held))
    shares = {
        "counted inside the job": share["cpu_share"],
        "the same, and all that the server used since its start": share["cpu_share_with_server"],
        "worker and server CPU of a cycle, times its shards": share["cpu_share_by_cycles"],
    }
    rows += [
        (f"CPU of the null job: {name}", f"{100 * value:.2f} %", _verdict(value < _SHARE, "< 1 %"))
        for name, value in shares.items()
    ]
    rows += [
        (
            f"Redis memory, {m['documents']:,} documents queued", f"{m['mib_per_million']:.3f} MiB a million",
            _verdict(m["mib_per_million"] <= _MIB_PER_MILLION, "<= 1 MiB"),
        )
        for m in record["memory"]
    ]  # fmt: skip
    print_table("Against the bounds", ("", "measured", "bound"), rows)
    print_table(
        "Lease, renew, commit: one script each",
        ("", "tasks/s", "best", "worker CPU ms", "server CPU ms"),
        [
            (name, c["median"], c["best"], c["worker_cpu_ms_per_task"], c["server_cpu_ms_per_task"])
            for name, c in record["cycles"].items()
        ],
    )
    print_table(
        f"Wake to lease, {wake['samples']} times",
        ("", "p50 ms", "p99 ms", "longest ms"),
        [("from enqueue to lease", wake["p50_ms"], wake["p99_ms"], wake["max_ms"])],
    )
    print_table(
        f"Push: {sizes['documents']:,} documents, {record['corpus_mb']} MB",
        ("", "documents/s", "best", "MB/s"),
        [
            (
                "embedmill push of a file, into log and queue",
                *_pair(push["documents_per_s"]),
                push["mb_per_s"]["median"],
            ),
            (f"with its start-up of {push['start_up_s']:.1f} s", *_pair(push["documents_per_s_with_start_up"]), None),
            (
                f"Producer, inbox, admission, receipts; Redis rose by {moved['inbox']['redis_peak_mib']:.1f} MiB",
                *_pair(receipts),
                receipts["median"] * mb_per_document,
            ),
        ],
    )
    print_table(
        f"Documents moved, from a producer's memory to the acknowledgement; peers in jobs of {_BATCH}",
        ("", "documents/s", "best"),
        [(_OURS[name], *_pair(s)) for name, s in moved["ours"].items()]
        + [(name, *_pair(s)) for name, s in moved["theirs"].items()],
    )
    if not {"streaq", "taskiq-redis"} <= moved["peers"].keys():
        wanted = " ".join(f"'{requirement}'" for requirement in peers.REQUIREMENTS)
        print(
            "\n  not all peers are installed: python -m venv PEERS && PEERS/bin/pip install"
            f" {wanted}, then --peers-python PEERS/bin/python"
        )


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "best": max(values)}


def _pair(summary: dict[str, float]) -> tuple[float, float]:
    return summary["median"], summary["best"]


def _verdict(held: bool, bound: str) -> str:
    return f"{bound}: {'held' if held else 'MISSED'}"


def _server_name(server: Server) -> str:
    info = anyio.run(server.info)
    name = "Valkey" if "valkey_version" in info else "Redis"
    return f"{name} {info.get('valkey_version', info.get('redis_version'))}, appendonly {info.get('aof_enabled')}"


if __name__ == "__main__":
    sys.exit(main())
