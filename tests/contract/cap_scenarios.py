"""What a job's cap promises, each promise as a scenario that known faults must fail."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Intent, Submissions
from embedmill.errors import BatchPending, CapReached
from scheduler.budget import Grant
from scheduler.caps import Hold, JobCap
from tests.contract.queue_bench import NAMESPACE, Bench
from tests.contract.queue_scenarios import Scenario
from tests.datasets import admit_texts, small_dataset
from worker.spend import LoggedCap, SpendLog

HUNDRED = "x" * 84
"""A text that counts a hundred tokens at most."""
_HOLD_S = 4.0
_WITHIN_S = 3.0


@dataclass
class CapBench:
    """The cap of one job, as several workers see it."""

    connection: Connection
    dataset: Dataset

    def worker(self, *, alone: bool = True) -> JobCap:
        return JobCap(
            self.connection, namespace=NAMESPACE, dataset=self.dataset, job="main", alone=alone, hold_s=_HOLD_S
        )

    def logged_worker(self, name: str = "w", *, alone: bool = True) -> LoggedCap:
        return LoggedCap(self.worker(alone=alone), SpendLog(self.dataset, worker=name, job="main"), shard=None)

    def set_cap(self, tokens: int) -> None:
        self.dataset.change_job("main", lambda job: replace(job, caps={"max_tokens": tokens}))

    @property
    def submissions(self) -> Submissions:
        return Submissions(self.dataset)

    def intend(self, most_tokens: int) -> Intent:
        """A batch that is about to be sent."""
        admit_texts(self.dataset, 0, ["a"])
        return self.submissions.intend(
            0, [0], number=1, model="m", tokens=10, key="k", api_base="", worker="w", before=[], most_tokens=most_tokens
        )

    async def account(self) -> tuple[int, int]:
        """Tokens spent and held."""
        spent, held = await self.connection.command("HMGET", self.key, "spent", "held")
        return int(spent), int(held)

    async def elapse(self, seconds: float) -> None:
        for op in await self.connection.command("ZRANGE", f"{self.key}:holders", 0, -1):
            await self.connection.command("ZINCRBY", f"{self.key}:holders", -seconds * 1000, op)

    @property
    def key(self) -> str:
        return self.worker()._keys[0]


@asynccontextmanager
async def cap_bench(bench: Bench, *, cap: int) -> AsyncIterator[CapBench]:
    with tempfile.TemporaryDirectory() as folder:
        made = CapBench(bench.connection, small_dataset(Path(folder) / "set"))
        made.set_cap(cap)
        with anyio.move_on_after(_WITHIN_S) as scope:
            try:
                yield made
            except (CapReached, BatchPending) as error:
                raise AssertionError("what fits was refused") from error
        assert not scope.cancelled_caught, "somebody waits for ever"


async def pay(cap: JobCap | LoggedCap, tokens: int, *, text: str = HUNDRED) -> None:
    """One request that is billed so much."""
    async with cap.reserve([text], est_tokens=25) as hold:
        hold.grant = Grant(25)
        hold.grant.settle(tokens)


async def is_refused(cap: JobCap | LoggedCap, *, text: str = HUNDRED) -> bool:
    try:
        async with cap.reserve([text], est_tokens=25):
            return False
    except CapReached:
        return True


async def is_put_off(cap: JobCap | LoggedCap, *, text: str = HUNDRED) -> bool:
    try:
        async with cap.reserve([text], est_tokens=25):
            return False
    except BatchPending:
        return True


async def waits(cap: JobCap | LoggedCap, *, text: str = HUNDRED) -> bool:
    """Neither given nor refused."""
    with anyio.move_on_after(0.1) as scope:
        async with cap.reserve([text], est_tokens=25):
            pass
    return scope.cancelled_caught


async def abandon(cap: JobCap) -> Hold:
    """A hold whose worker dies with its request under way."""
    hold = Hold(25, most_tokens=100)
    await cap._wait_for_room(hold)
    del cap._held[hold.op]
    return hold


async def workers_together_never_hold_more_than_the_cap_leaves(bench: Bench) -> None:
    async with cap_bench(bench, cap=250) as job, AsyncExitStack() as stack:
        for cap in (job.worker(), job.worker()):
            await stack.enter_async_context(cap.reserve([HUNDRED], est_tokens=25))
        assert await job.account() == (0, 200)
        assert await waits(job.worker())


async def what_others_give_back_is_there_at_once_and_what_never_fits_is_refused(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        ours, theirs = job.worker(), job.worker()
        async with ours.reserve([HUNDRED], est_tokens=25) as hold:
            assert await waits(theirs)
            assert await is_refused(theirs, text=HUNDRED * 2)
            hold.grant = Grant(25)
            hold.grant.settle(30)
        await pay(theirs, 30)
        assert await job.account() == (60, 0)
        assert await is_refused(theirs)
        await pay(theirs, 20, text="x" * 70)


async def a_request_is_charged_once_with_what_it_was_billed(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        cap = job.worker()
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            hold.grant = Grant(25)
            hold.grant.settle(40)
        for _ in range(2):
            await cap._settle(hold)
        assert await job.account() == (40, 0)
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            hold.grant = Grant(25, outcome="unknown")
        assert await job.account() == (72, 0)
        async with cap.reserve([HUNDRED], est_tokens=25):
            """Never sent."""
        assert await job.account() == (72, 0)


async def asking_again_for_one_request_holds_it_once(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        cap, hold = job.worker(), Hold(25, most_tokens=100)
        for _ in range(3):
            await cap._wait_for_room(hold)
        assert await job.account() == (0, 100)


async def a_dead_workers_hold_comes_back_but_for_what_it_may_have_cost(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        await abandon(job.worker())
        assert await waits(job.worker())
        await job.elapse(_HOLD_S + 1)
        assert not await is_refused(job.worker())
        assert await job.account() == (32, 0)


async def a_living_workers_hold_stays(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        cap = job.worker()
        async with cap.reserve([HUNDRED], est_tokens=25):
            await job.elapse(_HOLD_S - 1)
            await cap.keep()
            await job.elapse(_HOLD_S - 1)
            assert await waits(job.worker())


async def an_account_that_was_lost_is_read_from_the_spend_logs(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        cap = job.logged_worker()
        await pay(cap, 60)
        await bench.connection.command("FLUSHALL")
        assert await is_refused(job.worker())
        assert await job.account() == (60, 0)


async def an_account_that_was_lost_learns_what_living_workers_hold(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        # Something was paid for lately, so somebody may be at work.
        await pay(job.logged_worker(), 1)
        cap = job.logged_worker("v")
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            await bench.connection.command("FLUSHALL")
            assert await waits(job.worker(alone=False))
            await cap._cap.keep()  # type: ignore[attr-defined]
            assert await job.account() == (1, 100)
            hold.grant = Grant(25)
            hold.grant.settle(40)
        assert await job.account() == (41, 0)


async def what_was_under_way_when_the_account_was_lost_is_charged_once(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        cap = job.worker()
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            await bench.connection.command("FLUSHALL")
            await pay(job.worker(), 10)
            hold.grant = Grant(25)
            hold.grant.settle(40)
        await cap._settle(hold)
        assert await job.account() == (50, 0)


async def what_ends_while_the_logs_are_read_is_charged(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        cap, reader = job.worker(), Hold(25, most_tokens=100)
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            await bench.connection.command("FLUSHALL")
            ask = [reader.op, 100, 25, 1000, _HOLD_S * 1000, 0, 0, "", 0]
            reply = await bench.connection.script("scheduler/cap_reserve", cap._keys, ask)
            assert reply == [-2]
            hold.grant = Grant(25)
            hold.grant.settle(40)
        ask[5], ask[8] = 7, 1
        assert (await bench.connection.script("scheduler/cap_reserve", cap._keys, ask))[:2] == [1, 47]


async def logs_that_know_of_more_are_believed(bench: Bench) -> None:
    """Somebody worked for the job on another server."""
    async with cap_bench(bench, cap=150) as job:
        await pay(job.worker(), 10)
        SpendLog(job.dataset, worker="elsewhere", job="main").add(key="k", tokens=100)
        assert await is_refused(job.worker())


async def what_is_logged_and_not_settled_yet_is_not_charged_twice(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        cap = job.worker()
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            hold.grant = Grant(25)
            hold.grant.settle(40)
            SpendLog(job.dataset, worker="w", job="main").add(key="k", tokens=40)
            await pay(job.worker(), 0)
        assert await job.account() == (40, 0)


async def an_account_that_was_lost_waits_for_requests_that_no_log_has_yet(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        cap = job.worker(alone=False)
        async with cap.reserve([HUNDRED], est_tokens=25):
            await bench.connection.command("FLUSHALL")
            assert await waits(job.worker(alone=False))
            await cap.keep()
            assert await job.account() == (0, 100)


async def what_ended_without_a_bill_is_not_taken_up_again(bench: Bench) -> None:
    """A sign of life is under way when its request ends."""
    async with cap_bench(bench, cap=1000) as job:
        cap = job.worker()
        async with cap.reserve([HUNDRED], est_tokens=25) as hold:
            await bench.connection.command("FLUSHALL")
            await pay(job.worker(), 10)
        cap._held[hold.op] = hold
        await cap.keep()
        assert await job.account() == (10, 0)


async def the_first_request_of_a_new_job_waits_for_nobody(bench: Bench) -> None:
    async with cap_bench(bench, cap=150) as job:
        assert not await waits(job.worker(alone=False))


async def what_open_batches_can_cost_is_given_to_nobody_until_their_bill_is_known(bench: Bench) -> None:
    async with cap_bench(bench, cap=1000) as job:
        intent = job.intend(850)
        await pay(job.worker(), 100)
        assert await is_put_off(job.worker())
        job.submissions.spend(intent, "b", job="main", tokens=700)
        await pay(job.worker(), 100)
        assert await job.account() == (200, 0)
        job.submissions.end(intent, "done", tokens=700)
        await pay(job.worker(), 100)
        assert await is_refused(job.worker())


async def a_batch_is_held_until_it_is_noted_and_then_everybody_knows_of_it(bench: Bench) -> None:
    async with cap_bench(bench, cap=250) as job:
        cap = job.worker()
        await pay(cap, 10)
        async with job.worker().set_aside([HUNDRED]) as hold:
            assert await job.account() == (10, 100)
            assert await waits(cap, text=HUNDRED * 2)
            job.intend(hold.most_tokens)
        assert await job.account() == (10, 0)
        assert await is_put_off(cap, text=HUNDRED * 2)
        await pay(cap, 10)


SCENARIOS: list[Scenario] = [
    workers_together_never_hold_more_than_the_cap_leaves,
    what_others_give_back_is_there_at_once_and_what_never_fits_is_refused,
    a_request_is_charged_once_with_what_it_was_billed,
    asking_again_for_one_request_holds_it_once,
    a_dead_workers_hold_comes_back_but_for_what_it_may_have_cost,
    a_living_workers_hold_stays,
    an_account_that_was_lost_is_read_from_the_spend_logs,
    an_account_that_was_lost_learns_what_living_workers_hold,
    what_was_under_way_when_the_account_was_lost_is_charged_once,
    what_ends_while_the_logs_are_read_is_charged,
    logs_that_know_of_more_are_believed,
    what_is_logged_and_not_settled_yet_is_not_charged_twice,
    an_account_that_was_lost_waits_for_requests_that_no_log_has_yet,
    what_ended_without_a_bill_is_not_taken_up_again,
    the_first_request_of_a_new_job_waits_for_nobody,
    what_open_batches_can_cost_is_given_to_nobody_until_their_bill_is_known,
    a_batch_is_held_until_it_is_noted_and_then_everybody_knows_of_it,
]
