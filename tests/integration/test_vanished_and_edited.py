"""A dataset that is gone from its place, and metadata that somebody has edited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedmill import open_dataset
from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.verification import verify_dataset
from embedmill.errors import CorruptStore, StorageError
from tests.datasets import admit_texts
from tests.shard_log import ShardLog


@pytest.fixture
def url(dataset: Dataset) -> str:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "two"))
    log.shard(("c", "three"))
    return dataset.url


def embedmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedmill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("is_mount", [False, True], ids=["moved", "unmounted"])
def test_a_dataset_that_is_gone_is_not_an_empty_one_and_nothing_is_written_in_its_place(
    dataset: Dataset, url: str, is_mount: bool
) -> None:
    reader = open_dataset(url)
    Path(url).rename(f"{url}.gone")
    if is_mount:
        Path(url).mkdir()
    with pytest.raises(StorageError, match=r"dataset\.json is gone"):
        reader.refresh()
    with pytest.raises(StorageError, match=r"dataset\.json is gone"):
        next(reader.follow(until=lambda: True))
    for write in (
        lambda: admit_texts(dataset, 2, ["four"]),
        lambda: dataset.create_vectors(2, np.ones((1, 3), np.float32)),
        lambda: dataset.store.append("spend/w.log", b"{}"),
    ):
        with pytest.raises(StorageError, match=r"dataset\.json is gone"):
            write()
    assert Path(url).exists() == is_mount
    assert not is_mount or list(Path(url).iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("dtype", "float16"), ("shard_rows", 4)])
def test_an_edited_dataset_json_stops_writers_and_a_repair_throws_nothing_away(
    dataset: Dataset, url: str, field: str, value: object
) -> None:
    path = Path(url) / layout.DATASET_KEY
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, field: value}))
    with pytest.raises(CorruptStore, match=r"do not agree"):
        Dataset.open_or_create(url, embedder=dataset.info.embedder)
    assert embedmill("verify", url, "--repair").returncode == 4
    path.write_text(json.dumps(record))
    assert verify_dataset(Dataset.open(url)).passed


@pytest.mark.parametrize("damage", ["edited", "garbage", "missing"])
def test_metadata_that_only_other_readers_need_is_written_anew_by_a_repair(url: str, damage: str) -> None:
    path = Path(url) / layout.ZARR_ARRAY_KEY
    whole = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(whole.replace("float32", "float16") if damage == "edited" else "garbage")
    assert not verify_dataset(Dataset.open(url)).passed
    done = embedmill("verify", url, "--repair")
    assert (done.returncode, "written anew" in done.stdout) == (4, True), done
    assert verify_dataset(Dataset.open(url)).passed
    assert json.loads(path.read_text()) == json.loads(whole)
