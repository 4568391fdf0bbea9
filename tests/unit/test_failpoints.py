import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from embedmill import failpoints
from embedmill.commands.options import check_environment
from embedmill.errors import ConfigurationError
from embedmill.failpoints import afailpoint, arm, failpoint


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    arm("")
    yield
    arm("")


def test_without_a_plan_nothing_happens_and_it_costs_next_to_nothing() -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        failpoint("worker.after_vectors")
    assert time.perf_counter() - began < 0.5


def test_an_action_with_a_count_happens_that_time_only_and_other_names_are_not_touched() -> None:
    arm("a.b=raise@2, a.c=raise")
    failpoint("a.b")
    with pytest.raises(RuntimeError, match=r"failpoint a\.b"):
        failpoint("a.b")
    failpoint("a.b")
    failpoint("a.d")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            failpoint("a.c")


async def test_a_lost_reply_is_the_error_of_a_connection_that_went_away() -> None:
    arm("redis.scheduler/finish.reply=lost@1")
    with pytest.raises(ConnectionResetError):
        await afailpoint("redis.scheduler/finish.reply")
    await afailpoint("redis.scheduler/finish.reply")


def test_a_stall_takes_its_time() -> None:
    arm("a=stall:0.05")
    began = time.perf_counter()
    failpoint("a")
    assert time.perf_counter() - began >= 0.05


def test_a_crash_ends_the_process_at_once_as_a_kill_would() -> None:
    script = "from embedmill.failpoints import failpoint\ntry:\n failpoint('x')\nfinally:\n print('not reached')"
    environment = {**os.environ, failpoints.VARIABLE: "x=crash"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (137, b"")


@pytest.mark.parametrize("plan", ["x", "x=explode", "x=stall", "x=crash@0", "x=crash@y"])
def test_what_is_no_plan_is_refused_where_the_environment_is_checked(plan: str) -> None:
    with pytest.raises(ConfigurationError, match="EMBEDMILL_FAILPOINTS"):
        check_environment({failpoints.VARIABLE: plan})
