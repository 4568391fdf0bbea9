"""Runs that are killed or stopped anywhere, and started again: what they leave in the end is what a calm run leaves."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.local_store import LocalStore
from tests.conftest import Command, Corpus, Ended, finish, write_jsonl
from tests.invariants import assert_same_set, check_dataset, final_set, logged_ids
from worker.checkpoints import decode_increment
from worker.embedders.jina import JinaEmbedder
from worker.packing import pack
from worker.trials import NOTE_PREFIX

CONCURRENCY = 4
LATENCY_S = 0.45
CHECKPOINT_S = 2.0
KEY = {"JINA_API_KEY": "jina_rehearsed"}


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """1,500 passages of about 1,000 tokens: eight fill a request, so that a run is many requests."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[topic] for topic in sorted(topics))
    texts = {f"passage-{number}": whole[300 * number : 300 * number + 3600] for number in range(1500)}
    path = tmp_path_factory.mktemp("corpus") / "long.jsonl"
    write_jsonl(path, [{"id": id_, "text": text} for id_, text in texts.items()])
    return Corpus(path, texts)


class Provider:
    """The simulated provider in a process of its own, which survives the runs that are killed."""

    def __init__(self, api_base: str) -> None:
        self.api_base = api_base

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.api_base.replace("/v1", "/stats"), timeout=5) as answer:
            stats: dict[str, Any] = json.loads(answer.read())
        return stats

    def options(self) -> tuple[str, ...]:
        """For `run`: no limit of this provider's binds, but for the requests in flight."""
        limits = ("--concurrency", str(CONCURRENCY), "--rpm", "100000", "--tpm", "1000000000")
        model = ("--model", "jina/jina-embeddings-v3", "--dimensions", "64", "--api-base", self.api_base)
        return (*model, *limits, "--no-milvus", "--json")


@contextmanager
def provider(command: Command, *behaviour: str, latency_s: float) -> Iterator[Provider]:
    limits = ("--rpm", "0", "--tpm", "0", "--concurrency", "0")
    latency = ("--latency-ms", str(latency_s * 1000), "--jitter-ms", "0")
    process = command.start("rehearse", "--port", "0", *limits, *latency, *behaviour)
    try:
        assert process.stdout is not None
        line = next(line.decode() for line in process.stdout if b"--api-base" in line)
        yield Provider(line.split("--api-base")[1].strip())
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], *, within_s: float = 20) -> bool:
    """Whether it became true before the process ended."""
    deadline = time.monotonic() + within_s
    while not true():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)
    return True


def kill_again_and_again(
    start: Callable[[], subprocess.Popen[bytes]], *, kills: int, moment_s: Callable[[], float]
) -> int:
    """Start and kill; how many were killed before one reached its end."""
    for killed in range(kills):
        process = start()
        try:
            process.wait(timeout=moment_s())
        except subprocess.TimeoutExpired:
            process.kill()
        stdout, stderr = process.communicate()
        assert b"Traceback" not in stdout + stderr, stderr.decode()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, stderr.decode()
            return killed
    return kills


def rows_in_checkpoints(root: Path) -> int:
    """Rows of shards without a marker that need not be paid for again."""
    dataset = Dataset.open(str(root))
    owed = {f"{shard:08d}" for shard in dataset.owed()}
    rows: set[tuple[str, int]] = set()
    for path in (root / "checkpoints").glob("*/*"):
        if path.parent.name in owed and not path.name.endswith(".tmp") and not path.name.startswith(NOTE_PREFIX):
            data, fingerprint = path.read_bytes(), dataset.info.embedder.fingerprint
            increment = decode_increment(data, fingerprint=fingerprint, name=path.name)
            rows |= {(path.parent.name, int(row)) for row in increment.rows}
    return len(rows)


def passages_per_request(corpus: Corpus) -> int:
    embedder = JinaEmbedder("jina/jina-embeddings-v3", key="jina_rehearsed", dimensions=64, tokens_per_minute=10**9)
    tokens = embedder.estimate_tokens(list(corpus.texts.values()))
    return max(len(batch) for batch in pack(tokens, limits=embedder.limits))


