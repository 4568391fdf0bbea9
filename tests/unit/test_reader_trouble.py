"""Reading where nothing may be written, what is no dataset, and what is damaged: named, and left as it is."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedmill import open_dataset
from embedmill.dataset import layout
from embedmill.dataset.passages import encode_passages
from embedmill.errors import ConfigurationError, CorruptStore
from tests.committed import Made


@pytest.fixture
def read_only(mixed: Made) -> Iterator[Made]:
    folders = [Path(mixed.url), *(path for path in Path(mixed.url).rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    yield mixed
    for folder in folders:
        folder.chmod(stat.S_IRWXU)


def everything_in(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [Path(folder), *Path(folder).rglob("*")]}


def test_reading_writes_nothing_and_works_where_nothing_can_be_written(read_only: Made) -> None:
    before = everything_in(read_only.url)
    reader = open_dataset(read_only.url)
    assert len(reader) == len(list(reader.ids)) == len(reader.to_numpy()) == 5
    assert reader[1]["address"] == 3
    assert [len(block) for block in reader.follow(until=lambda: True)] == [2, 2, 1]
    assert not reader.refresh()
    assert everything_in(read_only.url) == before


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a dataset: it has no dataset\.json"):
        open_dataset(tmp_path)
    with pytest.raises(ConfigurationError, match="is not a dataset"):
        open_dataset(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"format_version": 2}, "format version 2, .*upgrade", id="newer format"),
        pytest.param({"requires": ["holograms"]}, r"does not know \(holograms\)", id="unknown requirement"),
        pytest.param({"format": "other"}, "does not describe an embedmill dataset", id="another format"),
    ],
)
def test_a_dataset_that_needs_a_later_release_is_refused(made: Made, change: dict[str, object], says: str) -> None:
    path = Path(made.url) / layout.DATASET_KEY
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(ConfigurationError, match=says):
        open_dataset(made.url)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_of_the_vectors_is_found_however_they_are_read(mixed: Made) -> None:
    flip(Path(mixed.url) / layout.vectors_key(0), 5)
    reader = open_dataset(mixed.url)
    for read in (
        lambda: list(reader.blocks()),
        lambda: list(reader.batches(2)),
        reader.to_numpy,
        reader.to_arrow,
        lambda: reader[0],
        lambda: list(reader.follow(until=lambda: True)),
    ):
        with pytest.raises(CorruptStore, match=r"vectors\.zarr/vectors/c/0/0"):
            read()


def test_vectors_that_are_whole_and_not_those_of_the_marker_are_found(mixed: Made) -> None:
    path = Path(mixed.url) / layout.vectors_key(0)
    path.write_bytes((Path(mixed.url) / layout.vectors_key(1)).read_bytes())
    with pytest.raises(CorruptStore, match=r"c/0/0 is not what was committed"):
        list(open_dataset(mixed.url).blocks())


@pytest.mark.parametrize("key", [layout.vectors_key(0), layout.documents_key(0)])
def test_an_object_that_is_missing_is_named(mixed: Made, key: str) -> None:
    reader = open_dataset(mixed.url)
    (Path(mixed.url) / key).unlink()
    with pytest.raises(CorruptStore, match=f"{key} is missing"):
        list(reader.blocks())
    if key == layout.vectors_key(0):
        with pytest.raises(CorruptStore, match=f"{key} has no vector"):
            reader[0]


def test_documents_that_are_not_those_of_the_marker_are_found(mixed: Made) -> None:
    path = Path(mixed.url) / layout.documents_key(0)
    table, _ = mixed.dataset.documents(0)
    path.write_bytes(encode_passages(table.slice(0, 3)))
    with pytest.raises(CorruptStore, match=r"00000000\.parquet is not what was committed"):
        list(open_dataset(mixed.url).blocks())


def test_a_marker_that_is_damaged_is_named(mixed: Made) -> None:
    (Path(mixed.url) / layout.commit_key(1)).write_text("{")
    with pytest.raises(CorruptStore, match=r"00000001\.json is not JSON"):
        open_dataset(mixed.url)


def test_a_shard_without_a_marker_is_not_there(mixed: Made) -> None:
    (Path(mixed.url) / layout.commit_key(0)).unlink()
    assert list(open_dataset(mixed.url).ids) == ["b", "e", "f"]
