"""Live and bulk on the budget of one key: what live waits, what bulk keeps, and what nobody loses when one is alone."""

import heapq
import random
from collections import deque
from itertools import pairwise

import pytest

from tests.budget_bench import Asker

TPM = 600_000


class Stream:
    """Requests of one lane: `slots` that send again and again, or one each `every_s`; from `begins_s` on."""

    def __init__(self, lane, *, tokens, slots=0, every_s=0.0, begins_s=0.0, latency_s=1.0):
        self.lane, self.tokens, self.slots, self.every_s = lane, tokens, slots, every_s
        self.begins_s, self.latency_s = begins_s, latency_s
        self.waiting, self.asking = deque(), False
        self.sent = []
        """(start, tokens, seconds waited) of each request."""

    def tokens_in(self, since_s, until_s):
        return sum(tokens for start, tokens, _ in self.sent if since_s <= start < until_s)

    def waits(self, since_s=0.0):
        return sorted(wait for start, _, wait in self.sent if start >= since_s)


class Traffic:
    """Streams on one budget. As in a process, only the first of a lane asks. Times are seconds from the beginning."""

    def __init__(self, clock, asker, seed=3):
        self.clock, self.asker, self.rng = clock, asker, random.Random(seed)
        self.began, self.events, self.number = clock.now_s, [], 0

    def push(self, at, what, stream, grant=None):
        self.number += 1
        heapq.heappush(self.events, (at, self.number, what, stream, grant))

    async def run(self, *streams, seconds):
        for stream in streams:
            for _ in range(stream.slots or 1):
                self.push(self.began + stream.begins_s + self.rng.uniform(0, 0.01), "come", stream)
        while self.events and (event := heapq.heappop(self.events))[0] < self.began + seconds:
            self.clock.now_s, _, what, stream, grant = event
            if what == "settle":
                await self.asker.settle(grant, grant.est_tokens)
            if what == "ask":
                stream.asking = False
            elif what == "come" or not stream.every_s:
                stream.waiting.append(self.clock.now_s)
                if stream.every_s:
                    self.push(self.clock.now_s + stream.every_s * self.rng.uniform(0.8, 1.2), "come", stream)
            if not stream.asking:
                await self.ask(stream)

    async def ask(self, stream):
        while stream.waiting:
            estimate = round(stream.tokens * self.rng.uniform(0.7, 1.3))
            status, wait_s, _, grant = await self.asker.reserve(estimate, lane=stream.lane)
            if status != 1:
                stream.asking = True
                self.push(self.clock.now_s + max(wait_s, 0.001), "ask", stream)
                return
            start = self.clock.now_s + wait_s
            stream.sent.append((start - self.began, estimate, start - stream.waiting.popleft()))
            self.push(start + stream.latency_s * self.rng.uniform(0.5, 1.5), "settle", stream, grant)


def percentile(waits, share):
    return waits[min(len(waits) - 1, int(len(waits) * share))]


async def test_bulk_alone_has_everything(clock, connection):
    asker, bulk = Asker(connection, tpm=TPM), Stream("bulk", tokens=5_000, slots=20)
    await Traffic(clock, asker).run(bulk, seconds=240)
    assert bulk.tokens_in(60, 240) >= 0.97 * 3 * TPM


async def test_live_that_comes_into_bulk_waits_a_few_seconds_once_and_then_hardly_at_all(clock, connection):
    bulk = Stream("bulk", tokens=5_000, slots=20)
    live = Stream("live", tokens=1_000, every_s=1.0, begins_s=90)
    await Traffic(clock, Asker(connection, tpm=TPM)).run(bulk, live, seconds=300)
    assert live.waits()[-1] <= 6
    settled = live.waits(since_s=100)
    assert len(settled) > 180
    assert percentile(settled, 0.99) <= 0.75
    assert live.tokens_in(100, 300) + bulk.tokens_in(100, 300) >= 0.8 * TPM * 200 / 60
    assert bulk.tokens_in(120, 300) <= 0.81 * TPM * 3


