"""Which key a request goes with, and what becomes of keys that are refused, join or leave."""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager

import anyio
import pytest

from embedmill.errors import ConfigurationError, InputRejected, InvalidKey, NoBalance, Overloaded, RateLimited
from scheduler import keyring
from scheduler.breaker import Breaker
from scheduler.budget import Grant, Unlimited
from scheduler.keyring import Key, KeyRing
from worker.attempts import RetryPolicy, embed_batch

from .test_attempts import ScriptedEmbedder

FAST = RetryPolicy(base_s=0.0001, cap_s=0.001, limited_cap_s=0.001)


class Paced(Unlimited):
    """`permits` at a time, for one key."""

    def __init__(self, secret, permits):
        self.key_ids = (f"id of {secret}",)
        self.permits = anyio.CapacityLimiter(permits)
        self.kept = 0

    @asynccontextmanager
    async def reserve(self, est_tokens, *, lane="bulk"):
        async with self.permits:
            yield Grant(est_tokens, outcome="unknown")

    async def keep_alive(self):
        self.kept += 1
        try:
            await anyio.sleep_forever()
        finally:
            self.kept -= 1


class Source:
    """Says what it is given, once."""

    def __init__(self):
        self.next = None

    async def changed(self):
        found, self.next = self.next, None
        if isinstance(found, Exception):
            raise found
        return found


class Ring:
    def __init__(self, connection, *secrets, permits=2, source=None):
        self.keys: dict[str, Key] = {}

        def open_key(secret):
            breaker = Breaker(connection, namespace="t", key_id=secret, api_base="http://x", look_every_s=1000)
            self.keys[secret] = Key(secret, Paced(secret, permits), breaker)
            return self.keys[secret]

        self.ring = KeyRing(secrets, open_key=open_key, source=source)


class Keyed(ScriptedEmbedder):
    """Answers by key: an error to raise, seconds to take, or nothing."""

    def __init__(self, **by_key):
        super().__init__()
        self.by_key = by_key
        self.sent = Counter()

    async def embed_with(self, key, texts, *, role="document"):
        self.sent[key] += 1
        answer = self.by_key.get(key)
        if isinstance(answer, Exception):
            raise answer
        await anyio.sleep(answer or 0)
        return await self.embed(texts, role=role)


async def send(ring, embedder, times, *, at_once=1):
    waiting = iter(range(times))

    async def work():
        for _ in waiting:
            await embed_batch(embedder, ["a"], budget=ring.ring, policy=FAST)

    if at_once == 1:
        await work()
        return
    async with anyio.create_task_group() as group:
        for _ in range(at_once):
            group.start_soon(work)


async def test_keys_are_used_side_by_side_and_a_slow_one_gets_less(connection):
    ring, embedder = Ring(connection, "a", "b"), Keyed()
    await send(ring, embedder, 200, at_once=8)
    assert min(embedder.sent.values()) > 60
    ring, embedder = Ring(connection, "quick", "slow"), Keyed(quick=0.002, slow=0.02)
    with anyio.fail_after(5):
        await send(ring, embedder, 220, at_once=8)
    assert embedder.sent["quick"] > 4 * embedder.sent["slow"] > 0


async def test_a_grant_says_its_key_and_never_shows_it(connection):
    ring = Ring(connection, "secret")
    async with ring.ring.reserve(1) as grant:
        assert (grant.secret, grant.key_id) == ("secret", "id of secret")
        assert "secret" not in repr(grant).replace("id of secret", "")


@pytest.mark.parametrize("refusal", [InvalidKey("401: no"), NoBalance("403: no")])
async def test_a_refused_key_is_taken_out_once_and_the_others_go_on(connection, caplog, refusal):
    ring, embedder = Ring(connection, "bad", "good"), Keyed(bad=refusal)
    await send(ring, embedder, 50, at_once=8)
    assert embedder.calls == 50
    assert 1 <= embedder.sent["bad"] <= 2
    assert caplog.text.count("key id of bad is not used any more (others left: 1)") == 1


async def test_the_last_keys_refusal_goes_up_each_time(connection):
    ring, embedder = Ring(connection, "a", "b"), Keyed(a=InvalidKey("a is bad"), b=InvalidKey("b is bad"))
    for _ in range(2):
        with pytest.raises(InvalidKey):
            await send(ring, embedder, 1)
    assert sum(embedder.sent.values()) == 3


async def test_a_key_without_balance_is_tried_again_after_a_while(connection, monkeypatch):
    monkeypatch.setattr(keyring, "_BALANCE_AGAIN_S", 0.05)
    ring, embedder = Ring(connection, "a", "b"), Keyed(a=NoBalance("no"))
    await send(ring, embedder, 4)
    assert embedder.sent == {"a": 1, "b": 4}
    del embedder.by_key["a"]
    await anyio.sleep(0.06)
    await send(ring, embedder, 4)
    assert embedder.sent["a"] > 1


