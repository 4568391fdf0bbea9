"""A shard that was put aside as damaged and embedded anew is loaded again, by a loader that had loaded it before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.layout import DELETED, EMBEDDED, Marker
from loader.service import Loader
from loader.target import open_target
from loader.verification import verify_target
from tests.datasets import admit_texts, small_dataset


def commit(dataset: Dataset, shard: int, value: float, *, failed: int | None = None) -> None:
    """Vectors of one kind for all rows; a second attempt is told from the first by its vectors."""
    rows = dataset.documents(shard)[0].num_rows
    statuses = np.full(rows, EMBEDDED, np.uint8)
    vectors = np.full((rows, dataset.info.dimensions), value, np.float32)
    if failed is not None:
        statuses[failed], vectors[failed] = DELETED, np.nan
    objects = {layout.vectors_key(shard): dataset.create_vectors(shard, vectors)}
    fingerprint = dataset.info.embedder.fingerprint
    dataset.commit(Marker(shard, statuses, fingerprint, f"attempt of {value}", "w", now_iso(), objects=objects))


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
async def test_a_shard_that_was_committed_anew_is_loaded_anew(tmp_path: Path, restarted: bool) -> None:
    dataset = small_dataset(tmp_path / "d")
    for shard in range(2):
        admit_texts(dataset, shard, ["one", "two"])
        commit(dataset, shard, 1.0)
    async with open_target(str(tmp_path / "milvus.db")) as target:
        async with Loader(Dataset.open(dataset.url), target) as loader:
            assert await loader.sweep() == 2
            dataset.put_aside(0)
            if not restarted:
                assert await loader.sweep() == 0
                commit(dataset, 0, 2.0)
                assert await loader.sweep() == 1
                assert await loader.sweep() == 0
            await loader.finish()
        if restarted:
            commit(dataset, 0, 2.0)
    async with open_target(str(tmp_path / "milvus.db")) as target, Loader(Dataset.open(dataset.url), target) as loader:
        assert await loader.sweep() == int(restarted)
        await loader.finish()
        report = await verify_target(Dataset.open(dataset.url), target)
    assert (report.ok, report.expected, report.sampled) == (True, 4, 4)