async def test_what_is_kept_for_live_goes_back_to_bulk_a_minute_after_the_last_live_request(clock, connection):
    bulk = Stream("bulk", tokens=5_000, slots=20)
    live = Stream("live", tokens=1_000, slots=1, latency_s=10**6)
    await Traffic(clock, Asker(connection, tpm=TPM)).run(bulk, live, seconds=240)
    assert len(live.sent) == 1
    assert bulk.tokens_in(5, 60) <= 0.82 * TPM * 55 / 60
    assert bulk.tokens_in(90, 240) >= 0.96 * TPM * 150 / 60


async def test_live_that_wants_everything_leaves_bulk_its_share(clock, connection):
    bulk = Stream("bulk", tokens=5_000, slots=20)
    live = Stream("live", tokens=2_000, slots=60, begins_s=60)
    await Traffic(clock, Asker(connection, tpm=TPM)).run(bulk, live, seconds=360)
    ours, theirs = bulk.tokens_in(90, 360), live.tokens_in(90, 360)
    assert ours + theirs >= 0.96 * TPM * 270 / 60
    assert 0.12 <= ours / (ours + theirs) <= 0.25
    starts = [start for start, _, _ in bulk.sent if start > 80]
    assert max(later - earlier for earlier, later in pairwise(starts)) < 12


async def test_live_and_bulk_by_requests_keep_their_shares_too(clock, connection):
    bulk = Stream("bulk", tokens=10, slots=20)
    live = Stream("live", tokens=10, every_s=0.5)
    await Traffic(clock, Asker(connection, rpm=600)).run(bulk, live, seconds=200)
    assert percentile(live.waits(since_s=10), 0.99) <= 0.6
    sent = sum(start >= 60 for start, _, _ in bulk.sent)
    assert 0.7 * 600 * 140 / 60 <= sent <= 0.81 * 600 * 140 / 60


@pytest.mark.parametrize(("permits", "kept"), [(2, 1), (10, 2), (50, 10)])
async def test_bulk_never_takes_the_permits_kept_for_live(clock, connection, permits, kept):
    asker = Asker(connection, concurrency=permits)
    _, _, _, live = await asker.reserve(lane="live")
    await asker.settle(live, 1)
    taken = 0
    while (await asker.reserve())[0] == 1:
        taken += 1
    assert taken == permits - kept
    assert [(await asker.reserve(lane="live"))[0] for _ in range(kept)] == [1] * kept
    clock.now_s += 61
    assert (await asker.reserve())[0] == 1


async def test_bulk_that_waits_for_a_permit_gets_one_of_those_that_live_gives_back(clock, connection):
    asker = Asker(connection, concurrency=2)
    held = [(await asker.reserve(lane="live"))[3] for _ in range(2)]
    assert (await asker.reserve())[0] == 0
    await asker.settle(held[0], 1)
    assert (await asker.reserve(lane="live"))[0] == 0
    assert (await asker.reserve())[0] == 1


async def test_a_permit_that_nobody_waits_for_is_lives(clock, connection):
    asker = Asker(connection, concurrency=2)
    assert (await asker.reserve(lane="live"))[0] == 1
    assert (await asker.reserve(lane="live"))[0] == 1


async def test_the_only_permit_goes_to_whoever_asks(clock, connection):
    asker = Asker(connection, concurrency=1)
    _, _, _, live = await asker.reserve(lane="live")
    await asker.settle(live, 1)
    assert (await asker.reserve())[0] == 1


async def test_what_dead_live_requests_held_is_not_counted_as_theirs(clock, connection):
    asker = Asker(connection, concurrency=4, holder_s=20)
    for _ in range(4):
        assert (await asker.reserve(lane="live"))[0] == 1
    clock.now_s += 25
    assert [(await asker.reserve())[0] for _ in range(4)] == [1, 1, 1, 0]
    assert float(await connection.command("HGET", asker.budget._keys[0], "live")) == 0


async def test_two_lanes_together_pass_no_limit(clock, connection):
    bulk = Stream("bulk", tokens=5_000, slots=20)
    bursts = [Stream("live", tokens=4_000, slots=10, begins_s=begins) for begins in (70, 71, 150)]
    await Traffic(clock, Asker(connection, tpm=TPM)).run(bulk, *bursts, seconds=300)
    sent = sorted((start, tokens) for stream in (bulk, *bursts) for start, tokens, _ in stream.sent)
    for first, (began, _) in enumerate(sent):
        assert sum(tokens for start, tokens in sent[first:] if start < began + 60) <= TPM
