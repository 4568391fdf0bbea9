"""Exports: what counts and nothing else, bit for bit, in formats that others read; whole or not there."""

from __future__ import annotations

import fcntl
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import duckdb
import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from faiss.contrib.vecs_io import fvecs_mmap

from embedmill import failpoints, open_dataset
from embedmill.dataset import exporting
from embedmill.dataset.exporting import Choice, Exported, Format, export
from embedmill.dataset.layout import CANCELLED, DELETED, FAILED
from embedmill.errors import ConfigurationError, CorruptStore, SnapshotOutdated, StorageError
from tests.committed import Made, Row, made_dataset

FORMATS: list[Format] = ["npy", "parquet", "fvecs", "faiss"]


def ignore(_rows: int) -> None:
    return


def write(made: Made, target: Path, format_: Format, *, overwrite: bool = False, **choice: Any) -> Exported:
    reader = open_dataset(made.url)
    return export(reader, target, Choice(format_, **choice), overwrite=overwrite, progress=ignore)


def fill(made: Made) -> Made:
    """a to h, of which b was changed, c deleted, d failed to change, e was cancelled at first; and a shard that is owed."""
    made.add("abcd")
    made.add([Row("b", 2), Row("c", 2, DELETED), Row("d", 2, FAILED), Row("e", 1, CANCELLED), Row("e", 2)])
    made.add([Row("x", 1, FAILED)])
    made.add("fgh")
    made.add("uvwz", commit=False)
    return made


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return fill(made_dataset(tmp_path / "d"))


