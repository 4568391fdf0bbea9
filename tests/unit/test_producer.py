"""The producer on an in-process server: batches, bounds, receipts, and what it does when they do not come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import embedmill
from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import ConfigurationError, InputRejected
from embedmill.inbox import Receipt
from embedmill.producer import Producer
from tests.producers import STREAM, confirm, documents, has, messages, producer_on, until


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    connection = Connection(FAKE_URL)
    yield connection
    await connection.aclose()


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


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda producer: producer.delete("D"), {"id": "D", "deleted": True}),
        (lambda producer: producer.add("D", "whole"), {"id": "D", "text": "whole"}),
        (lambda producer: producer.add("D#0", "new", group="D"), {"id": "D#0", "text": "new", "group": "D"}),
        (
            lambda producer: producer.add_batch([{"id": "D", "deleted": True}, {"id": "x", "text": "t"}], key="k"),
            {"id": "D", "deleted": True},
        ),
    ],
)
async def test_a_document_waits_for_the_receipts_of_all_batches_that_have_passages_of_it(
    connection: Connection, change: Callable[[Producer], Awaitable[None]], line: dict[str, Any]
) -> None:
    """Also when the later of these batches is confirmed first: the earlier one may be lost, and pushed again."""
    async with anyio.create_task_group() as group, producer_on(connection, batch_documents=1) as producer:
        with anyio.fail_after(5):
            await producer.add("D#0", "old 0", group="D", last=False)
            await producer.add("D#1", "old 1", group="D")
        await until(lambda: has(connection, 2))
        await confirm(connection, which=slice(1, 2))
        await until(lambda: batches_done(producer, 1))
        group.start_soon(change, producer)
        await anyio.wait_all_tasks_blocked()
        await anyio.sleep(0.05)
        assert [documents(message)[0]["text"] for message in await messages(connection)] == ["old 0"]
        await confirm(connection)
        await until(lambda: has(connection, 1))
        assert documents((await messages(connection))[0])[0] == line
        await confirm(connection)


async def batches_done(producer: Producer, count: int) -> bool:
    return producer.receipts.batches == count


async def test_batches_that_go_on_with_a_document_do_not_wait_for_its_receipts(connection: Connection) -> None:
    def part(*numbers: int, last: bool = False) -> list[dict[str, Any]]:
        return [{"id": f"D#{n}", "text": f"{n}", "group": "D", "last": last} for n in numbers]

    with anyio.fail_after(5):
        async with producer_on(connection, batch_documents=1) as producer:
            await producer.add_batch(part(0, 1), key="k1")
            await producer.add_batch(part(2, 3), key="k2")
            await producer.add("D#4", "4", group="D", last=False)
            await producer.add("D#5", "5", group="D")
            await until(lambda: has(connection, 4))
            await confirm(connection)


@pytest.mark.parametrize(
    ("go_on", "messages_pushed"),
    [
        (lambda producer, text: producer.add("D#4", text, group="D"), 3),
        (lambda producer, text: producer.add_batch([{"id": "D#4", "text": text, "group": "D"}], key="k"), 4),
    ],
)
async def test_a_document_that_cannot_be_kept_in_memory_whole_is_refused_where_it_becomes_too_large(
    connection: Connection, go_on: Callable[[Producer, str], Awaitable[None]], messages_pushed: int
) -> None:
    """With late chunking it has no receipt before its last passage: waiting for room would be for ever."""
    with anyio.fail_after(5):
        async with producer_on(connection, batch_documents=2, max_pending_bytes=1000) as producer:
            await producer.add("before", "x" * 100)
            for number in range(4):
                await producer.add(f"D#{number}", "x" * 150, group="D", last=False)
            with pytest.raises(InputRejected, match=r"'D#4' cannot be pushed: .* 'D' .* max_pending_bytes, 1,000"):
                await go_on(producer, "x" * 150)
            # What comes next has no room, and is what ends the waiting.
            await producer.add("E", "x" * 500)
            async with anyio.create_task_group() as group:
                group.start_soon(producer.flush)
                await until(lambda: has(connection, messages_pushed))
                await confirm(connection)


async def test_another_document_waits_for_room_behind_one_that_was_interrupted(connection: Connection) -> None:
    with anyio.fail_after(5):
        async with producer_on(connection, batch_documents=1, max_pending_bytes=1000) as producer:
            for number in range(4):
                await producer.add(f"D#{number}", "x" * 150, group="D", last=False)
            await producer.add("E", "x" * 500)
            async with anyio.create_task_group() as group:
                group.start_soon(producer.add, "F", "x" * 500)
                await until(lambda: has(connection, 5))
                await anyio.wait_all_tasks_blocked()
                assert await has(connection, 5)
                await confirm(connection)
                await until(lambda: has(connection, 1))
                await confirm(connection)


@pytest.mark.parametrize(
    ("added", "refused", "expected"),
    [
        ([], 1, 0),
        ([(0, False)], 2, 1),
        ([(0, False), (1, False)], 1, 2),
        ([(0, False), (1, True)], 2, 0),
    ],
)
async def test_passages_are_added_in_their_order_and_the_refusal_names_the_next_one(
    connection: Connection, added: list[tuple[int, bool]], refused: int, expected: int
) -> None:
    async with producer_on(connection, confirm=False) as producer:
        for number, last in added:
            await producer.add(f"D#{number}", "t", group="D", last=last)
            await producer.add("E#0", "t", group="E")
        with pytest.raises(InputRejected, match=f"'D#{refused}' cannot be pushed: .* next one is D#{expected}$"):
            await producer.add(f"D#{refused}", "t", group="D")
        await producer.add(f"D#{expected}", "t", group="D")
        await producer.add("D#0", "begun anew", group="D")


async def test_a_passage_with_an_id_of_its_own_is_refused_before_a_border_between_batches_can_lose_it(
    connection: Connection,
) -> None:
    async with producer_on(connection, confirm=False, batch_documents=2) as producer:
        for id_ in "abc":
            with pytest.raises(InputRejected, match="GROUP#0"):
                await producer.add(id_, "text", group="D", last=id_ == "c")
    assert await has(connection, 0)


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
