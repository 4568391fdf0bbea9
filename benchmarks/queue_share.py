"""`python -m benchmarks.queue_share OUT.json ARGUMENT...`: the command `embedmill`, with its queue's calls timed.

CPU time is the thread's, step by step of each call, so that what other coroutines do meanwhile does not count; wall time is
from the call to its return, and holds what the event loop did for others.
"""

from __future__ import annotations

import atexit
import functools
import json
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scheduler.queue import Queue

TIMED = ("enqueue", "lease", "extend", "finish")


@dataclass(slots=True)
class Account:
    calls: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


@types.coroutine
def _stepwise(call: Coroutine[Any, Any, Any], account: Account) -> Generator[Any, Any, Any]:
    sent: Any = None
    error: BaseException | None = None
    account.calls += 1
    started = time.perf_counter()
    try:
        while True:
            cpu_s = time.thread_time()
            try:
                waits_for = call.send(sent) if error is None else call.throw(error)
            except StopIteration as end:
                return end.value
            finally:
                account.cpu_s += time.thread_time() - cpu_s
            try:
                sent, error = (yield waits_for), None
            except BaseException as thrown:
                error = thrown
    finally:
        account.wall_s += time.perf_counter() - started


def _timed(method: Callable[..., Coroutine[Any, Any, Any]], account: Account) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(*arguments: Any, **options: Any) -> Any:
        return await _stepwise(method(*arguments, **options), account)

    return call


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    accounts = {name: Account() for name in TIMED}
    for name, account in accounts.items():
        setattr(Queue, name, _timed(getattr(Queue, name), account))

    def finish() -> None:
        record = {"process_cpu_s": time.process_time(), "calls": {n: asdict(a) for n, a in accounts.items()}}
        out.write_text(json.dumps(record), encoding="utf-8")

    atexit.register(finish)
    from embedmill.commands.main import run

    run(arguments)


if __name__ == "__main__":
    main()
