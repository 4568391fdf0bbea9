"""The records of a dataset: what they say, what they refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.dataset import layout
from embedmill.dataset.layout import (
    STATUSES,
    DatasetInfo,
    Failure,
    Job,
    Marker,
    Retirement,
    StoredObject,
    numbers,
    run_lengths,
)
from embedmill.embedder import EmbedderSpec
from embedmill.errors import ConfigurationError, CorruptStore, EmbedmillError

INFO = DatasetInfo(
    "d0", "2026-01-01", EmbedderSpec("jina/x", 3, "r1", 8192, {"task": "retrieval.passage", "late": False}), "float16"
)
MARKER = Marker(
    shard=7,
    statuses=np.array([1, 1, 2, 3, 4, 1], dtype=np.uint8),
    fingerprint="f" * 32,
    attempt="a",
    worker="w",
    committed_at="2026-01-01",
    billed_tokens=12,
    requests=3,
    failures=(Failure(2, "zwei", 1, "gate", "NaN — über"),),
    truncated=(1,),
    replaces=(3, 4),
    objects={"documents/00000007.parquet": StoredObject(10, "0000abcd")},
)
JOB = Job("main", "live", "paused", "no balance", ("a.jsonl", "b.jsonl"), {"tokens": 10}, "2026-01-01")
RETIREMENT = Retirement((1, 2), (7,), "compaction", "2026-01-01")
DECODERS: dict[str, tuple[bytes, Callable[..., Any]]] = {
    "dataset.json": (INFO.to_bytes(), DatasetInfo.from_bytes),
    "marker": (MARKER.to_bytes(), Marker.from_bytes),
    "job": (JOB.to_bytes(), Job.from_bytes),
    "retirement": (RETIREMENT.to_bytes(), Retirement.from_bytes),
}
every_record = pytest.mark.parametrize(("data", "decode"), DECODERS.values(), ids=DECODERS.keys())


def test_a_dataset_record_comes_back_as_it_went() -> None:
    assert DatasetInfo.from_bytes(INFO.to_bytes(), name="dataset.json") == INFO


def test_a_marker_comes_back_as_it_went() -> None:
    back = Marker.from_bytes(MARKER.to_bytes(), name="marker")
    np.testing.assert_array_equal(back.statuses, MARKER.statuses)
    for field in dataclasses.fields(Marker):
        if field.name != "statuses":
            assert getattr(back, field.name) == getattr(MARKER, field.name), field.name
    assert [back.count(status) for status in range(len(STATUSES))] == [0, 3, 1, 1, 1]


def test_jobs_and_retirements_come_back_as_they_went() -> None:
    assert Job.from_bytes(JOB.to_bytes(), name="job") == JOB
    assert Retirement.from_bytes(RETIREMENT.to_bytes(), name="retirement") == RETIREMENT


@every_record
def test_a_record_of_a_newer_format_is_refused_with_what_to_do(data: bytes, decode: Callable[..., Any]) -> None:
    newer = json.dumps({**json.loads(data), "format_version": 2}).encode()
    with pytest.raises(ConfigurationError) as caught:
        decode(newer, name="wiki/x.json")
    expected = "wiki/x.json has format version 2, and this embedmill reads up to 1: upgrade embedmill"
    assert str(caught.value) == expected


@every_record
def test_a_record_with_a_field_missing_is_named_and_never_a_traceback(data: bytes, decode: Callable[..., Any]) -> None:
    record = json.loads(data)
    optional = {"dimensions"} if "embedder" in record else set()
    job_fields = {"lane", "state", "reason", "caps", "created_at", "stopped_by", "too_long", "mode"}
    optional |= job_fields if "caps" in record else set()
    optional |= {"retries", "windows", "replaced"} if "statuses" in record else set()
    for field in record.keys() - optional:
        less = {key: value for key, value in record.items() if key != field}
        with pytest.raises(EmbedmillError, match=r"x\.json"):
            decode(json.dumps(less).encode(), name="x.json")


@every_record
def test_a_record_with_a_field_of_another_kind_is_named_or_read(data: bytes, decode: Callable[..., Any]) -> None:
    record = json.loads(data)
    refusals = []
    for field in record:
        for value in (None, [], [None], {}, {"a": 1}, "text", -1):
            try:
                decode(json.dumps({**record, field: value}).encode(), name="x.json")
            except EmbedmillError as error:
                refusals.append(str(error))
    assert refusals
    assert all("x.json" in refusal for refusal in refusals)


@every_record
@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_garbage_is_named(data: bytes, decode: Callable[..., Any], garbage: bytes) -> None:
    with pytest.raises(CorruptStore, match=r"x\.json"):
        decode(garbage, name="x.json")


def test_an_edited_embedder_is_detected() -> None:
    record = json.loads(INFO.to_bytes())
    record["embedder"]["revision"] = "r2"
    with pytest.raises(CorruptStore, match=r"x\.json was edited: its fingerprint"):
        DatasetInfo.from_bytes(json.dumps(record).encode(), name="x.json")


def test_another_kind_of_file_is_no_dataset() -> None:
    with pytest.raises(ConfigurationError, match="does not describe an embedmill dataset"):
        DatasetInfo.from_bytes(b'{"name": "package"}', name="x.json")


def test_a_marker_that_contradicts_itself_is_refused() -> None:
    record = json.loads(MARKER.to_bytes())
    record["rows"] = 5
    with pytest.raises(CorruptStore, match="says 5 rows and gives the status of 6"):
        Marker.from_bytes(json.dumps(record).encode(), name="x.json")
    record["statuses"] = [["lost", 5]]
    with pytest.raises(CorruptStore, match=r"x\.json is incomplete"):
        Marker.from_bytes(json.dumps(record).encode(), name="x.json")


@pytest.mark.parametrize(
    "job", ["../../evil", "a/b", "", ".", "..", ".hidden", "j" * 101, "a\0b", "a b", "\udcff", "main\n"]
)
def test_what_is_no_jobs_name_has_no_key(job: str) -> None:
    with pytest.raises(ConfigurationError, match="is no job's name") as refused:
        layout.job_key(job)
    str(refused.value).encode()


def test_jobs_are_found_among_files_that_are_none() -> None:
    names = ["main.json", "news-2.json", ".DS_Store", "main.json~", "main (copy).json", ".main.json", ".json"]
    assert layout.job_names(names) == ["main", "news-2"]
    assert [layout.job_key(job) for job in ("main", "a.b")] == ["jobs/main.json", "jobs/a.b.json"]


@given(st.lists(st.integers(0, len(STATUSES) - 1)))
def test_run_lengths_are_those_of_groupby_and_expand_again(codes: list[int]) -> None:
    statuses = np.array(codes, dtype=np.uint8)
    assert run_lengths(statuses) == [(code, len(list(run))) for code, run in groupby(codes)]
    marker = dataclasses.replace(MARKER, statuses=statuses)
    assert Marker.from_bytes(marker.to_bytes(), name="marker").statuses.tolist() == codes


@given(st.permutations(list(INFO.embedder.options.items())))
def test_a_fingerprint_does_not_depend_on_the_order_of_options(
    options: list[tuple[str, str | int | bool | None]],
) -> None:
    assert dataclasses.replace(INFO.embedder, options=dict(options)).fingerprint == INFO.embedder.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"model": "jina/y"}, {"dimensions": 4}, {"revision": ""}, {"max_input_tokens": 1}, {"options": {"late": True}}],
)
def test_a_fingerprint_depends_on_every_field(change: dict[str, Any]) -> None:
    assert dataclasses.replace(INFO.embedder, **change).fingerprint != INFO.embedder.fingerprint


def test_shard_numbers_are_read_from_names_and_foreign_names_passed_over() -> None:
    names = ["00000000.json", "00000012.json", "notes.json", "00000003.json.bak", ".json", "²³.json", "x"]
    assert numbers(names, suffix=".json") == [0, 12]
    assert numbers([layout.commit_key(42).rpartition("/")[2]], suffix=".json") == [42]
