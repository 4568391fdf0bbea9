"""The commands that make, pause, resume and cancel jobs, show them, and rebuild a lost queue; on a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Job
from embedmill.dataset.passages import ShardOrigin
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from scheduler.retention import drop_finished_jobs
from tests.conftest import Command, write_jsonl
from tests.datasets import admit_texts, small_dataset
from tests.invariants import check_dataset
from worker.service import pause_job

pytestmark = pytest.mark.server
NULL = ("--model", "null/8")
TEXTS = {f"id-{n}": f"text number {n}" for n in range(20)}


@pytest.fixture
def queue(connection: Connection) -> Queue:
    return Queue(connection)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [{"id": id_, "text": text} for id_, text in TEXTS.items()])


def wait_until(condition: Callable[[], bool], *, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_create_makes_a_dataset_and_a_job_once_and_refuses_another_model_or_lane(embedmill: Command) -> None:
    for _ in range(2):
        made = embedmill("create", "d", *NULL, "--job", "news", "--lane", "live", "--json")
        assert made.status == 0
        assert (made.record["job"], made.record["lane"], made.record["state"]) == ("news", "live", "running")
    dataset = Dataset.open(str(embedmill.folder / "d"))
    assert dataset.admitted() == []
    assert dataset.job("news") is not None
    other = embedmill("create", "d", "--model", "null/16")
    assert other.status == 2
    assert "holds vectors of another embedder" in other.stderr
    assert embedmill("create", "d", *NULL, "--job", "news", "--lane", "bulk").status == 2
    assert embedmill("create", "d", *NULL, "--dtype", "float16").status == 2


async def test_a_push_goes_into_the_lane_that_the_job_was_created_with(
    embedmill: Command, corpus: Path, server_url: str, queue: Queue
) -> None:
    embedmill("create", "d", *NULL, "--job", "news", "--lane", "live")
    assert embedmill("push", corpus, "--to", "d", *NULL, "--job", "news", "--redis", server_url).status == 0
    depth = await queue.depth()
    assert (depth.ready_live, depth.ready_bulk) == (1, 0)


async def test_a_paused_job_is_not_handed_out_and_refuses_a_push_until_it_is_resumed(
    embedmill: Command, corpus: Path, server_url: str, queue: Queue
) -> None:
    push = ("push", corpus, "--to", "d", *NULL, "--redis", server_url)
    assert embedmill(*push).status == 0
    paused = embedmill("pause", "main", "--to", "d", "--redis", server_url)
    assert paused.status == 0
    assert "embedmill resume main --to" in paused.stdout
    assert await queue.lease("w") == []
    for command in (push, ("run", corpus, "--to", "d", *NULL, "--no-milvus")):
        refused = embedmill(*command)
        assert refused.status == 2
        assert "is paused: `embedmill resume main --to" in refused.stderr
    assert embedmill("resume", "main", "--to", "d", "--redis", server_url, "--json").record["state"] == "running"
    assert len(await queue.lease("w")) == 1
    assert embedmill(*push).status == 0


def test_a_job_that_a_worker_paused_for_want_of_balance_goes_on_with_the_next_run_which_says_so(
    embedmill: Command, corpus: Path
) -> None:
    run = ("run", corpus, "--to", "d", *NULL, "--no-milvus")
    embedmill("create", "d", *NULL)
    dataset = Dataset.open(str(embedmill.folder / "d"))
    pause_job(dataset, "main", "the account is empty")
    ended = embedmill(*run)
    assert ended.status == 0
    assert "job main was paused (the account is empty); it goes on" in ended.stderr
    dataset.write_job(Job("main", state="paused", stopped_by="user"))
    pause_job(dataset, "main", "the account is empty")
    known = dataset.job("main")
    assert known is not None
    assert known.stopped_by == "user"


def test_without_redis_a_pause_says_when_workers_notice(embedmill: Command) -> None:
    embedmill("create", "d", *NULL)
    paused = embedmill("pause", "main", "--to", "d")
    assert paused.status == 0
    assert "Without --redis, workers notice when they take their next task." in paused.stdout
    unknown = embedmill("pause", "other", "--to", "d")
    assert unknown.status == 2
    assert "has no job other; its jobs: main" in unknown.stderr


async def test_a_cancelled_job_leaves_nothing_owed_and_nothing_in_the_queue(
    embedmill: Command, corpus: Path, server_url: str, queue: Queue
) -> None:
    assert embedmill("push", corpus, "--to", "d", *NULL, "--redis", server_url).status == 0
    asked = embedmill("cancel", "main", "--to", "d", "--redis", server_url)
    assert asked.status == 2
    assert "add --yes" in asked.stderr
    ended = embedmill("cancel", "main", "--to", "d", "--redis", server_url, "--yes", "--json")
    assert ended.status == 0
    assert ended.record == {"job": "main", "state": "cancelled", "cancelled": 20, "kept": 0, "redis_told": True}
    assert (await queue.depth()).open == 0
    check_dataset(embedmill.folder / "d", source=TEXTS)
    passages = embedmill("status", "d", "--json").record["passages"]
    assert (passages["admitted"], passages["cancelled"], passages["owed"]) == (20, 20, 0)
    assert embedmill("verify", "d").status == 0
    assert embedmill("pause", "main", "--to", "d").status == 2


async def test_a_shard_that_a_running_push_queues_for_a_cancelled_job_is_taken_out_again(
    tmp_path: Path, queue: Queue
) -> None:
    dataset = small_dataset(tmp_path / "d")
    admit_texts(dataset, 0, ["one", "two"])
    dataset.write_job(Job("main"))
    assert await reconcile(dataset, queue) == 1
    dataset.write_job(Job("main", state="cancelled"))
    assert await reconcile(dataset, queue) == 0
    assert (await queue.depth()).open == 0


async def test_verify_with_repair_rebuilds_a_queue_that_was_emptied_with_its_pauses(
    embedmill: Command, server_url: str, queue: Queue
) -> None:
    dataset = small_dataset(embedmill.folder / "d")
    for shard, job in enumerate(("main", "main", "idle")):
        dataset.write_job(Job(job, state="paused" if job == "idle" else "running"))
        admit_texts(
            dataset, shard, [f"text {row} of shard {shard}" for row in range(8)], origin=ShardOrigin(shard, job)
        )
    verified = embedmill("verify", "d", "--repair", "--redis", server_url, "--json")
    assert (verified.status, verified.record["queued"]) == (3, 2)
    jobs = {job.job: job for job in await queue.jobs()}
    assert (jobs["main"].ready, jobs["main"].paused) == (2, False)
    assert (jobs["idle"].ready, jobs["idle"].paused) == (0, True)
    again = embedmill("verify", "d", "--repair", "--redis", server_url)
    assert "queue: 0 shards were owed and not queued" in again.stdout
    assert embedmill("verify", "d", "--redis", server_url, "--json").record["queued"] is None


async def test_status_tells_the_backlog_of_what_goes_on_for_a_dataset_and_for_a_namespace(
    embedmill: Command, server_url: str, queue: Queue
) -> None:
    dataset = small_dataset(embedmill.folder / "d")
    for shard in range(3):
        job = "idle" if shard == 2 else "main"
        admit_texts(
            dataset, shard, [f"text {row} of shard {shard}" for row in range(8)], origin=ShardOrigin(shard, job)
        )
    for job in ("main", "idle"):
        dataset.write_job(Job(job))
    await reconcile(dataset, queue)
    await queue.pause(dataset.info.id, "idle")
    await queue.lease("w", count=1)
    await queue.report("w", {"embedded": 40, "tokens": 400, "holds": 1, "started_at": "2026-01-01T00:00:00+00:00"})
    for arguments in (("d",), ()):
        record = embedmill("status", *arguments, "--redis", server_url, "--json").record
        backlog = record["backlog"]
        assert (backlog["tasks"], backlog["passages"], backlog["leased"], backlog["workers"]) == (2, 16, 1, 1)
        assert backlog["tokens"] > 0
        assert {job["job"]: job["paused"] for job in record["queue_jobs"]} == {"idle": True, "main": False}
        assert record["workers"][0]["owner"] == "w"
    one = embedmill("status", "d", "idle", "--redis", server_url)
    assert one.status == 0
    assert "idle (bulk, paused): 1 ready" in one.stdout
    assert embedmill("status", "d", "other").status == 2
    assert embedmill("status").status == 2


async def test_status_of_a_job_tells_of_its_passages_and_its_pace_alone(
    embedmill: Command, server_url: str, queue: Queue
) -> None:
    dataset = small_dataset(embedmill.folder / "d")
    for shard, job in enumerate(("main", "main", "main", "news")):
        admit_texts(dataset, shard, ["one", "two", "three", "four"], origin=ShardOrigin(shard, job))
        dataset.write_job(Job(job))
    await reconcile(dataset, queue)
    done = {"d0:main": [80, 800], "d0:news": [2, 20], "d1:main": [1000, 1000]}
    await queue.report("w", {"embedded": 9999, "tokens": 9999, "recent_s": 20.0, "recent": done})

    def told(*of: str) -> tuple[int, float, int]:
        record = embedmill("status", *of, "--redis", server_url, "--json").record
        return record["passages"]["owed"], record["rates"]["passages_per_s"], record["seconds_left"]

    assert told("d") == (16, 4.1, 4)
    assert told("d", "main") == (12, 4.0, 3)
    assert told("d", "news") == (4, 0.1, 40)
    shown = embedmill("status", "d", "news", "--redis", server_url).stdout
    assert "d, job news: 0 of 4 passages done" in shown
    assert "time left   about 40 s" in shown


def test_status_watched_by_no_terminal_is_a_line_per_look_and_ends_well_with_ctrl_c(
    embedmill: Command, corpus: Path, server_url: str, queue: Queue
) -> None:
    embedmill("push", corpus, "--to", "d", *NULL, "--redis", server_url)
    process = embedmill.start("status", "d", "--redis", server_url, "--watch", "--every", "0.1")
    assert process.stdout is not None
    lines = [process.stdout.readline().decode() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert stderr == b""
    assert all("0 of 20 passages, 0 failed; 1 ready, 0 leased, 0 delayed; 0 workers" in line for line in lines), lines


def test_a_worker_embeds_what_was_resumed(embedmill: Command, corpus: Path, server_url: str, queue: Queue) -> None:
    assert embedmill("push", corpus, "--to", "d", *NULL, "--redis", server_url).status == 0
    embedmill("pause", "main", "--to", "d", "--redis", server_url)
    worker = embedmill.start("worker", "--redis", server_url, *NULL)
    try:
        dataset = Dataset.open(str(embedmill.folder / "d"))
        embedmill("resume", "main", "--to", "d", "--redis", server_url)
        wait_until(lambda: not dataset.owed())
    finally:
        end(worker)
    dataset.publish_shape()
    check_dataset(dataset.url, source=TEXTS)


async def test_the_record_of_a_job_that_has_ended_is_forgotten_after_its_time_and_that_of_a_paused_one_stays(
    tmp_path: Path, queue: Queue
) -> None:
    dataset = small_dataset(tmp_path / "d")
    for shard, job in enumerate(("done", "open", "idle")):
        dataset.write_job(Job(job))
        admit_texts(dataset, shard, ["one"], origin=ShardOrigin(shard, job))
    await reconcile(dataset, queue)
    await queue.pause(dataset.info.id, "idle")
    done = [lease for lease in await queue.lease("w", count=3) if lease.task.job == "done"]
    await queue.finish(done[0].task)
    assert await drop_finished_jobs(queue) == []
    await anyio.sleep(0.01)
    assert await drop_finished_jobs(queue, keep_days=0.005 / 86_400) == [f"{dataset.url}:done"]
    assert {job.job for job in await queue.jobs()} == {"open", "idle"}


def end(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=40)
    assert b"Traceback" not in stderr, stderr.decode()
