"""The producer when things around it go wrong: used too early or too late, cancelled, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import ConfigurationError, EmbedmillError, InputRejected
from embedmill.inbox import Receipt, receipts_key
from embedmill.producer import Producer
from tests.producers import STREAM, confirm, has, messages, producer_on, until


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    connection = Connection(FAKE_URL)
    yield connection
    await connection.aclose()


async def use(producer: Producer, way: str) -> None:
    if way == "add":
        await producer.add("a", "t")
    elif way == "delete":
        await producer.delete("a")
    elif way == "add_batch":
        await producer.add_batch([{"id": "a", "text": "t"}], key="k")
    elif way == "flush":
        await producer.flush()
    else:
        async with producer:
            pass


ways = pytest.mark.parametrize("way", ["add", "delete", "add_batch", "flush"])


@ways
async def test_before_it_is_entered_it_says_how_to(connection: Connection, way: str) -> None:
    with pytest.raises(ConfigurationError, match="async with Producer"):
        await use(producer_on(connection), way)


@pytest.mark.parametrize("way", ["add", "delete", "add_batch", "flush", "enter"])
async def test_once_it_is_closed_it_says_so_and_pushes_nothing(connection: Connection, way: str) -> None:
    async with producer_on(connection) as producer:
        pass
    with anyio.fail_after(5), pytest.raises(ConfigurationError, match="make another one"):
        await use(producer, way)
    assert await has(connection, 0)


@pytest.mark.parametrize("way", ["add", "add_batch", "flush"])
async def test_who_still_waits_for_it_when_it_is_closed_is_told(connection: Connection, way: str) -> None:
    told: list[str] = []

    async def wait(producer: Producer) -> None:
        with pytest.raises(ConfigurationError, match="closed"):
            await use(producer, way)
        told.append(way)

    async def leave_by_an_error() -> None:
        async with producer_on(connection, batch_documents=1, max_pending_bytes=1) as producer:
            await producer.add("a", "t")
            group.start_soon(wait, producer)
            await until(lambda: has(connection, 1))
            await anyio.wait_all_tasks_blocked()
            assert not told
            raise KeyError("mine")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            with pytest.raises(KeyError, match="mine"):
                await leave_by_an_error()
    assert told == [way]


@ways
def test_in_another_event_loop_it_says_that_each_needs_its_own(way: str) -> None:
    """As a program does that runs a coroutine with `asyncio.run` in a thread, beside the loop of the producer."""

    async def main() -> None:
        async with Producer(FAKE_URL, inbox="wiki", confirm=False) as producer:
            with pytest.raises(ConfigurationError, match="another event loop"):
                await asyncio.to_thread(lambda: asyncio.run(use(producer, way)))
            await producer.add("a", "t")

    asyncio.run(main())


def test_it_may_be_made_outside_of_any_event_loop() -> None:
    producer = Producer(FAKE_URL, inbox="wiki", confirm=False)
    asyncio.run(use(producer, "enter"))


async def test_an_add_that_is_cancelled_while_it_waits_has_added_nothing(connection: Connection) -> None:
    async with producer_on(connection, batch_documents=1) as producer:
        await producer.add("a", "old")
        with anyio.move_on_after(0.02) as scope:
            await producer.add("a", "new")
        assert scope.cancelled_caught
        with anyio.move_on_after(0.02) as scope:
            await producer.add_batch([{"id": "a", "text": "newer"}], key="k")
        assert scope.cancelled_caught
        await producer.add("b", "other")
        await until(lambda: has(connection, 2))
        await confirm(connection, admitted=1)
        await producer.flush()
        assert producer.pending_bytes == 0
    assert producer.receipts.batches == 2


async def test_cancelled_from_outside_it_ends_at_once_though_a_receipt_is_missing(connection: Connection) -> None:
    with anyio.fail_after(5):
        with anyio.move_on_after(0.05) as scope:
            async with producer_on(connection) as producer:
                await producer.add("a", "text")
        assert scope.cancelled_caught


async def test_what_on_receipt_raises_ends_it_and_is_raised_as_it_is(connection: Connection) -> None:
    def refuse(receipt: Receipt) -> None:
        raise KeyError(receipt.key)

    async def admit() -> None:
        await until(lambda: has(connection, 1))
        await confirm(connection)

    async def push() -> None:
        async with producer_on(connection, on_receipt=refuse) as producer:
            await producer.add_batch([{"id": "a", "text": "t"}], key="k1")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(admit)
            with pytest.raises(KeyError, match="k1"):
                await push()


async def test_a_batch_under_a_key_that_is_on_its_way_is_told_when_the_server_refuses_for_good(
    connection: Connection,
) -> None:
    await connection.command("SET", STREAM, "no stream")
    producer = producer_on(connection)
    with anyio.fail_after(5), suppress(ConfigurationError):
        async with producer:
            await producer.add_batch([{"id": "a", "text": "t"}], key="k")
            with pytest.raises(ConfigurationError, match="WRONGTYPE"):
                await producer.add_batch([{"id": "a", "text": "t"}], key="k")
            with pytest.raises(ConfigurationError, match="WRONGTYPE"):
                await producer.add("b", "t")


@pytest.mark.parametrize("leave", [KeyError, None])
async def test_without_a_server_it_waits_and_can_be_left_at_once(tmp_path: Path, leave: type[Exception] | None) -> None:
    began = anyio.current_time()
    with anyio.move_on_after(0.3) as scope:
        try:
            async with Producer(f"unix://{tmp_path}/nobody", inbox="wiki", batch_documents=1) as producer:
                await producer.add("a", "t")
                if leave is not None:
                    raise leave
        except KeyError:
            pass
    assert scope.cancelled_caught == (leave is None)
    assert anyio.current_time() - began < 2


async def test_receipts_are_read_once_and_their_stream_goes_with_the_producer(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0
    command = connection.command

    async def counting(*parts: str | int | float) -> object:
        nonlocal read
        reply = await command(*parts)
        read += len(reply) if parts[0] == "XRANGE" and ":receipts:" in str(parts[1]) else 0
        return reply

    async with producer_on(connection, batch_documents=1, resend_s=0.01) as producer:
        with monkeypatch.context() as patch:
            patch.setattr(connection, "command", counting)
            for number in range(20):
                await producer.add(f"d{number}", "t")
            await until(lambda: has(connection, 20))
            reply = (await messages(connection))[0]["reply"]
            await confirm(connection, admitted=1)
            await producer.flush()
            await anyio.sleep(0.1)
        assert read == 20
        assert await command("XLEN", receipts_key("default", reply)) == 0
    assert await command("EXISTS", receipts_key("default", reply)) == 0
    assert producer.receipts.admitted == 20


async def test_a_receipt_of_a_server_that_counts_anew_is_found(connection: Connection) -> None:
    async with producer_on(connection, batch_documents=1) as producer:
        await producer.add("a", "t")
        await until(lambda: has(connection, 1))
        reply = (await messages(connection))[0]["reply"]
        await confirm(connection, admitted=1)
        await producer.flush()
        await connection.command("FLUSHALL")
        await producer.add_batch([{"id": "b", "text": "t"}], key="k")
        receipt = Receipt("k", admitted=1).to_json()
        await connection.command("XADD", receipts_key("default", reply), "1-1", "receipt", receipt)
        with anyio.fail_after(5):
            await producer.flush()
    assert producer.receipts.admitted == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"job": "a/b"}, "job 'a/b'"),
        ({"lane": "fast"}, "neither live nor bulk"),
        ({"batch_bytes": 1024**3}, "the limit is"),
        ({"batch_documents": 0}, "at least 1"),
        ({"inbox": "wiki:keys"}, "inbox 'wiki:keys'"),
    ],
)
def test_options_that_no_message_could_have_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Producer(FAKE_URL, **{"inbox": "wiki", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("documents", "key", "reason"),
    [
        ([], "k", "no document"),
        (["text"], "k", "a mapping of its fields, not str"),
        ([{"text": "t"}], "k", "no id"),
        ([{"id": "a", "text": "t"}], 5, "must be a string"),
    ],
)
async def test_a_batch_that_is_none_is_refused_in_a_sentence(
    connection: Connection, documents: list[object], key: object, reason: str
) -> None:
    async with producer_on(connection) as producer:
        with pytest.raises(InputRejected, match=reason) as refused:
            await producer.add_batch(documents, key=key)  # type: ignore[arg-type]
        assert isinstance(refused.value, EmbedmillError)
    assert await has(connection, 0)