@pytest.mark.slow
def test_killed_20_times_it_ends_with_the_set_of_a_calm_run_and_repays_little(
    embedmill: Command, long_corpus: Corpus, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(20)
    out = embedmill.folder / "killed"
    with provider(embedmill, latency_s=LATENCY_S) as slow, provider(embedmill, latency_s=0) as quick:
        calm = embedmill("run", long_corpus.path, "--to", "calm", *quick.options(), environment=KEY)
        assert calm.status == 0
        began = time.monotonic()
        arguments = ("run", str(long_corpus.path), "--to", str(out), *slow.options())
        kills = kill_again_and_again(
            lambda: embedmill.start(*arguments, environment=KEY), kills=20, moment_s=lambda: chance.uniform(0.5, 3.3)
        )
        kept = rows_in_checkpoints(out)
        # What was in flight at a death is tried again by itself, one request after the other.
        last = embedmill(*arguments, environment=KEY, timeout_s=150)
        seconds = time.monotonic() - began
        stats = slow.stats()

    assert last.status == 0
    # What a kill left half-written goes with the first run of an hour later.
    LocalStore(out).sweep(older_than_s=0)
    check_dataset(out, source=long_corpus.texts)
    assert logged_ids(out) == list(long_corpus.texts)
    assert_same_set(final_set(out), final_set(embedmill.folder / "calm"))
    assert last.record["passages"]["failed"] == 0
    # The last run takes over everything that was kept and pays for nothing but the rest.
    assert last.record["now"]["adopted"] == kept
    assert last.record["now"]["embedded"] == (len(long_corpus.texts) - kept if last.record["now"]["requests"] else 0)
    # What a kill may cost: the requests in flight, the answers since the last checkpoint (as many as the requests in
    # flight can bring in that time), and the probe of the next start.
    paid_again = stats["texts_embedded"] - len(long_corpus.texts)
    answers = CONCURRENCY * (1 + CHECKPOINT_S / LATENCY_S)
    bound = (kills + 1) + kills * answers * passages_per_request(long_corpus)
    figures = {"kills": kills, "passages": 1500, "paid again": paid_again, "bound": int(bound), "s": round(seconds, 1)}
    record_property("figures", figures)
    print(figures)
    assert kills >= 15, f"only {kills} kills before the end: the test proves little"
    assert paid_again <= bound, figures


@pytest.mark.slow
def test_killed_while_it_reads_and_commits_it_ends_with_the_set_of_a_calm_run_bit_for_bit(
    embedmill: Command, python_docs: Corpus
) -> None:
    chance = random.Random(8)
    arguments = ("run", "pydoc:", str(python_docs.path), "--model", "null/64", "--no-milvus", "--json")
    assert embedmill(*arguments, "--to", "calm").status == 0
    out = embedmill.folder / "killed"

    def start_and_wait_for_work() -> subprocess.Popen[bytes]:
        process = embedmill.start(*arguments, "--to", out)
        lock = out / ".work.lock"
        wait_until(lambda: lock.exists() and is_locked(lock), process)
        return process

    kills = kill_again_and_again(start_and_wait_for_work, kills=8, moment_s=lambda: chance.uniform(0.0, 0.45))
    assert kills >= 5
    last = embedmill(*arguments, "--to", out)
    assert (last.status, last.record["passages"]["failed"]) == (0, 0)
    LocalStore(out).sweep(older_than_s=0)
    check_dataset(out)
    calm, ours = final_set(embedmill.folder / "calm"), final_set(out)
    assert_same_set(ours, calm)
    print({"kills": kills, "passages": len(ours)})


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_says_how_to_go_on_and_nothing_is_paid_for_twice(
    stop: signal.Signals, embedmill: Command, long_corpus: Corpus
) -> None:
    texts = dict(list(long_corpus.texts.items())[:200])
    source = write_jsonl(embedmill.folder / "some.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    out = embedmill.folder / "out"
    with provider(embedmill, latency_s=LATENCY_S) as slow:
        arguments = ("run", str(source), "--to", str(out), *slow.options())
        process = embedmill.start(*arguments[:-1], environment=KEY)
        assert wait_until(lambda: bool(slow.stats()["texts_embedded"] > 50), process)
        process.send_signal(stop)
        began = time.monotonic()
        stopped = finish(process, timeout_s=15)
        assert time.monotonic() - began < 5
        expect_a_clean_stop(stopped, out)
        resumed = embedmill(*arguments, environment=KEY)
        assert resumed.status == 0
        check_dataset(out, source=texts)
        probes = 2
        assert slow.stats()["texts_embedded"] == len(texts) + probes


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_it_waits_for_standard_input_it_ends_at_once(stop: signal.Signals, embedmill: Command) -> None:
    arguments = ("run", "-", "--to", "out", "--model", "null/8", "--no-milvus")
    process = embedmill.start(*arguments, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b'{"id":"a","text":"One."}\n')
    process.stdin.flush()
    assert wait_until((embedmill.folder / "out" / "jobs" / "main.json").exists, process)
    time.sleep(0.5)
    process.send_signal(stop)
    began = time.monotonic()
    # Its standard input stays open: it is the other program that does not end.
    assert process.wait(timeout=10) == 3
    assert time.monotonic() - began < 5
    process.communicate()
    assert embedmill(*arguments, stdin=b'{"id":"a","text":"One."}\n').status == 0
    check_dataset(embedmill.folder / "out", source={"a": "One."})


def test_out_of_money_it_says_so_keeps_what_was_paid_for_and_goes_on_with_new_money(
    embedmill: Command, long_corpus: Corpus
) -> None:
    texts = dict(list(long_corpus.texts.items())[:200])
    source = write_jsonl(embedmill.folder / "some.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    out = embedmill.folder / "out"
    with provider(embedmill, "--no-balance-after", "100000", latency_s=0.05) as empty:
        ended = embedmill("run", source, "--to", out, *empty.options(), environment=KEY)
        paid = empty.stats()["texts_embedded"] - 1
    assert (ended.status, ended.stdout) == (3, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "Insufficient account balance" in ended.stderr
    job = Dataset.open(str(out)).job("main")
    assert job is not None
    assert job.state == "paused"
    assert "Insufficient account balance" in job.reason
    check_dataset(out, at_rest=False)
    assert 0 < rows_in_checkpoints(out) == paid < len(texts)
    with provider(embedmill, latency_s=0) as refilled:
        ended = embedmill("run", source, "--to", out, *refilled.options(), environment=KEY)
    assert ended.status == 0
    assert ended.record["now"]["embedded"] == len(texts) - paid
    check_dataset(out, source=texts)


def expect_a_clean_stop(stopped: Ended, out: Path) -> None:
    assert stopped.status == 3, stopped.output
    assert stopped.stdout.startswith("Stopped before the end; nothing is lost.")
    assert stopped.stdout.endswith("Next: run the same command again to go on\n")
    check_dataset(out, at_rest=False)
    assert rows_in_checkpoints(out) > 50
    assert not is_locked(out / ".work.lock")


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
