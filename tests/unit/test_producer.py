"""The producer on an in-process server: batches, bounds, receipts, and what it does when they do not come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import embedmill
from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import ConfigurationError, InputRejected
from embedmill.inbox import Receipt, inbox_key, receipts_key
from embedmill.producer import Producer

STREAM = inbox_key("default", "wiki")


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    connection = Connection(FAKE_URL)
    yield connection
    await connection.aclose()


async def messages(connection: Connection) -> list[dict[str, str]]:
    return [fields for _, fields in await connection.command("XRANGE", STREAM, "-", "+")]


def documents(message: dict[str, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in message["documents"].split("\n")]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(10):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def has(connection: Connection, count: int) -> bool:
    return len(await messages(connection)) == count


async def confirm(connection: Connection, **counts: int) -> int:
    """What admission does, in short: take every message away and write its receipt."""
    entries = await connection.command("XRANGE", STREAM, "-", "+")
    for id_, fields in entries:
        receipt = Receipt(fields["key"], **counts).to_json()
        await connection.command("XADD", receipts_key("default", fields["reply"]), "*", "receipt", receipt)
        await connection.command("XDEL", STREAM, id_)
        await connection.command("HDEL", f"{STREAM}:keys", fields["key"])
    return len(entries)


def producer_on(connection: Connection, **options: Any) -> Producer:
    return Producer(connection, inbox="wiki", **{"linger_s": 60.0, **options})


def test_the_package_exports_it() -> None:
    assert embedmill.Producer is Producer


async def test_batches_go_off_by_number_by_bytes_and_after_the_linger(connection: Connection) -> None:
    async with producer_on(connection, confirm=False, batch_documents=2, batch_bytes=200, linger_s=0.02) as producer:
        for id_ in "abc":
            await producer.add(id_, "text", metadata={"n": 1})
        await until(lambda: has(connection, 2))
        await producer.add("d", "x" * 120)
        await producer.add("e", "x" * 120)
        await producer.delete("f")
    found = [[document["id"] for document in documents(message)] for message in await messages(connection)]
    assert found == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    first, *_, last = await messages(connection)
    assert documents(first)[0] == {"id": "a", "text": "text", "metadata": {"n": 1}}
    assert documents(last)[1] == {"id": "f", "deleted": True}
    assert (first["v"], first["job"], first["lane"]) == ("1", "main", "bulk")
    assert "reply" not in first


async def test_leaving_waits_for_the_receipts_and_adds_them_up(connection: Connection) -> None:
    heard: list[Receipt] = []
    async with anyio.create_task_group() as group:

        async def admit() -> None:
            await until(lambda: has(connection, 2))
            await confirm(connection, admitted=2)

        group.start_soon(admit)
        async with producer_on(connection, batch_documents=2, on_receipt=heard.append) as producer:
            for id_ in "abcd":
                await producer.add(id_, "text")
    assert (producer.receipts.batches, producer.receipts.admitted, producer.pending_bytes) == (2, 4, 0)
    assert len({receipt.key for receipt in heard}) == 2


async def test_a_full_inbox_is_waited_for_by_messages_and_by_bytes(connection: Connection) -> None:
    for options in ({"high_water": 2}, {"high_water_bytes": 150}):
        async with anyio.create_task_group() as group:
            most = 0

            async def drain() -> None:
                nonlocal most
                done = 0
                while done < 6:
                    most = max(most, len(await messages(connection)))
                    await anyio.sleep(0.05)
                    most = max(most, len(await messages(connection)))
                    done += await confirm(connection, admitted=1)

            group.start_soon(drain)
            async with producer_on(connection, batch_documents=1, **options) as producer:
                for number in range(6):
                    await producer.add(f"{options}-{number}", "x" * 20)
        assert 1 <= most <= 2
        assert producer.receipts.admitted == 6


async def test_adding_waits_while_too_much_is_kept_in_memory(connection: Connection) -> None:
    async with producer_on(connection, max_pending_bytes=500) as producer:
        added = 0

        async def add() -> None:
            nonlocal added
            for number in range(6):
                await producer.add(f"d{number}", "x" * 200)
                added += 1

        async with anyio.create_task_group() as group:
            group.start_soon(add)
            await until(lambda: has(connection, 1))
            await anyio.sleep(0.05)
            assert added == 2
            assert producer.pending_bytes <= 500
            while added < 6:
                await confirm(connection)
                await anyio.sleep(0.01)
        async with anyio.create_task_group() as group:
            group.start_soon(producer.flush)
            await until(lambda: has(connection, 1))
            await confirm(connection)


async def test_an_id_that_is_on_its_way_is_not_sent_again_before_its_receipt(connection: Connection) -> None:
    async with anyio.create_task_group() as group:
        producer = producer_on(connection, batch_documents=1)
        async with producer:
            await producer.add("a", "old")
            group.start_soon(producer.add, "a", "new")
            await until(lambda: has(connection, 1))
            await anyio.sleep(0.05)
            assert [documents(message)[0]["text"] for message in await messages(connection)] == ["old"]
            await confirm(connection)
            await until(lambda: has(connection, 1))
            assert [documents(message)[0]["text"] for message in await messages(connection)] == ["new"]
            await confirm(connection)


async def test_what_the_server_lost_is_pushed_again_under_the_same_key_and_what_waits_is_not(
    connection: Connection,
) -> None:
    async with producer_on(connection, batch_documents=1, resend_s=0.02) as producer:
        await producer.add("a", "text")
        await producer.add("b", "text")
        await until(lambda: has(connection, 2))
        keys = [message["key"] for message in await messages(connection)]
        await anyio.sleep(0.1)
        assert await has(connection, 2)
        await connection.command("FLUSHALL")
        await until(lambda: has(connection, 2))
        assert [message["key"] for message in await messages(connection)] == keys
        await confirm(connection, admitted=1)


async def test_a_reply_that_was_lost_does_not_double_the_message(connection: Connection) -> None:
    from embedmill import failpoints

    failpoints.arm("redis.embedmill/push.reply=lost@1")
    try:
        async with producer_on(connection, confirm=False) as producer:
            await producer.add("a", "text")
    finally:
        failpoints.arm("")
    assert await has(connection, 1)


async def test_a_key_of_ones_own_makes_one_batch_of_any_size(connection: Connection) -> None:
    async with producer_on(connection, confirm=False, batch_documents=2) as producer:
        await producer.add("z", "before")
        await producer.add_batch([{"id": n, "text": "t"} for n in range(5)], key="mine")
        await producer.add_batch([{"id": n, "text": "t"} for n in range(5)], key="mine")
    first, second = await messages(connection)
    assert [document["id"] for document in documents(first)] == ["z"]
    assert (second["key"], len(documents(second))) == ("mine", 5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((None, "t"), "no id"),
        (("", "t"), "the id is empty"),
        (("x" * 513, "t"), "longer than 512 bytes"),
        (("a", None), "no text"),
        (("a", b"bytes"), "must be a string, not bytes"),
        (("a", "\ud800"), "lone surrogate"),
        (("a", " "), "the text is empty"),
        (("a", "x" * (16 * 1024**2 + 1)), "the limit is"),
    ],
)
async def test_what_cannot_be_admitted_is_refused_where_it_is_added(
    connection: Connection, arguments: tuple[Any, Any], reason: str
) -> None:
    async with producer_on(connection) as producer:
        with pytest.raises(InputRejected, match=reason):
            await producer.add(*arguments)
        with pytest.raises(InputRejected, match="JSON cannot hold"):
            await producer.add("a", "t", metadata={"n": float("nan")})
        with pytest.raises(InputRejected, match="unknown field 'title'"):
            await producer.add_batch([{"id": "a", "text": "t", "title": "?"}], key="k")
        with pytest.raises(InputRejected, match="begins with"):
            await producer.add_batch([{"id": "a", "text": "t"}], key="inbox/1")
    assert await has(connection, 0)


async def test_an_error_in_the_body_is_raised_as_it_is_and_nothing_is_waited_for(connection: Connection) -> None:
    async def fail() -> None:
        async with producer_on(connection) as producer:
            await producer.add("a", "text")
            raise KeyError("mine")

    with anyio.fail_after(5), pytest.raises(KeyError, match="mine"):
        await fail()


async def test_a_server_that_refuses_for_good_is_told_to_the_caller(connection: Connection) -> None:
    await connection.command("SET", STREAM, "no stream")
    with anyio.fail_after(5), pytest.raises(ConfigurationError, match="WRONGTYPE"):
        async with producer_on(connection) as producer:
            await producer.add("a", "text")


async def test_a_name_that_no_inbox_has_is_refused(connection: Connection) -> None:
    with pytest.raises(ConfigurationError, match="letters, digits"):
        Producer(connection, inbox="wiki:keys")
