"""Jobs and split documents in one inbox: one order over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import CANCELLED, Job, Marker
from scheduler.queue import Queue
from tests.datasets import small_dataset
from tests.inbox_bench import admit_all, doc, is_empty, living, log_of, passages, put, receipts, scheduler, until

pytestmark = pytest.mark.server


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "wiki")


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


async def test_a_delete_in_one_job_takes_the_passages_that_wait_in_another(
    dataset: Dataset, connection: Connection
) -> None:
    await put(connection, *passages("D", "p0", "p1"), job="a")
    await put(connection, {"id": "D", "deleted": True}, job="b")
    await put(connection, doc("E", "whole"), job="a")
    await put(connection, *passages("E", "e0", "e1"), job="b")
    await admit_all(dataset, connection)
    assert living(dataset) == {"E#0": "e0", "E#1": "e1"}


async def test_an_inbox_goes_into_one_dataset_and_a_second_one_is_refused(
    dataset: Dataset, tmp_path: Path, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    other = small_dataset(tmp_path / "other" / "wiki", dataset_id="d1")
    async with scheduler(dataset, connection):
        await until(lambda: _is_served(connection))
        async with scheduler(other, connection):
            await until(lambda: _said(caplog, f"another scheduler admits this inbox into {dataset.url}"))
            for number in range(20):
                await put(connection, doc(f"d{number}", "text"))
            await until(lambda: is_empty(connection))
    assert len(living(dataset)) == 20
    assert living(other) == {}
    [inbox] = await Queue(connection).inboxes()
    assert (inbox.name, inbox.messages, inbox.dataset, inbox.is_served) == ("wiki", 0, dataset.url, True)


async def _is_served(connection: Connection) -> bool:
    return any(inbox.is_served for inbox in await Queue(connection).inboxes())


async def _said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text
