"""What admission promises of a message in the inbox, as scenarios; see queue_scenarios.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from embedmill import failpoints
from embedmill.dataset.dataset import Dataset
from embedmill.inbox import inbox_key
from scheduler.inbox import InboxAdmission
from tests.contract.queue_bench import NAMESPACE, Bench
from tests.contract.queue_scenarios import Scenario
from tests.datasets import small_dataset

_INBOX = "wiki"
_STREAM = inbox_key(NAMESPACE, _INBOX)


class _Died(BaseException):
    """The end of a scheduler, as SIGKILL: nothing handles it."""


async def a_message_stays_until_its_shard_is_queued(bench: Bench) -> None:
    """A scheduler that dies behind any of its scripts leaves the message where it is, or the shard in log and queue."""
    for step in count(1):
        await bench.connection.command("FLUSHALL")
        with _new_dataset() as dataset:
            await _put(bench, {"id": "a", "text": "one"}, {"id": "b", "text": "two"})
            died = await _admit_dying_behind(bench, dataset, script=step)
            if not await bench.connection.command("XLEN", _STREAM):
                assert _rows(dataset) == [("a", 1, "one"), ("b", 1, "two")]
                assert (await bench.queue.depth()).ready_bulk == 1
        if not died:
            assert step > 1
            return


async def a_message_that_is_read_again_adds_nothing(bench: Bench) -> None:
    with _new_dataset() as dataset:
        await _put(bench, {"id": "a", "text": "one"})
        await _put(bench, {"id": "a", "text": "two"})
        failpoints.arm("scheduler.before_admit=raise@1")
        try:
            await _admit(bench, dataset)
        except RuntimeError:
            pass
        else:
            raise AssertionError("the failpoint was not reached")
        finally:
            failpoints.arm("")
        await _admit(bench, dataset)
        assert _rows(dataset) == [("a", 1, "one"), ("a", 2, "two")]
    assert await bench.connection.command("XLEN", _STREAM) == 0
    assert (await bench.queue.depth()).ready_bulk == 1


SCENARIOS: list[Scenario] = [a_message_stays_until_its_shard_is_queued, a_message_that_is_read_again_adds_nothing]


@contextmanager
def _new_dataset() -> Iterator[Dataset]:
    with tempfile.TemporaryDirectory(prefix="inbox-") as folder:
        yield small_dataset(Path(folder) / "d")


async def _put(bench: Bench, *documents: dict[str, str]) -> None:
    lines = "\n".join(map(json.dumps, documents))
    await bench.connection.command("XADD", _STREAM, "*", "v", "1", "documents", lines)


async def _admit(bench: Bench, dataset: Dataset) -> None:
    """One scheduler's life."""
    again = Dataset.open(dataset.url)
    admission = InboxAdmission(again, bench.queue, bench.connection, name=_INBOX, namespace=NAMESPACE)
    with closing(again.open_index()) as index:
        await admission.admit_waiting(index)


async def _admit_dying_behind(bench: Bench, dataset: Dataset, *, script: int) -> bool:
    """The same, and it dies when so many scripts were executed; False when there were fewer."""
    execute, left = bench.connection.script, script

    async def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        reply = await execute(*arguments, **options)
        left -= 1
        if left == 0:
            raise _Died
        return reply

    with mock.patch.object(bench.connection, "script", dying):
        try:
            await _admit(bench, dataset)
        except _Died:
            return True
    return False


def _rows(dataset: Dataset) -> list[tuple[str, int, str]]:
    rows = [row for shard in dataset.admitted() for row in dataset.documents(shard)[0].to_pylist()]
    return [(row["id"], row["version"], row["text"]) for row in rows]
