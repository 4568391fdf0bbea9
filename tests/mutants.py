"""Known-bad variants of the queue and of what stands around it, and which layer of the tests must catch each.

A layer that lets one of its mutants live has gone blind. `contract` is tests/contract (single calls on real servers),
`simulation` is tests/simulation (the whole system on virtual time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from embedmill import connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Marker
from embedmill.dataset.store import LocalStore
from embedmill.messages import Announcement, DeadLetter, Task
from scheduler.queue import Queue

Layer = Literal["contract", "simulation"]
_SIMULATION: tuple[Layer, ...] = ("simulation",)
_CONTRACT: tuple[Layer, ...] = ("contract",)
_BOTH: tuple[Layer, ...] = ("contract", "simulation")
# Taken before anything is patched.
_script_text = connection.script_text
_finish = Queue.finish
_commit = Dataset.commit


@dataclass(frozen=True)
class Mutant:
    """`apply()` is a context in which the product has the fault. seeds: within so many the simulation must catch it."""

    name: str
    caught_by: Sequence[Layer]
    apply: Callable[[], AbstractContextManager[Any]]
    seeds: int = 60


def script_mutant(script: str, text: str, replacement: str) -> Callable[[], AbstractContextManager[Any]]:
    """The script with `text`, which stands in it once, replaced."""

    def mutated(name: str) -> str:
        source = _script_text(name)
        if name != f"scheduler/{script}":
            return source
        assert source.count(text) == 1, f"{name} has {text!r} {source.count(text)} times: the mutant is out of date"
        return source.replace(text, replacement)

    return lambda: mock.patch.object(connection, "script_text", mutated)


async def _finish_in_two_calls(self: Queue, task: Task, *, dead: Sequence[DeadLetter] = ()) -> bool:
    removed = await _finish(self, task, dead=dead)
    if removed:
        record = Announcement(task.dataset, task.dataset_id, task.shard).to_json()
        await self._connection.command("XADD", f"{self._prefix}:announced", "*", "shard", record)
    return removed


def _finish_apart() -> AbstractContextManager[Any]:
    text = "redis.call('XADD', prefix .. ':announced', 'MAXLEN', '~', 100000, '*', 'shard', ARGV[3])\n"
    both = ExitStack()
    both.enter_context(script_mutant("finish", text, "")())
    both.enter_context(mock.patch.object(Queue, "finish", _finish_in_two_calls))
    return both


def _commit_later(self: Dataset, marker: Marker) -> Marker:
    """Markers are kept in memory until the next one."""
    late: list[Marker] = self.__dict__.setdefault("late", [])
    while late:
        _commit(self, late.pop())
    late.append(marker)
    return marker


def _publish_over_others(_store: LocalStore, temporary: Path, path: Path) -> None:
    temporary.replace(path)


async def _reconcile_nothing(*_arguments: Any, **_options: Any) -> int:
    return 0


def _patched(target: str, replacement: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch(target, replacement)


MUTANTS = [
    Mutant("extend without a fence", _BOTH, script_mutant("extend", "task[1] == ARGV[i + 1] and ", "")),
    Mutant(
        "hand back without a fence",
        _BOTH,
        script_mutant("give_back", "redis.call('HGET', key, 'epoch') ~= epoch or ", ""),
    ),
    Mutant("finish leaves the lease", _BOTH, script_mutant("finish", "  redis.call('ZREM', leased, id)\n", "")),
    Mutant("lease without reclaim", _BOTH, script_mutant("lease", "\nback(leased)\n", "\n")),
    Mutant(
        "reclaim that looks at one lease, and that the newest",
        _CONTRACT,
        script_mutant(
            "lease",
            "ipairs(redis.call('ZRANGEBYSCORE', from, '-inf', now_ms, 'LIMIT', 0, 100)) do\n",
            "ipairs(redis.call('ZRANGE', from, -1, -1)) do\n    if tonumber(redis.call('ZSCORE', from, id)) > now_ms then"
            " break end\n",
        ),
    ),
    Mutant(
        "an epoch that starts again when Redis was lost",
        _BOTH,
        script_mutant("lease", "math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))", "last + 1"),
    ),
    Mutant(
        "deliveries that progress does not reset",
        _BOTH,
        script_mutant("extend", "if ARGV[i + 2] == '1' then", "if false then"),
    ),
    Mutant(
        "enqueue that forgets that a task is known",
        _BOTH,
        script_mutant("enqueue", "if redis.call('EXISTS', task_key(id)) == 0 then", "if true then"),
    ),
    Mutant("finish and announce in two calls", _SIMULATION, _finish_apart),
    Mutant(
        "finish before the marker is durable",
        _SIMULATION,
        _patched("embedmill.dataset.dataset.Dataset.commit", _commit_later),
    ),
    Mutant(
        "objects that overwrite each other",
        _SIMULATION,
        _patched("embedmill.dataset.store.LocalStore._publish", _publish_over_others),
    ),
    Mutant(
        "a scheduler that rebuilds nothing", _SIMULATION, _patched("scheduler.service.reconcile", _reconcile_nothing)
    ),
]


def mutants_for(layer: Layer) -> list[Mutant]:
    return [mutant for mutant in MUTANTS if layer in mutant.caught_by]
