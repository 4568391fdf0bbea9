"""Shards that are replaced or erased while a loader is in the middle of them: the collection is what the dataset says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from embedmill.dataset import layout
from embedmill.dataset.compaction import compact
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.passages import Passage
from embedmill.dataset.purging import Purge
from loader.service import Loader
from loader.target import MilvusTarget, open_target
from loader.verification import TargetReport, verify_target
from tests.datasets import small_dataset
from tests.shard_log import ShardLog


class Killed(BaseException):
    """A process ends here."""


class Target:
    """A database that runs each of `before` and `after` at one upsert, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before: list[Callable[[], object]] = []
        self.after: list[Callable[[], object]] = []
        self.purged: list[str] = []

    async def load(self, dataset: Dataset) -> Loader:
        async with open_target(str(self.path)) as target:
            self._instrument(target)
            async with Loader(Dataset.open(dataset.url), target) as loader:
                await loader.sweep()
                await loader.finish()
        return loader

    async def report(self, dataset: Dataset) -> TargetReport:
        async with open_target(str(self.path)) as target:
            return await verify_target(Dataset.open(dataset.url), target)

    async def ids(self, dataset: Dataset) -> list[str]:
        async with open_target(str(self.path)) as target:
            await verify_target(dataset, target)
            return sorted(await target.versions())

    def _instrument(self, target: MilvusTarget) -> None:
        upsert = target.upsert

        async def instrumented(rows: Sequence[Mapping[str, Any]]) -> None:
            if self.before:
                self.before.pop(0)()
            if self.purged:
                # What `embedmill purge --milvus` does.
                await target.delete(self.purged)
                self.purged = []
            await upsert(rows)
            if self.after:
                self.after.pop(0)()

        target.upsert = instrumented  # type: ignore[method-assign]


@pytest.fixture
def milvus(tmp_path: Path) -> Target:
    return Target(tmp_path / "milvus.db")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d")


def purge(dataset: Dataset, *ids: str) -> None:
    assert Purge(Dataset.open(dataset.url), ids).run().is_gone


async def test_what_is_replaced_in_the_middle_of_a_sweep_overrules_what_it_did(
    dataset: Dataset, milvus: Target
) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    log.shard(("b", "one"))
    owed = log.shard(("a", None), commit=False)
    log.shard(("c", "one"))
    # The first version moves behind the second one, which is applied first.
    compact(Dataset.open(dataset.url), grace_s=3600)
    log.commit_admitted(owed)
    log.shard(("x", "one"))

    async with open_target(str(milvus.path)) as target:
        delete = target.delete

        async def delete_then_compact(ids: Sequence[str]) -> None:
            await delete(ids)
            if "a" in ids and compacted == []:
                compacted.append(compact(Dataset.open(dataset.url), grace_s=3600))

        compacted: list[object] = []
        target.delete = delete_then_compact  # type: ignore[method-assign]
        async with Loader(Dataset.open(dataset.url), target) as loader:
            await loader.sweep()
            await loader.finish()
    assert len(compacted) == 1
    report = await milvus.report(dataset)
    assert (report.ok, report.expected) == (True, 3), report.as_dict()


async def test_a_shard_that_is_erased_in_the_middle_of_a_sweep_is_passed_over(dataset: Dataset, milvus: Target) -> None:
    log = ShardLog(dataset)
    log.shard(("z", "one"))
    log.shard(("a", "one"), ("s", "secret"))
    milvus.before = [lambda: purge(dataset, "s")]
    await milvus.load(dataset)
    report = await milvus.report(dataset)
    assert (report.ok, report.expected) == (True, 2), report.as_dict()


