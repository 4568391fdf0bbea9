"""Many requests of one process on one budget: asked for and settled in slices, and none of them lost."""

import anyio
import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import Overloaded, RequestTooLarge
from scheduler.budget import Budget
from scheduler.slices import Line, Often


class CountedConnection(Connection):
    """Counts calls by script; the next one waits for `held`, or fails with `trouble`."""

    def __init__(self):
        super().__init__(FAKE_URL)
        self.calls = []
        self.held = None
        self.trouble = None

    async def script(self, name, keys, args=()):
        self.calls.append(name)
        if self.held is not None:
            await self.held.wait()
        if self.trouble is not None:
            raise self.trouble
        return await super().script(name, keys, args)


@pytest.fixture
async def connection():
    connection = CountedConnection()
    yield connection
    await connection.aclose()


def budget_on(connection, **limits):
    return Budget(connection, namespace="t", key_id="k", **limits)


async def left_over(connection, budget):
    """Permits and grants that nobody gave back, and the requests that count in the window."""
    window = await connection.command("HVALS", budget._keys[3])
    held, granted = (
        await connection.command("ZCARD", budget._keys[1]),
        await connection.command("HLEN", budget._keys[2]),
    )
    return int(held), int(granted), sum(int(value.split()[0]) for value in window)


async def send(budget, tokens=10, *, for_s=0.01):
    async with budget.reserve(tokens) as grant:
        await anyio.sleep(for_s)
        grant.settle(tokens)


async def test_those_who_come_while_a_call_is_under_way_share_the_next(connection):
    budget, connection.held = budget_on(connection, rpm=10**6), anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(41):
            group.start_soon(send, budget)
        await anyio.wait_all_tasks_blocked()
        assert connection.calls == ["scheduler/reserve"]
        connection.held.set()
    assert connection.calls.count("scheduler/reserve") == 1
    assert await left_over(connection, budget) == (0, 0, 41)


async def test_a_slice_ends_where_the_first_has_to_wait_and_those_behind_it_keep_their_order(connection):
    budget, order = budget_on(connection, concurrency=3), []

    async def numbered(number):
        async with budget.reserve(1) as grant:
            order.append(number)
            await anyio.sleep(0.01)
            grant.settle(1)

    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(numbered, number)
    assert order == list(range(12))
    assert await left_over(connection, budget) == (0, 0, 12)


async def test_one_that_can_never_be_sent_does_not_hold_up_the_others(connection):
    budget, refused = budget_on(connection, tpm=1_000), []

    async def too_large():
        try:
            await send(budget, 2_000)
        except RequestTooLarge:
            refused.append(True)

    async with anyio.create_task_group() as group:
        group.start_soon(send, budget)
        group.start_soon(too_large)
        group.start_soon(send, budget)
    assert refused == [True]
    assert await left_over(connection, budget) == (0, 0, 2)


@pytest.mark.parametrize("cancelled", [0, 1, 4], ids=["who asks", "one behind it", "the last"])
async def test_cancelled_while_the_slice_is_asked_for_nothing_is_charged_and_the_others_go_on(connection, cancelled):
    budget, connection.held = budget_on(connection, rpm=10**6, concurrency=10), anyio.Event()
    scopes = []

    async def cancellable():
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await send(budget)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(cancellable)
        await anyio.wait_all_tasks_blocked()
        scopes[cancelled].cancel()
        await anyio.wait_all_tasks_blocked()
        connection.held.set()
    assert [scope.cancelled_caught for scope in scopes].count(True) == 1
    assert await left_over(connection, budget) == (0, 0, 4)


async def test_without_redis_all_who_wait_are_told_at_once(connection):
    budget, told = budget_on(connection, rpm=10**6), []
    connection.trouble = Overloaded("gone")

    async def try_to_send():
        try:
            await send(budget)
        except Overloaded:
            told.append(True)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(try_to_send)
    assert len(told) == 20
    assert connection.calls.count("scheduler/reserve") == 1
    connection.trouble = None
    await send(budget)


async def test_live_does_not_stand_behind_bulk(connection):
    budget, order = budget_on(connection, concurrency=2), []
    await connection.command("SET", "x", "1")

    async def numbered(lane):
        async with budget.reserve(1, lane=lane) as grant:
            order.append(lane)
            await anyio.sleep(0.05)
            grant.settle(1)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(numbered, "bulk")
        await anyio.sleep(0.02)
        group.start_soon(numbered, "live")
    assert order.index("live") <= 4


async def test_at_hundreds_of_requests_a_second_there_is_less_than_a_call_for_each(connection):
    budget = budget_on(connection, rpm=10**9)
    async with anyio.create_task_group() as group:

        async def slot():
            for _ in range(40):
                await send(budget, for_s=0.02)

        for _ in range(20):
            group.start_soon(slot)
    assert await left_over(connection, budget) == (0, 0, 800)
    assert len(connection.calls) < 800


async def test_what_happens_rarely_is_not_done_in_slices():
    often = Often()
    for _ in range(5):
        often.count()
    assert not often


async def test_a_line_that_is_left_empty_can_be_joined_again():
    served = []

    async def serve(members):
        served.append([member.item for member in members])
        for member in members:
            member.done = True

    line = Line(serve, ready=anyio.lowlevel.checkpoint)
    await line.join("a")
    await line.join("b")
    assert served == [["a"], ["b"]]
