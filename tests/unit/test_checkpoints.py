"""Checkpoints: what a dead attempt kept is taken over, what is damaged is passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import EMBEDDED, FAILED, Failure, checkpoints_folder
from embedmill.errors import ConfigurationError, CorruptStore
from tests.datasets import small_dataset
from worker.checkpoints import Checkpoint, decode_increment, encode_increment
from worker.results import Increment, ShardResults


def increment(*rows: int, value: float = 1.0, failures: tuple[int, ...] = ()) -> Increment:
    return Increment(
        rows=np.array(rows, np.int32),
        vectors=np.full((len(rows), 3), value, np.float32),
        failures=tuple(Failure(row, f"ü{row}", 2, "gate", "the vector is zero") for row in failures),
        truncated=rows[:1],
        billed_tokens=11,
        requests=2,
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d")


def paths(dataset: Dataset, shard: int = 0) -> list[Path]:
    return sorted((Path(dataset.url) / checkpoints_folder(shard)).glob("*"))


@given(rows=st.lists(st.integers(0, 4095), max_size=9), dimensions=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_increment_comes_back_bit_for_bit(rows: list[int], dimensions: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((len(rows), dimensions)).astype(np.float32)
    went = Increment(np.array(rows, np.int32), vectors, (Failure(1, "ü", 2, "c", "w"),), (3,), 5, 6)
    back = decode_increment(encode_increment(went, fingerprint="f"), fingerprint="f", name="c")
    np.testing.assert_array_equal(back.rows, went.rows)
    np.testing.assert_array_equal(back.vectors, went.vectors)
    assert (back.rows.dtype.name, back.vectors.dtype.name) == ("int32", "float32")
    assert (back.failures, back.truncated, back.billed_tokens, back.requests) == (went.failures, (3,), 5, 6)


def test_every_flipped_byte_and_every_truncation_is_found() -> None:
    data = encode_increment(increment(1, 2, failures=(3,)), fingerprint="f")
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x40
        for damaged in (bytes(flipped), data[:position]):
            with pytest.raises(CorruptStore, match="c/1 is not a whole checkpoint"):
                decode_increment(damaged, fingerprint="f", name="c/1")


def test_vectors_of_another_embedder_are_refused() -> None:
    with pytest.raises(CorruptStore, match="c/1 holds vectors of another embedder"):
        decode_increment(encode_increment(increment(1), fingerprint="f"), fingerprint="g", name="c/1")


def test_a_newer_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.checkpoints.FORMAT_VERSION", 2)
    data = encode_increment(increment(1), fingerprint="f")
    with pytest.raises(ConfigurationError, match=r"c/1 has format version 2.*upgrade"):
        decode_increment(data, fingerprint="f", name="c/1")


def test_the_next_attempt_takes_over_what_all_earlier_ones_kept(dataset: Dataset) -> None:
    first, second = Checkpoint(dataset, 0, attempt="a"), Checkpoint(dataset, 0, attempt="b")
    first.keep(increment(0, 1, value=1))
    first.keep(increment(2, value=2, failures=(5,)))
    second.keep(increment(1, 3, value=3))
    assert [path.name for path in paths(dataset)] == ["a-00001", "a-00002", "b-00001"]
    results = ShardResults(6, 3)
    assert Checkpoint(dataset, 0, attempt="c").adopt(results) == 4
    assert results.statuses.tolist() == [EMBEDDED] * 4 + [0, FAILED]
    assert results.vectors[:4, 0].tolist() == [1, 1, 2, 3]
    assert results.failures[5].id == "ü5"
    assert results.billed_tokens == 33
    assert results.take_unkept().empty


@pytest.mark.parametrize("damage", [b"", b"EMC1", b"EMC1\xff\xff\xff\xff garbage", None])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_its_rows_stay_owed(
    dataset: Dataset, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint(dataset, 0, attempt="a")
    checkpoint.keep(increment(0, 1))
    checkpoint.keep(increment(2, 3))
    broken, _ = paths(dataset)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    results = ShardResults(4, 3)
    with caplog.at_level(logging.WARNING, "embedmill.worker.checkpoints"):
        assert Checkpoint(dataset, 0, attempt="b").adopt(results) == 2
    assert results.owed() == [0, 1]
    (message,) = caplog.messages
    assert "checkpoints/00000000/a-00001 is not a whole checkpoint" in message


def test_checkpoints_belong_to_their_shard(dataset: Dataset) -> None:
    Checkpoint(dataset, 1, attempt="a").keep(increment(0))
    assert Checkpoint(dataset, 0, attempt="b").adopt(ShardResults(4, 3)) == 0


def test_sweeping_removes_all_of_a_shard_and_can_be_repeated(dataset: Dataset) -> None:
    Checkpoint(dataset, 0, attempt="a").keep(increment(0))
    Checkpoint(dataset, 1, attempt="a").keep(increment(0))
    for _ in range(2):
        Checkpoint(dataset, 0, attempt="b").sweep()
    assert paths(dataset) == []
    assert not (Path(dataset.url) / checkpoints_folder(0)).exists()
    assert len(paths(dataset, 1)) == 1
