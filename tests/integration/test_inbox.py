"""The inbox on a real server: whatever dies between push and receipt, every document is in the log once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import anyio
import pytest

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED
from embedmill.errors import StorageError
from embedmill.inbox import Receipt, inbox_key
from scheduler.queue import Queue
from tests.datasets import small_dataset
from tests.inbox_bench import (
    admission_of,
    admit_all,
    doc,
    is_empty,
    living,
    log_of,
    put,
    receipts,
    scheduler,
    until,
    waiting,
    work_off,
)
from tests.invariants import check_dataset

pytestmark = pytest.mark.server
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "wiki")


async def test_a_message_written_by_hand_is_admitted_queued_and_taken_away(
    dataset: Dataset, connection: Connection
) -> None:
    message = await put(connection, doc("a", "one", metadata={"k": 1}), doc("b", "two"))
    admission = await admit_all(dataset, connection)
    assert log_of(dataset) == [("a", 1, "one", False), ("b", 1, "two", False)]
    assert dataset.documents(0)[0].to_pylist()[0]["metadata"] == '{"k":1}'
    assert await waiting(connection) == 0
    assert (await Queue(connection).depth()).ready_bulk == 1
    (receipt,) = await receipts(connection)
    assert receipt == Receipt(receipt.key, admitted=2)
    assert re.fullmatch(rf"inbox/{message}/[0-9a-f]{{8}}", receipt.key)
    assert (admission.counts.messages, admission.counts.documents, admission.counts.shards) == (1, 2, 1)


async def test_the_shell_line_of_the_documentation_works_as_it_stands(dataset: Dataset, connection: Connection) -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("redis-cli XADD"))
    await connection.command(*shlex.split(line)[1:])
    await admit_all(dataset, connection)
    assert [(id_, version) for id_, version, _, _ in log_of(dataset)] == [("a", 1)]


async def test_what_comes_later_is_newer_also_in_one_message_and_deletes_are_rows_of_their_own(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, doc("a", "1"), doc("b", "1"), doc("a", "2"))
    await put(connection, doc("c", "1"), {"id": "a", "deleted": True}, {"id": "unknown", "deleted": True})
    await put(connection, doc("b", "1"), doc("c", "2"), {"id": "a", "deleted": True})
    await admit_all(dataset, connection)
    assert log_of(dataset) == [
        ("a", 1, "1", False),
        ("b", 1, "1", False),
        ("a", 2, "2", False),
        ("c", 1, "1", False),
        ("a", 3, "", True),
        ("c", 2, "2", False),
    ]
    found = [(r.admitted, r.updated, r.unchanged, r.deleted) for r in await receipts(connection)]
    assert found == [(2, 1, 0, 0), (1, 0, 1, 1), (0, 1, 2, 0)]
    await put(connection, doc("a", "back"))
    await admit_all(dataset, connection)
    assert living(dataset) == {"a": "back", "b": "1", "c": "2"}


async def test_a_deleted_document_is_done_as_deleted(dataset: Dataset, connection: Connection) -> None:
    await put(connection, doc("a", "1"), doc("b", "1"))
    await admit_all(dataset, connection)
    await put(connection, {"id": "a", "deleted": True})
    await admit_all(dataset, connection)
    await work_off(dataset, Queue(connection))
    check_dataset(dataset.url)
    statuses = [marker.statuses.tolist() for shard in (0, 1) if (marker := dataset.marker(shard))]
    assert statuses == [[EMBEDDED, EMBEDDED], [DELETED]]


@pytest.mark.parametrize("step", ["scheduler.after_documents", "scheduler.before_admit", "scheduler.after_admit"])
async def test_a_scheduler_that_dies_between_two_steps_loses_and_doubles_nothing(
    dataset: Dataset, connection: Connection, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    for number in range(5):
        await put(connection, *(doc(f"{number}-{n}", f"text {n}") for n in range(3)))
    failpoints.arm(f"{step}=raise@1")
    with pytest.raises(RuntimeError, match="failpoint"):
        await admit_all(dataset, connection)
    await admit_all(dataset, connection)
    expected = {f"{number}-{n}" for number in range(5) for n in range(3)}
    assert sorted(id_ for id_, _, _, _ in log_of(dataset)) == sorted(expected)
    assert await waiting(connection) == 0
    assert (await Queue(connection).depth()).ready_bulk == len(dataset.admitted())
    got = await receipts(connection)
    assert len(got) == 5
    assert sum(r.admitted + r.repeated for r in got) == 15
    assert all(not r.updated and not r.unchanged for r in got)


async def test_a_message_that_straddles_two_shards_goes_on_inside_of_it(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, *(doc(f"i{n}", "text") for n in range(20)), key="mine")
    failpoints.arm("scheduler.after_documents=raise@2")
    with pytest.raises(RuntimeError, match="failpoint"):
        await admit_all(dataset, connection)
    assert dataset.admitted() == [0, 1]
    assert [(b.key, b.record, b.first_row) for s in (0, 1) for b in dataset.origin(s).batches] == [
        ("mine", 8, 0),
        ("mine", 16, 0),
    ]
    assert await waiting(connection) == 1
    await admit_all(dataset, connection)
    assert [id_ for id_, _, _, _ in log_of(dataset)] == [f"i{n}" for n in range(20)]
    assert [(r.admitted, r.repeated) for r in await receipts(connection)] == [(4, 16)]
    assert (await Queue(connection).depth()).ready_bulk == 3


async def test_what_changed_nothing_does_not_come_back_before_what_changed_it(
    dataset: Dataset, connection: Connection
) -> None:
    """A message without a row is in the log, too: read again, its text is older than what stands behind it."""
    await put(connection, doc("a", "1"))
    await admit_all(dataset, connection)
    await put(connection, doc("a", "1"))
    await put(connection, doc("a", "2"))
    failpoints.arm("scheduler.before_admit=raise@1")
    with pytest.raises(RuntimeError, match="failpoint"):
        await admit_all(dataset, connection)
    await admit_all(dataset, connection)
    assert log_of(dataset) == [("a", 1, "1", False), ("a", 2, "2", False)]


async def test_a_batch_pushed_again_under_its_key_is_repeated_and_not_admitted(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, doc("a", "1"), key="k1")
    await admit_all(dataset, connection)
    await put(connection, doc("a", "2"), key="k2")
    await put(connection, doc("a", "1"), key="k1")
    await admit_all(dataset, connection)
    await connection.command("FLUSHALL")
    for path in (Path(dataset.url) / "index").iterdir():
        path.unlink()
    await put(connection, doc("a", "1"), key="k1")
    await admit_all(dataset, connection)
    assert log_of(dataset) == [("a", 1, "1", False), ("a", 2, "2", False)]
    assert [(r.key, r.repeated) for r in await receipts(connection)] == [("k1", 1)]


async def test_one_key_twice_in_the_inbox_is_one_batch(dataset: Dataset, connection: Connection) -> None:
    await put(connection, doc("a", "1"), key="k")
    await put(connection, doc("a", "2"), key="other")
    await put(connection, doc("a", "1"), key="k")
    await admit_all(dataset, connection)
    assert log_of(dataset) == [("a", 1, "1", False), ("a", 2, "2", False)]
    assert [(r.admitted, r.updated, r.repeated) for r in await receipts(connection)] == [
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
    ]


async def test_two_schedulers_on_one_inbox_admit_every_document_once(dataset: Dataset, connection: Connection) -> None:
    async with scheduler(dataset, connection), scheduler(dataset, connection):
        for number in range(60):
            await put(connection, *(doc(f"{number}-{n}", f"text {n}") for n in range(3)))
        await until(lambda: is_empty(connection))
    ids = [id_ for id_, _, _, _ in log_of(dataset)]
    assert sorted(ids) == sorted(f"{number}-{n}" for number in range(60) for n in range(3))
    assert (await Queue(connection).depth()).ready_bulk == len(dataset.admitted())
    got = await receipts(connection)
    assert len(got) == 60
    assert sum(r.admitted + r.repeated for r in got) == 180


GARBAGE = {
    "no version": {"documents": '{"id":"a","text":"t"}'},
    "version 2": {"v": "2", "documents": '{"id":"a","text":"t"}'},
    "no documents": {"v": "1"},
    "empty": {"v": "1", "documents": " \n"},
    "job": {"v": "1", "documents": '{"id":"a","text":"t"}', "job": "../x"},
    "key": {"v": "1", "documents": '{"id":"a","text":"t"}', "key": "inbox/1-0/x"},
    "lane": {"v": "1", "documents": '{"id":"a","text":"t"}', "lane": "fast"},
}
UNUSABLE = {
    "job that leads out of the dataset": ("job", "../../evil"),
    "job in a folder": ("job", "a/b"),
    "job that is too long for a file": ("job", "j" * 5000),
    "job with a NUL": ("job", "a\0b"),
    "job that is no UTF-8": ("job", b"\xff"),
    "key that is no UTF-8": ("key", b"\xff\xfe"),
    "key that is too long": ("key", "k" * 10_000),
}
LINES = [
    ("not json", "not valid JSON"),
    ("[1]", "not a JSON object"),
    ('{"text":"t"}', "no id"),
    ('{"id":"x"}', "no text"),
    ('{"id":"x","text":7}', "must be a string"),
    ('{"id":"x","text":" "}', "empty"),
    ('{"id":"' + "x" * 600 + '","text":"t"}', "longer than 512"),
    ('{"id":"x","text":"t","metadata":[]}', "must be an object"),
    ('{"id":"x","text":"t","metadata":{"n":NaN}}', "JSON cannot hold"),
    ('{"id":"x","text":"\\ud800"}', "surrogate"),
    ('{"id":"x","text":"t","title":"?"}', "unknown field 'title'"),
    ('{"id":"x","deleted":1}', "true or false"),
    ('{"id":"x","text":"\udcff"}', "UTF-8"),
]


async def test_garbage_is_refused_with_its_reason_kept_and_stops_nothing(
    dataset: Dataset, connection: Connection
) -> None:
    stream = inbox_key("default", "wiki")
    for fields in GARBAGE.values():
        await connection.command("XADD", stream, "*", *[part for pair in fields.items() for part in pair])
    lines = [line for line, _ in LINES]
    await put(connection, doc("good", "text"), *lines, doc("good2", "text"))
    await put(connection, doc("c", "text"))
    await admit_all(dataset, connection)
    assert living(dataset) == {"good": "text", "good2": "text", "c": "text"}
    assert await waiting(connection) == 0
    first, _ = await receipts(connection)
    assert first.admitted == 2
    assert len(first.rejected) == len(LINES)
    for (line, reason), (_, said) in zip(LINES, first.rejected, strict=True):
        assert reason in said, line
    refused = await connection.command("XRANGE", f"{stream}:refused", "-", "+")
    assert len(refused) == len(GARBAGE) + 1
    assert refused[-1][1]["documents"].split("\n") == lines
    assert all(fields["refused_reason"] for _, fields in refused)
    listed = (Path(dataset.url) / "rejects" / "inbox-wiki.jsonl").read_text().splitlines()
    assert len(listed) == len(GARBAGE) + len(LINES)


@pytest.mark.parametrize(("field", "value"), UNUSABLE.values(), ids=UNUSABLE.keys())
async def test_a_message_with_an_unusable_name_writes_nothing_elsewhere_and_stops_nothing(
    dataset: Dataset, connection: Connection, field: str, value: Any
) -> None:
    stream = inbox_key("default", "wiki")
    before = set(Path(dataset.url).parent.iterdir())
    fields = ["v", "1", field, value, "reply", "me", "documents", '{"id":"a","text":"t"}']
    await connection.command("XADD", stream, "*", *fields)
    await put(connection, doc("b", "text"))
    await admit_all(dataset, connection)
    assert living(dataset) == {"b": "text"}
    assert await waiting(connection) == 0
    assert [(r.admitted, len(r.rejected)) for r in await receipts(connection)] == [(0, 1), (1, 0)]
    assert set(Path(dataset.url).parent.iterdir()) == before
    assert {path.name for path in (Path(dataset.url) / "jobs").rglob("*")} == {"main.json"}


async def test_a_full_disk_leaves_the_messages_where_they_are(
    dataset: Dataset, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StorageError("no space; free some")

    await put(connection, doc("a", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "append_passages", refuse)
        with pytest.raises(StorageError):
            await admit_all(dataset, connection)
    assert await waiting(connection) == 1
    await admit_all(dataset, connection)
    assert living(dataset) == {"a": "1"}


async def test_a_stopped_scheduler_drops_its_open_shard_and_the_next_one_admits_it(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, doc("a", "1"))
    stopping = anyio.Event()
    admission = admission_of(dataset, connection, linger_s=60)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(admission.run, stopping)
            await anyio.sleep(0.2)
            stopping.set()
    assert dataset.admitted() == []
    assert await waiting(connection) == 1
    await admit_all(dataset, connection)
    assert living(dataset) == {"a": "1"}
