"""A Producer and schedulers on one inbox: what is added is in the log, once, whatever Redis loses."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import anyio
import pyarrow.parquet as pq
import pytest

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.producer import Producer
from scheduler.queue import Queue
from scheduler.service import serve_dataset
from tests.datasets import small_dataset
from tests.inbox_bench import admit_all, has_messages, living, log_of, scheduler, until

pytestmark = pytest.mark.server


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "wiki")


async def test_a_document_whose_passages_redis_lost_is_gone_when_it_was_deleted_behind_them(
    dataset: Dataset, connection: Connection
) -> None:
    with anyio.fail_after(30):
        async with Producer(connection, inbox="wiki", linger_s=0.01, resend_s=0.1) as producer:
            await producer.add("D#0", "part 0", group="D", last=False)
            await producer.add("D#1", "part 1", group="D")
            await until(lambda: has_messages(connection, 1))
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
            await until(lambda: has_messages(connection, 5))
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
