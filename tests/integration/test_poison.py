"""A passage that ends its worker is found and buried; a healthy one is not, however often workers are killed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED
from embedmill.dataset.local_store import LocalStore
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.conftest import ROOT
from tests.datasets import admit_texts, small_dataset
from tests.invariants import check_dataset
from tests.mortal_worker import POISON
from worker.trials import DEATHS_TO_BURY, SUSPECT_AFTER

pytestmark = pytest.mark.server
ROWS = 256


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d", shard_rows=ROWS, chunk_rows=32)


def start(server_url: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.mortal_worker", server_url, "tested", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def deaths_of(*workers: subprocess.Popen[str], within_s: float) -> int:
    """Wait until nothing is left to do; how many lives it took more than one per worker."""
    deaths = 0
    try:
        for worker in workers:
            said, complaints = worker.communicate(timeout=within_s)
            assert worker.returncode == 0, complaints
            deaths += int(said.splitlines()[-1])
    finally:
        for worker in workers:
            if worker.returncode is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.communicate()
    return deaths


async def owe(dataset: Dataset, queue: Queue, *contents: list[str]) -> None:
    for shard, texts in enumerate(contents):
        admit_texts(dataset, shard, texts)
    await reconcile(dataset, queue)


def texts_with(shard: int, *poison: int) -> list[str]:
    return [f"{POISON if row in poison else 'text'} {row} of shard {shard}" for row in range(ROWS)]


def check(dataset: Dataset) -> Dataset:
    dataset = Dataset.open(dataset.url)
    dataset.publish_shape()
    assert isinstance(dataset.store, LocalStore)
    dataset.store.sweep(older_than_s=0)
    check_dataset(dataset.url)
    return dataset


@pytest.mark.parametrize("poison", [[100], [3, 99, 200]], ids=["one", "three"])
async def test_passages_that_end_their_worker_become_the_only_dead_letters(
    dataset: Dataset, queue: Queue, server_url: str, poison: list[int]
) -> None:
    await owe(dataset, queue, texts_with(0, *poison), texts_with(1))
    deaths = deaths_of(start(server_url, "--lease-s", "0.4"), within_s=120)
    dataset = check(dataset)
    marker, healthy = dataset.marker(0), dataset.marker(1)
    assert marker is not None
    assert healthy is not None
    assert [(f.row, f.code) for f in marker.failures] == [(row, "poison") for row in poison]
    assert "alone in a request" in marker.failures[0].cause
    assert (healthy.statuses == EMBEDDED).all()
    assert (await queue.depth()).dead == len(poison)
    bound = SUSPECT_AFTER + len(poison) * (math.log2(ROWS) + DEATHS_TO_BURY)
    print(f"{len(poison)} poison passages of {2 * ROWS}: {deaths} deaths, at most {bound:.0f} expected")
    assert deaths <= bound


async def test_a_queue_that_forgets_its_deliveries_does_not_keep_a_poison_passage_from_being_found(
    dataset: Dataset, queue: Queue, server_url: str
) -> None:
    await owe(dataset, queue, texts_with(0, 100))
    deaths = deaths_of(start(server_url, "--own", dataset.url), within_s=120)
    marker = check(dataset).marker(0)
    assert marker is not None
    assert [(f.row, f.code) for f in marker.failures] == [(100, "poison")]
    assert deaths <= SUSPECT_AFTER + math.log2(ROWS) + DEATHS_TO_BURY


async def test_nothing_is_buried_when_workers_are_killed_all_the_time(
    dataset: Dataset, queue: Queue, server_url: str
) -> None:
    await owe(dataset, queue, *(texts_with(shard) for shard in range(8)))
    arguments = ("--lease-s", "0.4", "--kill-s", "0.4", "--request-s", "0.1")
    workers = [start(server_url, *arguments, "--seed", str(seed)) for seed in range(2)]
    deaths = deaths_of(*workers, within_s=120)
    dataset = check(dataset)
    print(f"{deaths} kills")
    assert deaths > 5
    for shard in range(8):
        marker = dataset.marker(shard)
        assert marker is not None
        assert (marker.statuses == EMBEDDED).all()
