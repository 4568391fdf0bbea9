"""What admission promises of a message in the inbox, as scenarios; see queue_scenarios.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from embedmill import failpoints
from embedmill.dataset.dataset import Dataset
from embedmill.embedder import EmbedderSpec
from embedmill.inbox import Receipt, inbox_key, receipts_key
from scheduler.inbox import InboxAdmission
from tests.contract.queue_bench import NAMESPACE, Bench
from tests.contract.queue_scenarios import Scenario
from tests.datasets import small_dataset

_INBOX = "wiki"
_STREAM = inbox_key(NAMESPACE, _INBOX)
_LATE = EmbedderSpec("null/3", 3, revision="1", options={"late_chunking": True})


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


async def a_document_whose_messages_are_lost_and_sent_again_is_admitted_whole(bench: Bench) -> None:
    """Late chunking: Redis loses its data while a scheduler holds the first two messages of three."""
    with _new_dataset(_LATE) as dataset:
        messages = [_passage("X", number, last=number == 2) for number in range(3)]

        async def lose_and_send_again() -> None:
            await bench.connection.command("FLUSHALL")
            for number, passage in enumerate(messages):
                await _put(bench, passage, key=f"p-{number}", reply="me")

        for number, passage in enumerate(messages[:2]):
            await _put(bench, passage, key=f"p-{number}", reply="me")
        await _admit_with(bench, dataset, lose_and_send_again)
        assert _rows(dataset) == [("X#0", 1, "0"), ("X#1", 1, "1"), ("X#2", 1, "2")]
    assert await bench.connection.command("XLEN", _STREAM) == 0
    receipts = await _receipts(bench)
    assert [(receipt.admitted, receipt.repeated, receipt.rejected) for receipt in receipts] == [
        (0, 1, ()), (0, 1, ()), (1, 0, ()),
    ]  # fmt: skip


async def documents_of_many_jobs_are_gathered_side_by_side(bench: Bench) -> None:
    """Late chunking: each job has a document over two messages, and all of the first ones come before the second ones."""
    jobs = [f"job-{number}" for number in range(8)]
    with _new_dataset(_LATE) as dataset:
        for part in range(2):
            for job in jobs:
                await _put(bench, _passage(job, part, last=part == 1), job=job, key=f"{job}/{part}", reply="me")
        await _admit(bench, dataset)
        rows = _rows(dataset)
        assert sorted(rows) == [(f"{job}#{part}", 1, f"{part}") for job in jobs for part in range(2)]
    assert await bench.connection.command("XLEN", _STREAM) == 0
    receipts = await _receipts(bench)
    assert len(receipts) == 16
    assert all(receipt.admitted == 1 for receipt in receipts)


async def documents_whose_last_passage_never_comes_are_refused_where_they_take_too_much_room(bench: Bench) -> None:
    """Late chunking: there is room for three letters, and all producers died inside of a document but that of job 0."""
    sent = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (4, 0), (0, 2)]
    with _new_dataset(_LATE) as dataset:
        for job, part in sent:
            passage = _passage(f"job-{job}", part, last=part == 2)
            await _put(bench, passage, job=f"job-{job}", key=f"{job}/{part}", reply="me")
        with mock.patch("scheduler.inbox._OPEN_BYTES", 3):
            await _admit(bench, dataset)
        assert _rows(dataset) == [(f"job-0#{part}", 1, f"{part}") for part in range(3)]
    receipts = await _receipts(bench)
    refused = {receipt.key: receipt.rejected for receipt in receipts if receipt.rejected}
    assert list(refused) == ["1/0", "2/0", "3/0"]
    assert "did not come while there was room to wait for them" in refused["1/0"][0][1]
    # The newest is still waited for.
    assert await bench.connection.command("XLEN", _STREAM) == 1


SCENARIOS: list[Scenario] = [
    a_message_stays_until_its_shard_is_queued,
    a_message_that_is_read_again_adds_nothing,
    a_document_whose_messages_are_lost_and_sent_again_is_admitted_whole,
    documents_of_many_jobs_are_gathered_side_by_side,
    documents_whose_last_passage_never_comes_are_refused_where_they_take_too_much_room,
]


@contextmanager
def _new_dataset(embedder: EmbedderSpec | None = None) -> Iterator[Dataset]:
    with tempfile.TemporaryDirectory(prefix="inbox-") as folder:
        yield small_dataset(Path(folder) / "d", embedder=embedder)


def _passage(group: str, number: int, *, last: bool) -> dict[str, Any]:
    return {"id": f"{group}#{number}", "text": f"{number}", "group": group, "last": last}


async def _put(bench: Bench, *documents: dict[str, Any], **fields: str) -> None:
    lines = "\n".join(map(json.dumps, documents))
    more = [part for field in fields.items() for part in field]
    await bench.connection.command("XADD", _STREAM, "*", "v", "1", "documents", lines, *more)


async def _receipts(bench: Bench) -> list[Receipt]:
    entries = await bench.connection.command("XRANGE", receipts_key(NAMESPACE, "me"), "-", "+")
    return [Receipt.from_json(fields["receipt"]) for _, fields in entries]


async def _admit(bench: Bench, dataset: Dataset) -> None:
    """One scheduler's life."""
    again = Dataset.open(dataset.url)
    admission = InboxAdmission(again, bench.queue, bench.connection, name=_INBOX, namespace=NAMESPACE)
    with closing(again.open_index()) as index:
        await admission.admit_waiting(index)


async def _admit_with(bench: Bench, dataset: Dataset, happens: Callable[[], Awaitable[None]]) -> None:
    """The same, and something happens when it has read all that waits, before it closes its shard."""
    execute, happened = bench.connection.script, False

    async def reading(name: str, *arguments: Any, **options: Any) -> Any:
        nonlocal happened
        reply = await execute(name, *arguments, **options)
        if name == "scheduler/read" and not reply and not happened:
            happened = True
            await happens()
            return await execute(name, *arguments, **options)
        return reply

    with mock.patch.object(bench.connection, "script", reading):
        await _admit(bench, dataset)
    assert happened


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