async def test_who_waits_for_a_key_that_is_refused_or_limited_goes_with_another(connection):
    for error in (InvalidKey("no"), RateLimited("no", retry_after_s=60.0)):
        ring = Ring(connection, "a", "b", permits=1)
        got = []

        async def hold(ring=ring, got=got):
            async with ring.ring.reserve(1) as grant:
                got.append(grant.secret)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as group, ring.ring.reserve(1) as first:
                async with ring.ring.reserve(1) as second:
                    assert {first.secret, second.secret} == {"a", "b"}
                    for _ in range(4):
                        group.start_soon(hold)
                    await anyio.wait_all_tasks_blocked()
                    assert [len(key.waiting) for key in ring.keys.values()] == [2, 2]
                    second.error = error
                await anyio.wait_all_tasks_blocked()
                assert len(ring.keys[second.secret].waiting) == 0
                assert len(ring.keys[first.secret].waiting) == 4
        assert got == [first.secret] * 4


async def test_five_failures_in_a_row_close_a_key_for_all_but_a_probe(connection):
    ring, embedder = Ring(connection, "down", "up"), Keyed(down=Overloaded("503"))
    await send(ring, embedder, 60, at_once=4)
    assert ring.keys["down"].breaker.is_open
    assert 5 <= embedder.sent["down"] <= 8
    assert ring.ring.trouble == "", "the other key goes on"


async def test_a_refused_text_says_that_the_provider_is_well(connection):
    ring, embedder = Ring(connection, "a"), Keyed(a=InputRejected("422"))
    for _ in range(6):
        with pytest.raises(InputRejected):
            await send(ring, embedder, 1)
    assert not ring.keys["a"].breaker.is_open


async def test_keys_join_and_leave_while_requests_are_under_way(connection, monkeypatch, caplog):
    monkeypatch.setattr(keyring, "_LOOK_EVERY_S", 0.02)
    source = Source()
    ring = Ring(connection, "old", source=source)
    async with anyio.create_task_group() as group:
        group.start_soon(ring.ring.keep_alive)
        with anyio.fail_after(5):
            async with ring.ring.reserve(1) as grant:
                source.next = ("new", "newer")
                while len(ring.ring.key_ids) < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                await anyio.sleep(0.05)
                assert (grant.secret, ring.keys["old"].budget.kept) == ("old", 1), "kept until its request ends"
            while ring.keys["old"].budget.kept or not ring.keys["new"].budget.kept:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            embedder = Keyed()
            await send(ring, embedder, 10, at_once=4)
            source.next = ConfigurationError("the file is empty")
            while "the keys that we have go on: the file is empty" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert set(embedder.sent) == {"new", "newer"}
        assert ring.ring.key_ids == ("id of new", "id of newer")
        group.cancel_scope.cancel()
    assert "2 in use" in caplog.text


async def test_a_refusal_makes_look_for_new_keys_at_once(connection):
    source = Source()
    ring, embedder = Ring(connection, "old", source=source), Keyed(old=InvalidKey("revoked"))
    source.next = ("new",)
    await send(ring, embedder, 3)
    assert embedder.sent == {"old": 1, "new": 3}


async def test_cancelled_while_waiting_for_the_breaker_nothing_is_held(connection):
    ring = Ring(connection, "a")
    for _ in range(5):
        await ring.keys["a"].breaker.note("", "failed")
    with anyio.move_on_after(0.05) as scope:
        await send(ring, Keyed(), 1)
    assert scope.cancelled_caught
    assert not ring.keys["a"].waiting
    assert ring.keys["a"].budget.permits.borrowed_tokens == 0


async def _nothing(*_args: object, **_options: object) -> None:
    pass


@pytest.mark.parametrize(
    ("owner", "name", "fault", "scenario"),
    [
        (Key, "load", 0, test_keys_are_used_side_by_side_and_a_slow_one_gets_less),
        (KeyRing, "_redirect", lambda *_: None, test_who_waits_for_a_key_that_is_refused_or_limited_goes_with_another),
        (KeyRing, "_look", _nothing, test_a_refusal_makes_look_for_new_keys_at_once),
        (KeyRing, "_take_out", _nothing, test_the_last_keys_refusal_goes_up_each_time),
    ],
    ids=["the first key always", "who waits stays", "no look at a refusal", "no key is taken out"],
)
async def test_a_known_bad_ring_is_noticed(connection, monkeypatch, owner, name, fault, scenario):
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((AssertionError, TimeoutError, InvalidKey, ExceptionGroup)), anyio.fail_after(6):
        await scenario(connection)