async def test_a_shard_whose_erasure_was_interrupted_does_not_count_as_loaded(
    dataset: Dataset, milvus: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ShardLog(dataset)
    log.shard(("z", "one"))
    log.shard(("a", "one"), ("s", "secret"))

    def killed_before_the_marker_goes() -> None:
        other = Dataset.open(dataset.url)
        delete = other.store.delete

        def die(key: str) -> None:
            if key == layout.commit_key(1):
                raise Killed
            delete(key)

        monkeypatch.setattr(other.store, "delete", die)
        with pytest.raises(Killed):
            Purge(other, ["s"]).run()

    milvus.before = [killed_before_the_marker_goes]
    await milvus.load(dataset)
    report = await milvus.report(dataset)
    assert (report.ok, report.expected) == (True, 2), report.as_dict()


async def test_a_shard_whose_marker_is_put_aside_in_the_middle_of_a_sweep_is_passed_over(
    dataset: Dataset, milvus: Target
) -> None:
    log = ShardLog(dataset)
    log.shard(("z", "one"))
    log.shard(("a", "one"))
    milvus.before = [lambda: Dataset.open(dataset.url).put_aside(1)]
    assert (await milvus.load(dataset)).counts.shards_loaded == 1
    log.commit_admitted(1)
    await milvus.load(dataset)
    assert (await milvus.report(dataset)).ok


@pytest.mark.parametrize("is_killed", [False, True], ids=["running", "killed"])
@pytest.mark.parametrize("stays", [False, True], ids=["alone", "with others"])
async def test_rows_that_were_purged_while_they_were_on_their_way_are_taken_back(
    dataset: Dataset, milvus: Target, is_killed: bool, stays: bool
) -> None:
    rows = [("s", "secret"), *([("a", "one")] if stays else [])]
    log = ShardLog(dataset)
    log.shard(*rows)

    def purge_everywhere() -> None:
        purge(dataset, "s")
        milvus.purged = ["s"]

    def die() -> None:
        raise Killed

    milvus.before = [purge_everywhere]
    if is_killed:
        milvus.after = [die]
        with pytest.raises(Killed):
            await milvus.load(dataset)
    await milvus.load(dataset)
    assert await milvus.ids(dataset) == (["a"] if stays else [])
    assert (await milvus.report(dataset)).ok


async def test_what_was_embedded_anew_before_it_was_compacted_is_sent(dataset: Dataset, milvus: Target) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"), ("b", "!not yet"))
    log.shard(("c", "one"))
    await milvus.load(dataset)
    dataset.put_aside(0)
    table, origin = dataset.documents(0)
    rows = [{name: value for name, value in row.items() if name != "job"} for row in table.to_pylist()]
    log.commit(0, [Passage(**{**row, "text": row["text"].strip("!")}) for row in rows], origin)
    compact(Dataset.open(dataset.url), grace_s=0)
    await milvus.load(dataset)
    report = await milvus.report(dataset)
    assert (report.ok, report.expected) == (True, 3), report.as_dict()


async def test_verification_sees_one_side_of_a_switch(
    dataset: Dataset, milvus: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    log.shard(("b", "one"), ("a", "two"))
    await milvus.load(dataset)
    newest_rows = DatasetIndex.newest_rows

    def compacted_before_it_is_read(index: DatasetIndex) -> object:
        monkeypatch.setattr(DatasetIndex, "newest_rows", newest_rows)
        assert compact(Dataset.open(dataset.url), grace_s=0).written == 1
        return newest_rows(index)

    monkeypatch.setattr(DatasetIndex, "newest_rows", compacted_before_it_is_read)
    async with open_target(str(milvus.path)) as target:
        report = await verify_target(Dataset.open(dataset.url), target)
    assert (report.ok, report.expected) == (True, 2), report.as_dict()


async def test_verification_goes_on_when_vectors_are_deleted_under_it(
    dataset: Dataset, milvus: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ShardLog(dataset)
    log.shard(("a", "one"))
    log.shard(("b", "one"))
    await milvus.load(dataset)

    async with open_target(str(milvus.path)) as target:
        vectors = target.vectors

        async def compacted(ids: Sequence[str]) -> object:
            monkeypatch.setattr(target, "vectors", vectors)
            assert compact(Dataset.open(dataset.url), grace_s=0).deleted == 2
            return await vectors(ids)

        monkeypatch.setattr(target, "vectors", compacted)
        report = await verify_target(Dataset.open(dataset.url), target)
    assert (report.ok, report.expected, report.sampled) == (True, 2, 2), report.as_dict()
