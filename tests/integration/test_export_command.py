"""`embedmill export` as a process: reports, one-line errors, and what is left when it is killed or the disk refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from embedmill import failpoints, open_dataset
from embedmill.commands.main import run
from embedmill.dataset.layout import DELETED, FAILED
from tests.committed import Made, Row, made_dataset
from tests.conftest import Command, Ended


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = made_dataset(tmp_path / "d", dimensions=32)
    made.add("abcd")
    made.add([Row("b", 2), Row("c", 2, DELETED), Row("d", 2, FAILED), Row("x", 1, FAILED)])
    made.add("efgh")
    made.add("uv", commit=False)
    return made


def refusal(ended: Ended, status: int) -> str:
    """The one line that it said."""
    assert ended.status == status, ended.output
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_says_what_it_wrote(embedmill: Command, made: Made, tmp_path: Path) -> None:
    ended = embedmill("export", "d", "--to", "new/out", "--format", "npy", "--json")
    assert ended.status == 0, ended.output
    record = ended.record
    out = tmp_path / "new" / "out"
    assert (record["dataset"], record["path"], record["format"]) == (made.url, str(out), "npy")
    assert (record["rows"], record["dimensions"], record["dtype"]) == (7, 32, "float32")
    assert (record["owed"], record["failed"]) == (2, 2)
    assert record["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert record["bytes"] == sum(record["files"].values())
    np.testing.assert_array_equal(np.load(out / "vectors.npy"), open_dataset(made.url).to_numpy())
    manifest = json.loads((out / "_export.json").read_bytes())
    assert (manifest["format"], manifest["rows"]) == ("embedmill-export", 7)
    assert manifest["fingerprint"] == made.dataset.info.embedder.fingerprint
    assert {file["name"]: file["bytes"] for file in manifest["files"]} == {
        name: size for name, size in record["files"].items() if name != "_export.json"
    }

    ended = embedmill("export", "d", "--to", "faiss", "--format", "faiss")
    assert ended.status == 0, ended.output
    assert f"{tmp_path / 'faiss'}: 7 rows of 32 x float32" in ended.stdout
    assert "not in it: 2 passages that are owed, 2 that failed" in ended.stdout
    assert "inner products of them are no cosines" in ended.stdout


def test_a_setting_for_datasets_is_not_taken_for_the_folder(embedmill: Command, made: Made, tmp_path: Path) -> None:
    (tmp_path / "embedmill.toml").write_text('to = "elsewhere"\n')
    ended = embedmill("export", made.url, "--format", "npy", environment={"EMBEDMILL_TO": "elsewhere"})
    assert ended.status == 2
    assert "Missing option '--to'" in ended.stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("format_", "plan"),
    [
        ("npy", "export.after_rows=crash@1"),
        ("fvecs", "export.after_rows=crash@2"),
        ("parquet", "export.after_rows=crash@1"),
        ("faiss", "export.before_rename=crash"),
    ],
)
def test_a_killed_export_leaves_nothing_that_looks_whole(
    embedmill: Command, made: Made, tmp_path: Path, format_: str, plan: str
) -> None:
    command = ("export", "d", "--to", "out", "--format", format_)
    assert embedmill(*command, environment={failpoints.VARIABLE: plan}).status == 137
    assert names(tmp_path) == [".out.tmp", "d"]
    ended = embedmill(*command, "--json")
    assert ended.status == 0, ended.output
    assert names(tmp_path) == ["d", "out"]
    assert names(tmp_path / "out") == sorted(ended.record["files"])


def test_a_replacement_that_is_killed_keeps_the_earlier_export_until_the_new_one_is_there(
    embedmill: Command, made: Made, tmp_path: Path
) -> None:
    assert embedmill("export", "d", "--to", "out", "--format", "npy").status == 0
    replace = ("export", "d", "--to", "out", "--format", "fvecs", "--overwrite")
    for point, left in (("before_rename", "out"), ("between_renames", ".out.old.tmp")):
        assert embedmill(*replace, environment={failpoints.VARIABLE: f"export.{point}=crash"}).status == 137
        assert "vectors.npy" in names(tmp_path / left)
        assert (tmp_path / "out").exists() == (left == "out")
    assert embedmill(*replace).status == 0
    assert names(tmp_path) == ["d", "out"]
    assert names(tmp_path / "out") == ["_export.json", "ids.txt", "vectors.fvecs"]


@pytest.mark.parametrize("format_", ["npy", "parquet"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    embedmill: Command, made: Made, tmp_path: Path, format_: str
) -> None:
    ended = embedmill("export", "d", "--to", "out", "--format", format_, largest_file_bytes=600)
    line = refusal(ended, 3)
    assert line.startswith(f"embedmill: cannot write {tmp_path / 'out'}: File too large; ")
    assert names(tmp_path) == ["d"]


def test_places_that_cannot_be_written_are_one_line(embedmill: Command, made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    export = ("export", "d", "--format", "npy", "--to")
    assert "cannot write /proc/out: " in refusal(embedmill(*export, "/proc/out"), 3)
    assert "cannot write" in refusal(embedmill(*export, "file/out"), 3)
    assert "file is a file: --to takes a folder" in refusal(embedmill(*export, "file"), 2)
    assert "exports go to a local folder" in refusal(embedmill(*export, "s3://bucket/x"), 2)
    assert "inside of the dataset" in refusal(embedmill(*export, "d/export"), 2)
    assert names(tmp_path) == ["d", "file"]


def test_what_cannot_be_exported_is_one_line(embedmill: Command, made: Made, tmp_path: Path) -> None:
    out = ("--to", "out", "--format", "npy")
    assert "is not a dataset" in refusal(embedmill("export", "nothing", *out), 2)
    assert "--metric is for --format faiss" in refusal(embedmill("export", "d", *out, "--metric", "l2"), 2)
    info = Path(made.url, "dataset.json")
    newer = json.loads(info.read_bytes()) | {"format_version": 2}
    info.write_text(json.dumps(newer))
    line = refusal(embedmill("export", "d", *out), 2)
    assert "dataset.json has format version 2, and this embedmill reads up to 1: upgrade embedmill" in line
    assert not (tmp_path / "out").exists()


def test_a_dataset_in_an_object_store_is_exported_all_the_same(
    s3_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = made_dataset(s3_folder)
    made.add("abc")
    with pytest.raises(SystemExit) as ended:
        run(["export", s3_folder, "--to", str(tmp_path / "out"), "--format", "npy", "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == s3_folder
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "vectors.npy"), open_dataset(s3_folder).to_numpy())
