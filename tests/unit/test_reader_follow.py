"""Following a dataset while it grows and is compacted: every row that counts once, every deletion told."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from embedmill import open_dataset
from embedmill.dataset.blocks import Block
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.following import Follower
from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED
from embedmill.dataset.snapshot import Snapshot
from embedmill.errors import CorruptStore, SnapshotOutdated
from tests.committed import Made, Row, made_dataset, newest_rows

Told = tuple[int, list[str], tuple[str, ...]]
"""(shard, ids, deleted ids)."""


def follower_of(made: Made, seen: Snapshot | None = None) -> Follower:
    return Follower(Dataset.open(made.url), ("id", "text"), seen)


def told(blocks: object) -> list[Told]:
    return [(block.shard, block.ids, block.deleted) for block in blocks]  # type: ignore[attr-defined]


def test_shards_come_as_they_are_committed_in_any_order(made: Made) -> None:
    made.add("ab", commit=False)
    made.add("cd")
    follower = follower_of(made)
    assert told(follower.look()) == [(1, ["c", "d"], ())]
    assert told(follower.look()) == []
    made.commit(0)
    made.add("e")
    assert told(follower.look()) == [(0, ["a", "b"], ()), (2, ["e"], ())]


def test_rows_that_a_higher_version_overrules_are_left_out_although_they_are_committed_later(made: Made) -> None:
    made.add("ab", commit=False)
    made.add([Row("a", 2)])
    follower = follower_of(made)
    assert told(follower.look()) == [(1, ["a"], ())]
    made.commit(0)
    assert told(follower.look()) == [(0, ["b"], ())]


def test_deletions_are_told_unless_the_id_is_back(made: Made) -> None:
    made.add("abc")
    follower = follower_of(made)
    list(follower.look())
    made.add([Row("a", 2, DELETED), Row("b", 2, DELETED), Row("c", 2, FAILED)])
    made.add([Row("b", 3)])
    assert told(follower.look()) == [(1, [], ("a",)), (2, ["b"], ())]


def test_a_failure_that_is_tried_again_comes_when_it_goes_well(made: Made) -> None:
    made.add([Row("a"), Row("b", 1, FAILED)])
    follower = follower_of(made)
    assert told(follower.look()) == [(0, ["a"], ())]
    made.add("b")
    assert told(follower.look()) == [(1, ["b"], ())]


def test_of_a_replacement_only_rows_come_that_have_not_come(made: Made) -> None:
    made.add("ab")
    follower = follower_of(made)
    list(follower.look())
    made.add("cd")
    made.replace([0, 1], [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert told(follower.look()) == [(2, ["c", "d"], ())]
    made.replace([2], [(2, 1), (2, 2)])
    assert told(follower.look()) == []


def test_rows_that_moved_twice_between_two_looks_do_not_come_again(made: Made) -> None:
    made.add("ab")
    follower = follower_of(made)
    list(follower.look())
    made.add("c")
    made.replace([0], [(0, 0), (0, 1)])
    made.replace([1, 2], [(2, 1), (1, 0), (2, 0)])
    assert told(follower.look()) == [(3, ["c"], ())]


def test_a_deletion_that_came_and_was_compacted_away_between_two_looks_is_told(made: Made) -> None:
    made.add("ab")
    follower = follower_of(made)
    list(follower.look())
    made.add([Row("a", 2, DELETED)])
    made.replace([0, 1], [(0, 1)])
    assert told(follower.look()) == [(1, [], ("a",))]
    assert told(follower.look()) == []


def test_what_was_erased_before_it_could_be_told_ends_the_following(made: Made) -> None:
    made.add("ab")
    follower = follower_of(made)
    list(follower.look())
    made.add([Row("a", 2, DELETED)])
    made.replace([0, 1], [(0, 1)])
    made.erase(1)
    with pytest.raises(SnapshotOutdated, match=r"shard 1 .* follow from the start again"):
        list(follower.look())
    assert told(follower_of(made).look()) == [(2, ["b"], ())]


def test_rows_that_moved_through_an_erased_shard_end_the_following(made: Made) -> None:
    made.add("ab")
    follower = follower_of(made)
    list(follower.look())
    made.replace([0], [(0, 0), (0, 1)])
    made.replace([1], [(1, 0), (1, 1)])
    made.erase(1)
    with pytest.raises(SnapshotOutdated, match=r"shard 1 .* moved"):
        list(follower.look())


def test_a_shard_that_is_replaced_and_erased_while_it_is_read_comes_as_its_replacement(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.add("ab")
    made.add("cd")
    blocks = open_dataset(made.url).follow(until=lambda: True)
    first = next(blocks)
    made.replace([1], [(1, 0), (1, 1)])
    made.erase(1)
    assert told([first, *blocks]) == [(0, ["a", "b"], ()), (2, ["c", "d"], ())]


def test_damage_ends_the_following(made: Made) -> None:
    made.add("ab")
    (Path(made.url) / "vectors.zarr/vectors/c/0/0").write_bytes(b"")
    with pytest.raises(CorruptStore, match="c/0/0 is cut short"):
        list(open_dataset(made.url).follow(until=lambda: True))


def test_following_goes_on_behind_a_snapshot(made: Made) -> None:
    made.add("ab")
    reader = open_dataset(made.url)
    made.add([Row("c"), Row("a", 2)])
    assert told(reader.follow(until=lambda: True, from_start=False)) == [(1, ["c", "a"], ())]
    assert told(reader.follow(until=lambda: True)) == [(0, ["b"], ()), (1, ["c", "a"], ())]
    assert list(reader.ids) == ["a", "b"]


def test_an_event_ends_the_following_after_one_more_look(made: Made) -> None:
    stop = threading.Event()
    made.add("ab")
    found: list[Block] = []

    def follow() -> None:
        for block in open_dataset(made.url).follow(("text",), poll_s=0.01, until=stop):
            found.append(block)
            arrived.set()

    arrived = threading.Event()
    thread = threading.Thread(target=follow)
    thread.start()
    assert arrived.wait(20)
    arrived.clear()
    made.add("c")
    assert arrived.wait(20)
    made.add("d", commit=False)
    made.commit(2)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert told(found) == [(0, ["a", "b"], ()), (1, ["c"], ()), (2, ["d"], ())]
    assert found[1].documents["text"].to_pylist() == ["c v1"]


class GrowingDataset(RuleBasedStateMachine):
    """Admitted, committed, compacted and erased at random. After each look, the follower holds what counts."""

    @initialize()
    def create(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="follow-"))
        self.made = made_dataset(self.folder / "d")
        self.versions: dict[str, int] = {}
        self.committed: set[int] = set()
        self.retired: set[int] = set()
        self.erasable: set[int] = set()
        self.given: set[str] = set()
        self.held: dict[str, int] = {}
        self.follower = follower_of(self.made)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def live(self) -> list[int]:
        return sorted(self.committed - self.retired)

    @rule(
        ids=st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True),
        statuses=st.lists(st.sampled_from([EMBEDDED, EMBEDDED, DELETED, FAILED, CANCELLED]), min_size=3, max_size=3),
        commit=st.booleans(),
    )
    def admit(self, ids: list[str], statuses: list[int], commit: bool) -> None:
        rows = []
        for id_, status in zip(ids, statuses, strict=False):
            self.versions[id_] = self.versions.get(id_, 0) + 1
            rows.append(Row(id_, self.versions[id_], status))
        shard = self.made.add(rows, commit=commit)
        if commit:
            self.committed.add(shard)

    @precondition(lambda self: len(self.committed) < len(self.made.log))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(set(range(len(self.made.log))) - self.committed)))
        self.made.commit(shard)
        self.committed.add(shard)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        shards = data.draw(st.lists(st.sampled_from(self.live), min_size=1, max_size=3, unique=True))
        log, left = self.made.log, set(range(len(self.made.log))) - self.retired - set(shards)
        counting = {(shard, place) for shard, place, _ in newest_rows(log, self.live)}
        kept = [
            (shard, place)
            for shard in shards
            for place, row in enumerate(log[shard])
            if (shard, place) in counting
            or row.status == FAILED
            or (
                row.status == DELETED
                and any(old.id == row.id and old.version < row.version for other in left for old in log[other])
            )
        ]
        if len(kept) > 8:
            return
        if kept:
            self.committed.add(self.made.replace(shards, kept))
        else:
            self.made.retire(shards, [])
        self.retired.update(shards)

    @precondition(lambda self: self.erasable)
    @rule(data=st.data())
    def erase(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.erasable)))
        self.erasable.discard(shard)
        self.made.erase(shard)

    @rule()
    def begin_behind_a_snapshot(self) -> None:
        reader = open_dataset(self.made.url)
        self.held = {
            text.rpartition(" v")[0]: int(text.rpartition(" v")[2])
            for block in reader.blocks(("text",))
            for text in block.documents["text"].to_pylist()
        }
        self.given = {f"{id_} v{version}" for id_, version in self.held.items()}
        self.follower = follower_of(self.made, reader._snapshot)

    @rule()
    def look(self) -> None:
        counting = {row.text for _, _, row in newest_rows(self.made.log, self.live)}
        for block in self.follower.look():
            for text in block.documents["text"].to_pylist():
                assert text not in self.given
                assert text in counting
                self.given.add(text)
                id_, _, version = text.rpartition(" v")
                self.held[id_] = int(version)
            for id_ in block.deleted:
                self.held.pop(id_, None)
        assert self.held == {row.id: row.version for _, _, row in newest_rows(self.made.log, self.live)}
        self.erasable = {shard for shard in self.retired if self.made.dataset.store.exists(f"commits/{shard:08d}.json")}


TestGrowingDataset = GrowingDataset.TestCase
TestGrowingDataset.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
