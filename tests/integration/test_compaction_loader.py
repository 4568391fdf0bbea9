"""A collection stays what the dataset says while shards are compacted under its loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.errors import TransientError
from loader.service import Loader
from loader.target import MilvusTarget, open_target
from loader.verification import verify_target
from tests.shard_log import ShardLog


def history(dataset: Dataset) -> ShardLog:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"), ("c", "one"))
    log.shard(("a", "two"), ("b", None))
    return log


async def load(dataset: Dataset, target: MilvusTarget) -> Loader:
    async with Loader(Dataset.open(dataset.url), target) as loader:
        await loader.sweep()
        await loader.finish()
    return loader


async def is_exact(dataset: Dataset, milvus: Path, *, expected: int) -> None:
    async with open_target(str(milvus)) as target:
        report = await verify_target(Dataset.open(dataset.url), target)
    assert report.ok, report.as_dict()
    assert report.expected == expected


async def test_what_was_loaded_before_is_not_sent_again(dataset: Dataset, tmp_path: Path) -> None:
    history(dataset)
    milvus = tmp_path / "milvus.db"
    async with open_target(str(milvus)) as target:
        await load(dataset, target)
    assert compact(dataset, grace_s=0).dropped == 3
    async with open_target(str(milvus)) as target:
        loader = await load(dataset, target)
    assert (loader.counts.shards_loaded, loader.counts.rows_upserted) == (1, 0)
    await is_exact(dataset, milvus, expected=2)


async def test_a_running_loader_takes_what_it_had_not_loaded_from_the_replacement(
    dataset: Dataset, tmp_path: Path
) -> None:
    milvus = tmp_path / "milvus.db"
    log = history(dataset)
    async with open_target(str(milvus)) as target, Loader(Dataset.open(dataset.url), target) as loader:
        assert await loader.sweep() == 2
        log.shard(("d", "one"), ("c", None))
        compact(dataset, grace_s=0)
        assert await loader.sweep() == 1
        await loader.finish()
    await is_exact(dataset, milvus, expected=2)


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
async def test_a_shard_that_was_half_loaded_when_it_was_retired_leaves_nothing_behind(
    dataset: Dataset, tmp_path: Path, grace_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    milvus = tmp_path / "milvus.db"
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "one"), ("c", "one"))
    async with open_target(str(milvus)) as target:
        upsert = target.upsert

        async def lose_the_answer(rows: list[dict[str, object]]) -> None:
            await upsert(rows)
            raise TransientError("the connection is gone")

        monkeypatch.setattr(target, "upsert", lose_the_answer)
        async with Loader(Dataset.open(dataset.url), target) as loader:
            with pytest.raises(TransientError):
                await loader.sweep()
    log.shard(("a", "two"), ("b", None))
    compact(dataset, grace_s=grace_s)
    async with open_target(str(milvus)) as target:
        await load(dataset, target)
    await is_exact(dataset, milvus, expected=2)


async def test_what_differs_in_a_replacement_is_repaired(dataset: Dataset, tmp_path: Path) -> None:
    history(dataset)
    milvus = tmp_path / "milvus.db"
    async with open_target(str(milvus)) as target:
        await load(dataset, target)
    compact(dataset)
    async with open_target(str(milvus)) as target, Loader(Dataset.open(dataset.url), target) as loader:
        assert await loader.sweep() == 1
        await target.delete(["a"])
        await target.flush()
    async with open_target(str(milvus)) as target:
        report = await verify_target(dataset, target)
        assert report.missing == ("a",)
        async with Loader(Dataset.open(dataset.url), target) as loader:
            assert await loader.repair(report) >= 1
    await is_exact(dataset, milvus, expected=2)
