"""`embedmill info`: what it counts, and the picture that `--plot` draws of any dataset."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from embedmill.commands.main import run
from embedmill.commands.picture import project
from embedmill.dataset.contents import Contents
from embedmill.dataset.layout import DELETED, FAILED
from embedmill.dataset.passages import ShardOrigin
from embedmill.token_estimates import TokenEstimator
from tests.committed import Made, Row, made_dataset
from tests.conftest import Command


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Five of eight embedded rows count; a shard of two was replaced, and waits to be deleted."""
    made = made_dataset(tmp_path / "d")
    made.add("abcd")
    made.add([Row("b", 2), Row("c", 2, DELETED), Row("x", 1, FAILED)])
    made.add("ef")
    made.replace([2], [(2, 0), (2, 1)])
    return made


def test_it_counts_what_is_inside(embedmill: Command, made: Made) -> None:
    record = embedmill("info", "d", "--json").record
    assert record["rows"] == {"count": 5, "stored": 9}
    assert record["characters"] == {"rows": 5, "p50": 4, "p99": 4, "longest": 4}
    sizes = [made.dataset.marker(shard).objects for shard in range(4)]
    of = lambda shards, word: sum(o.bytes for s in shards for key, o in sizes[s].items() if word in key)  # noqa: E731
    assert record["documents_bytes"] == of([0, 1, 3], "documents")
    assert record["vectors_bytes"] == of([0, 1, 3], "vectors")
    assert record["committed_bytes"] == record["documents_bytes"] + record["vectors_bytes"]
    assert record["retired"] == {"shards": 1, "bytes": of([2], "")}
    assert record["plot"] is record["unreadable"] is None
    shown = embedmill("info", "d").stdout
    assert "rows        5 count, 4 stored beside them do not" in shown
    assert "texts       half have up to 4 characters, 99 % up to 4, the longest 4\n" in shown
    assert "retired     1 shards with" in shown


def test_damaged_documents_are_named_and_do_not_hide_the_rest(embedmill: Command, made: Made) -> None:
    documents = Path(made.url, "documents/00000003.parquet")
    documents.write_bytes(Path(made.url, "documents/00000000.parquet").read_bytes())
    ended = embedmill("info", "d")
    assert ended.status == 0, ended.output
    assert "texts       cannot be read, `embedmill verify` says more: " in ended.stdout
    assert documents.name in ended.stdout
    assert "stored      " in ended.stdout
    ended = embedmill("info", "d", "--plot", "p.png")
    assert (ended.status, ended.stdout, ended.stderr.count("\n")) == (3, "", 1)
    assert documents.name in ended.stderr


def draw(folder: Path, name: str) -> np.ndarray:
    """The picture of a dataset, (height, width, 4), drawn in this process."""
    with pytest.raises(SystemExit) as ended:
        run(["info", str(folder), "--plot", str(folder.parent / name)])
    assert ended.value.code == 0
    return matplotlib.image.imread(folder.parent / name)


def inked(part: np.ndarray) -> float:
    return float((part[..., :3].min(axis=2) < 0.95).mean())


def test_a_picture_of_any_dataset_is_drawn(tmp_path: Path, made: Made) -> None:
    empty = made_dataset(tmp_path / "empty")
    one = made_dataset(tmp_path / "one")
    one.add("a")
    same = made_dataset(tmp_path / "same", dimensions=1)
    same.add([Row("a"), Row("é"), Row("c")])
    jobs = made_dataset(tmp_path / "ジョブ", dimensions=8)
    for shard, ids in enumerate(["abcdefgh", "ijklmnop", "qrstuvwx"]):
        jobs.add(ids, origin=ShardOrigin(shard, ["main", "live"][shard % 2]))
    for dataset in (empty, one, same, jobs, made):
        picture = draw(Path(dataset.url), "p.png")
        assert picture.shape[:2] == (630, 1950)
        assert inked(picture) > 0.002
    full, nothing = draw(Path(jobs.url), "jobs.png"), draw(Path(empty.url), "empty.png")
    assert inked(full) > 5 * inked(nothing)


def test_the_same_dataset_gives_the_same_picture(tmp_path: Path, made: Made) -> None:
    for name in ("one.svg", "two.svg"):
        with pytest.raises(SystemExit):
            run(["info", made.url, "--plot", str(tmp_path / name)])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "one.svg", "two.svg"]


def test_what_cannot_be_drawn_is_one_line(
    embedmill: Command, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = embedmill("info", "d", "--plot", "p.pdf")
    assert (ended.status, ended.output) == (
        2,
        "embedmill: --plot p.pdf: name a file that ends with .png or .svg\n",
    )
    ended = embedmill("info", "d", "--plot", "nowhere/p.png")
    assert (ended.status, ended.output.count("\n")) == (3, 1)
    assert "cannot write nowhere/p.png: No such file" in ended.output
    ended = embedmill("info", "d", "--plot", "p.png", largest_file_bytes=1000)
    assert (ended.status, ended.output.count("\n")) == (3, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as missing:
        run(["info", made.url, "--plot", str(tmp_path / "p.png")])
    assert missing.value.code == 2
    assert capsys.readouterr().err == (
        "embedmill: matplotlib is not installed, and --plot needs it: pip install 'embedmill[plot]'\n"
    )


def test_tokens_are_what_was_learned_or_else_scaled_to_what_was_billed(made: Made) -> None:
    contents = Contents(made.dataset)
    assert contents.sample(TokenEstimator(), billed=0).tokens is None
    scaled = contents.sample(TokenEstimator(), billed=12).tokens
    assert scaled is not None
    assert (scaled.basis, float(scaled.values.mean())) == ("scaled to what was billed", pytest.approx(12))
    learned = TokenEstimator()
    learned.learn(["a v1"] * 10, 50)
    found = contents.sample(learned, billed=12).tokens
    assert found is not None
    assert found.basis.startswith("± ")
    np.testing.assert_allclose(found.values, learned.estimate(["a v1"] * 5))


def test_a_large_dataset_is_sampled_the_same_way_each_time(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        made.add([Row(f"{number}-{row}") for row in range(8)])
    monkeypatch.setattr("embedmill.dataset.contents._SAMPLED_ROWS", 20)
    monkeypatch.setattr("embedmill.dataset.contents._PROJECTED_ROWS", 10)
    contents = Contents(made.dataset)
    first, second = (contents.sample(TokenEstimator(), billed=0) for _ in range(2))
    assert 20 <= len(first) < 28 < contents.rows
    assert 0 < len(first.vectors) < len(first)
    np.testing.assert_array_equal(first.vectors, second.vectors)
    np.testing.assert_array_equal(np.linalg.norm(first.vectors, axis=1), first.norms[first.places])


def test_the_projection_is_that_of_a_singular_value_decomposition() -> None:
    random = np.random.default_rng(3)
    vectors = (random.standard_normal((300, 40)) * np.geomspace(5, 0.1, 40) + 3).astype(np.float32)
    points, shares = project(vectors)
    left, singular, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * singular[:2]
    assert points is not None
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-3)
    np.testing.assert_allclose(shares, np.square(singular[:2]) / np.square(singular).sum(), rtol=1e-4)
    for few in (vectors[:1], vectors[:0], vectors[:, :1], np.ones((5, 4), np.float32)):
        assert project(few)[0] is None