IDS = ["a", "d", "b", "e", "f", "g", "h"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_back(folder: Path, format_: Format) -> tuple[np.ndarray, list[str]]:
    """The vectors and their ids, as the tool of the format reads them."""
    if format_ == "parquet":
        table = pq.read_table(folder)
        vectors = table["vector"].combine_chunks()
        width = vectors.type.list_size
        return vectors.flatten().to_numpy().reshape(-1, width), table["id"].to_pylist()
    ids = (folder / "ids.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if format_ == "npy":
        return np.load(folder / "vectors.npy"), ids
    if format_ == "fvecs":
        return np.array(fvecs_mmap(str(folder / "vectors.fvecs"))), ids
    index = faiss.read_index(str(folder / "index.faiss"))
    return index.reconstruct_n(0, index.ntotal), ids


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_an_export_equals_what_the_reader_gives_bit_for_bit(tmp_path: Path, format_: Format, stored: str) -> None:
    made = fill(made_dataset(tmp_path / "d", dtype=stored))
    reader = open_dataset(made.url)
    report = write(made, tmp_path / "out", format_)
    vectors, ids = read_back(tmp_path / "out", format_)
    expected = reader.to_numpy()
    wide = format_ in ("fvecs", "faiss")
    assert vectors.dtype == ("float32" if wide else stored) == report.dtype
    assert vectors.astype(stored).tobytes() == expected.tobytes()
    np.testing.assert_array_equal(vectors, expected)
    assert ids == list(reader.ids) == IDS
    assert (report.rows, report.dimensions) == (7, 3)
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report.bytes == sum(report.files.values())


def test_the_flat_index_is_byte_for_byte_what_faiss_writes(made: Made, tmp_path: Path) -> None:
    vectors = open_dataset(made.url).to_numpy()
    for metric, kind in (("ip", faiss.IndexFlatIP), ("l2", faiss.IndexFlatL2)):
        write(made, tmp_path / metric, "faiss", metric=metric)
        index = kind(3)
        index.add(vectors)
        faiss.write_index(index, str(tmp_path / "theirs"))
        assert (tmp_path / metric / "index.faiss").read_bytes() == (tmp_path / "theirs").read_bytes()
        mapped = faiss.read_index(str(tmp_path / metric / "index.faiss"), faiss.IO_FLAG_MMAP)
        np.testing.assert_array_equal(mapped.search(vectors, 3)[1], index.search(vectors, 3)[1])


def test_an_array_can_be_mapped_without_reading_it(made: Made, tmp_path: Path) -> None:
    write(made, tmp_path / "out", "npy")
    array = np.load(tmp_path / "out" / "vectors.npy", mmap_mode="r")
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, open_dataset(made.url).to_numpy())


def test_ids_that_are_no_plain_words_keep_their_line(tmp_path: Path) -> None:
    made = made_dataset(tmp_path / "d")
    ids = ["# a", " b ", "\u2028", "\x85", "ü,\"'", "\x7f"]
    made.add([Row(id_) for id_ in ids])
    write(made, tmp_path / "out", "npy")
    assert read_back(tmp_path / "out", "npy")[1] == ids


def test_parquet_has_the_columns_that_were_asked_for(made: Made, tmp_path: Path) -> None:
    write(made, tmp_path / "out", "parquet")
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["id", "text", "metadata", "vector"]
    assert table["text"].to_pylist()[:3] == ["a v1", "d v1", "b v2"]
    embedding = json.loads(table.schema.metadata[b"embedding"])
    assert (embedding["model"], embedding["fingerprint"]) == ("null/3", made.dataset.info.embedder.fingerprint)
    write(made, tmp_path / "few", "parquet", columns=("vector", "version", "id"))
    assert pq.read_table(tmp_path / "few").column_names == ["id", "version", "vector"]
    rows = duckdb.sql(f"SELECT id, version, vector[2] FROM '{tmp_path}/few/*.parquet' ORDER BY id").fetchall()
    assert rows[:2] == [("a", 1, 1.0), ("b", 2, 2.0)]
    with pytest.raises(ConfigurationError, match="no column 'body'"):
        write(made, tmp_path / "none", "parquet", columns=("body",))
    with pytest.raises(ConfigurationError, match="--columns is for --format parquet"):
        write(made, tmp_path / "none", "npy", columns=("text",))
    assert not (tmp_path / "none").exists()


def test_many_rows_make_several_parquet_files_in_order(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(exporting, "_PARQUET_FILE_BYTES", 200)
    report = write(made, tmp_path / "out", "parquet")
    parts = [f"part-{number:05d}.parquet" for number in range(4)]
    assert [name for name in report.files if name.endswith(".parquet")] == parts
    assert [pq.read_metadata(tmp_path / "out" / part).num_rows for part in parts] == [2, 2, 2, 1]
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == IDS


@pytest.mark.parametrize("format_", ["npy", "parquet"])
def test_another_dtype_is_rounded_once(made: Made, tmp_path: Path, format_: Format) -> None:
    write(made, tmp_path / "half", format_, dtype="float16")
    vectors, _ = read_back(tmp_path / "half", format_)
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, open_dataset(made.url).to_numpy().astype(np.float16))


def test_a_number_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    made = made_dataset(tmp_path / "d")
    made.add([Row("a"), Row("b", 70_000)])
    with pytest.raises(ConfigurationError, match="a number too large for float16"):
        write(made, tmp_path / "out", "npy", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("format_", ["fvecs", "faiss"])
def test_formats_that_are_float32_take_no_other_dtype(made: Made, tmp_path: Path, format_: Format) -> None:
    with pytest.raises(ConfigurationError, match="leave --dtype float16 away"):
        write(made, tmp_path / "out", format_, dtype="float16")


@pytest.mark.parametrize("format_", FORMATS)
def test_a_dataset_without_rows_gives_files_without_rows(tmp_path: Path, format_: Format) -> None:
    made = made_dataset(tmp_path / "d")
    report = write(made, tmp_path / "out", format_)
    assert (report.rows, report.norms) == (0, None)
    if format_ != "fvecs":
        vectors, ids = read_back(tmp_path / "out", format_)
        assert vectors.shape == (0, 3)
        assert ids == []
    else:
        assert (tmp_path / "out" / "vectors.fvecs").read_bytes() == b""


def test_an_empty_folder_is_filled(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(made, tmp_path / "out", "npy")
    assert read_back(tmp_path / "out", "npy")[1] == IDS


def test_an_earlier_export_is_replaced_only_when_that_is_asked_for(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(made, out, "npy")
    before = contents(out)
    with pytest.raises(ConfigurationError, match="holds an export: name another folder, or add --overwrite"):
        write(made, out, "parquet")
    assert contents(out) == before
    write(made, out, "parquet", overwrite=True)
    assert sorted(contents(out)) == ["_export.json", "part-00000.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_replaced(made: Made, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    write(made, tmp_path / "mixed", "npy")
    (tmp_path / "mixed" / "notes.txt").write_text("dear")
    for name, says in (
        ("mine", "thesis.txt"),
        ("file", "is a file"),
        ("mixed", "notes.txt"),
        ("d", "inside of the dataset"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            write(made, tmp_path / name, "npy", overwrite=overwrite)
    with pytest.raises(ConfigurationError, match="inside of the dataset"):
        write(made, tmp_path / "d" / "exports" / "npy", "npy", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "dear"
    assert (tmp_path / "mixed" / "notes.txt").exists()


def test_a_name_that_means_a_file_is_refused(made: Made, tmp_path: Path) -> None:
    for name, comes in (("x.npy", "vectors.npy"), ("x.parquet", "part-00000.parquet"), ("x.faiss", "index.faiss")):
        with pytest.raises(ConfigurationError, match=f"name a folder, without .*; {comes} comes into it"):
            write(made, tmp_path / name, "npy")
    write(made, tmp_path / "wiki-v1.5", "npy")


@pytest.mark.parametrize("format_", FORMATS)
def test_an_export_that_fails_in_the_middle_leaves_nothing(made: Made, tmp_path: Path, format_: Format) -> None:
    vectors = Path(made.url, "vectors.zarr/vectors/c/3/0")
    damaged = bytearray(vectors.read_bytes())
    damaged[5] ^= 1
    vectors.write_bytes(damaged)
    with pytest.raises(CorruptStore, match="c/3/0"):
        write(made, tmp_path / "out", format_)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_failed_export_leaves_the_earlier_one_as_it_is(made: Made, tmp_path: Path) -> None:
    write(made, tmp_path / "out", "npy")
    before = contents(tmp_path / "out")
    failpoints.arm("export.before_rename=raise")
    try:
        with pytest.raises(RuntimeError, match="failpoint"):
            write(made, tmp_path / "out", "npy", overwrite=True)
    finally:
        failpoints.arm("")
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out"]


def test_two_exports_to_one_place_do_not_mix(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / ".out.tmp"
    folder.mkdir()
    with (folder / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="another process is exporting to"):
            write(made, tmp_path / "out", "npy")
        assert folder.exists()
    write(made, tmp_path / "out", "npy")
    assert sorted(contents(tmp_path / "out")) == ["_export.json", "ids.txt", "vectors.npy"]


def test_what_cannot_fit_is_refused_before_a_byte_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=7 * 3 * 4 - 1))
    with pytest.raises(StorageError, match="for its vectors alone, and its disk has"):
        write(made, tmp_path / "out", "npy")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_compaction_in_between_asks_for_the_same_command_again(made: Made, tmp_path: Path) -> None:
    reader = open_dataset(made.url)
    made.replace([3], [(3, 0), (3, 1), (3, 2)])
    made.erase(3)
    with pytest.raises(SnapshotOutdated, match=r"was compacted while it was exported.*run the same command again"):
        export(reader, tmp_path / "out", Choice("npy"), overwrite=False, progress=ignore)
    assert write(made, tmp_path / "out", "npy").rows == 7


@pytest.mark.parametrize("format_", FORMATS)
def test_memory_stays_with_a_few_shards_however_many_there_are(
    tmp_path: Path, format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_rows, dimensions, shards = 64, 1024, 24
    made = made_dataset(tmp_path / "d", shard_rows=shard_rows, chunk_rows=64, dimensions=dimensions)
    for shard in range(shards):
        made.add([Row(f"{shard}-{row}") for row in range(shard_rows)])
    monkeypatch.setattr(exporting, "_ROW_GROUP_ROWS", shard_rows)
    write(made, tmp_path / "first", format_)
    tracemalloc.start()
    try:
        write(made, tmp_path / "out", format_)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * shard_rows * dimensions * 4 < shards * shard_rows * dimensions * 4 / 3
