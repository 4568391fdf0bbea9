"""What dead processes leave behind is taken away, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import checkpoints_folder
from scheduler.housekeeping import Housekeeping
from tests.datasets import admit_texts, small_dataset
from worker.checkpoints import Checkpoint
from worker.commit import commit_shard
from worker.results import Increment, ShardResults


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = small_dataset(tmp_path / "wiki")
    admit_texts(dataset, 0, ["one", "two"])
    admit_texts(dataset, 1, ["three"])
    return dataset


def keep_a_row(dataset: Dataset, shard: int) -> None:
    vector = np.ones((1, dataset.info.dimensions), np.float32)
    Checkpoint(dataset, shard, attempt="late").keep(Increment(np.array([0], np.int32), vector))


def commit(dataset: Dataset, shard: int) -> None:
    table, origin = dataset.documents(shard)
    results = ShardResults(table.num_rows, dataset.info.dimensions)
    results.delete(range(table.num_rows))
    ids = list(zip(table["id"].to_pylist(), table["version"].to_pylist(), strict=True))
    commit_shard(dataset, shard, results, origin=origin, passages=ids, attempt="a", worker="w")


def test_only_the_checkpoints_of_committed_shards_are_swept(dataset: Dataset) -> None:
    keep_a_row(dataset, 0)
    keep_a_row(dataset, 1)
    commit(dataset, 0)
    Housekeeping(dataset).sweep()
    assert dataset.store.names("checkpoints") == ["00000001"]
    assert len(dataset.store.names(checkpoints_folder(1))) == 1


def test_checkpoints_of_a_shard_whose_marker_was_put_aside_are_paid_for_and_stay(dataset: Dataset) -> None:
    commit(dataset, 0)
    assert dataset.marker(0) is not None, "a scheduler remembers it from here on"
    Dataset.open(dataset.url).put_aside(0)
    keep_a_row(Dataset.open(dataset.url), 0)
    Housekeeping(dataset).sweep()
    assert len(dataset.store.names(checkpoints_folder(0))) == 1


def test_half_written_files_go_once_they_are_old(dataset: Dataset, tmp_path: Path) -> None:
    old, new = tmp_path / "wiki/commits/.a.1.tmp", tmp_path / "wiki/commits/.b.2.tmp"
    old.parent.mkdir(exist_ok=True)
    for path in (old, new):
        path.write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    Housekeeping(dataset).sweep()
    assert (old.exists(), new.exists()) == (False, True)
