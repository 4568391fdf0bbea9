"""What a loader sends of a shard, whatever order shards come in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.deciding import Place, newest_decided
from embedmill.dataset.layout import CANCELLED, DELETED, EMBEDDED, FAILED, OWED
from loader.rows import MAX_TEXT_BYTES, cut_text, parse_metadata, plan_shard

Row = tuple[str, int, int]
"""(id, version, status)."""


def places_of(shards: list[list[Row]]) -> dict[str, list[Place]]:
    """As the index answers: the last place of each (id, version), highest version first."""
    last: dict[tuple[str, int], Place] = {}
    for shard, rows in enumerate(shards):
        for row, (id_, version, _) in enumerate(rows):
            last[id_, version] = (version, shard, row)
    known: dict[str, list[Place]] = {}
    for (id_, _), place in sorted(last.items(), key=lambda item: -item[1][0]):
        known.setdefault(id_, []).append(place)
    return known


def apply(target: dict[str, int], shards: list[list[Row]], shard: int, committed: set[int]) -> None:
    rows = shards[shard]
    plan = plan_shard(
        shard,
        ids=[row[0] for row in rows],
        versions=[row[1] for row in rows],
        statuses=np.array([row[2] for row in rows], dtype=np.uint8),
        known=places_of(shards),
        status_of=lambda other, row: shards[other][row][2] if other in committed else None,
    )
    assert len(plan.upsert) + len(plan.delete) + plan.superseded + plan.skipped == len(rows)
    assert len({rows[row][0] for row in plan.upsert} | set(plan.delete)) == len(plan.upsert) + len(plan.delete)
    for row in plan.upsert:
        target[rows[row][0]] = rows[row][1]
    for id_ in plan.delete:
        target.pop(id_, None)


@st.composite
def logs(draw: st.DrawFn) -> list[list[Row]]:
    """Shards of a log in which every (id, version) stands once, versions of an id in any order over the shards."""
    pairs = draw(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 6)), unique=True, max_size=16))
    statuses = st.sampled_from([EMBEDDED, EMBEDDED, DELETED, FAILED, CANCELLED, OWED])
    rows = [(id_, version, draw(statuses)) for id_, version in pairs]
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), min_size=1, max_size=4)))
    return [rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


def expected(shards: list[list[Row]], committed: set[int]) -> dict[str, int]:
    decided = [row for shard in committed for row in shards[shard] if row[2] in (EMBEDDED, DELETED)]
    newest = {id_: max(row for row in decided if row[0] == id_) for id_ in {row[0] for row in decided}}
    return {id_: version for id_, (_, version, status) in newest.items() if status == EMBEDDED}


@settings(max_examples=300, deadline=None)
@given(logs(), st.data())
def test_in_whatever_order_shards_are_committed_and_loaded_the_newest_decided_versions_remain(
    shards: list[list[Row]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shards))))
    waiting = list(order)
    committed: set[int] = set()
    applied: set[int] = set()
    target: dict[str, int] = {}
    while len(applied) < len(shards):
        loadable = sorted(committed - applied)
        if waiting and (not loadable or data.draw(st.booleans())):
            committed.add(waiting.pop())
            continue
        shard = data.draw(st.sampled_from(loadable))
        apply(target, shards, shard, committed)
        applied.add(shard)
    assert target == expected(shards, committed)


@settings(max_examples=100, deadline=None)
@given(logs(), st.data())
def test_applying_shards_again_when_all_are_loaded_changes_nothing(
    shards: list[list[Row]], data: st.DataObject
) -> None:
    committed = set(range(len(shards)))
    target: dict[str, int] = {}
    for shard in sorted(committed):
        apply(target, shards, shard, committed)
    before = dict(target)
    for shard in data.draw(st.lists(st.sampled_from(sorted(committed)))):
        apply(target, shards, shard, committed)
    assert target == before


def test_of_one_id_twice_in_a_shard_the_highest_version_is_sent() -> None:
    target: dict[str, int] = {}
    apply(target, [[("a", 2, EMBEDDED), ("a", 1, EMBEDDED), ("a", 3, FAILED)]], 0, {0})
    assert target == {"a": 2}


def test_a_plan_names_the_shards_that_overrule_it() -> None:
    plan = plan_shard(
        0,
        ids=["a", "b"],
        versions=[1, 1],
        statuses=np.array([EMBEDDED, EMBEDDED], dtype=np.uint8),
        known={"a": [(2, 7, 0), (1, 0, 0)], "b": [(2, 8, 0), (1, 0, 1)]},
        status_of=lambda shard, _row: DELETED if shard == 7 else FAILED,
    )
    assert (list(plan.upsert), plan.superseded, set(plan.superseding)) == ([1], 1, {7})


def test_newest_decided_passes_over_failed_and_uncommitted_versions() -> None:
    statuses = {(1, 0): EMBEDDED, (2, 0): FAILED}
    places = [(1, 1, 0), (2, 2, 0), (3, 3, 0)]
    assert newest_decided(places, lambda shard, row: statuses.get((shard, row))) == (1, 1, 0)
    assert newest_decided([], lambda _shard, _row: None) is None


@pytest.mark.parametrize("character", ["a", "é", "あ", "🌾"])
def test_a_long_text_is_cut_between_characters_and_to_as_many_as_fit(character: str) -> None:
    width = len(character.encode())
    text, cut = cut_text(character * MAX_TEXT_BYTES)
    assert cut == (width > 1)
    assert text == character * (MAX_TEXT_BYTES // width)


def test_a_text_of_exactly_the_limit_stays_whole() -> None:
    text = "x" * MAX_TEXT_BYTES
    assert cut_text(text) == (text, False)
    assert cut_text(text + "y") == (text, True)


def test_metadata_that_milvus_does_not_take_is_left_out_and_said() -> None:
    assert parse_metadata('{"a":[1,"ü"]}') == ({"a": [1, "ü"]}, False)
    assert parse_metadata(None) == ({}, False)
    assert parse_metadata(json.dumps({"a": "x" * 70_000})) == ({}, True)
