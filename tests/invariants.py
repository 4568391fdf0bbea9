"""What holds for every dataset, whatever happened to it. Chaos tests end by calling this; so does every other test.

Objects are read with pyarrow and zarr-python where that is possible, so that the dataset's own reader is checked as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from embedmill.dataset import layout
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Marker, Status
from embedmill.dataset.summary import summarize
from worker.embedders.null import hash_vectors


@dataclass(frozen=True)
class FinalRow:
    """What became of one (id, version). vector: the bytes that are stored, empty when the row has none."""

    text: str | None
    metadata: str | None
    status: Status
    vector: bytes


FinalSet = dict[tuple[str, int], FinalRow]


def check_dataset(url: str | Path, *, source: Mapping[str, str] | None = None, at_rest: bool = True) -> None:
    """Raises AssertionError, in words, for an invariant that does not hold.

    source: texts by id that the newest versions must be, no more and no less; at_rest: nothing may be owed or half-written.
    """
    dataset = Dataset.open(str(url))
    root = Path(dataset.url)
    shards = _check_log(root)
    newest: dict[str, tuple[int, str | None]] = {}
    retired = dataset.retired()
    for shard in shards:
        table = pq.read_table(root / layout.documents_key(shard))
        assert table.num_rows <= dataset.info.shard_rows, f"shard {shard} has {table.num_rows} rows"
        assert (table.num_rows == 0) == dataset.origin(shard).erased, f"shard {shard} has {table.num_rows} rows"
        _check_versions(dataset, shard, table, newest)
        marker = dataset.marker(shard)
        if shard in retired and table.num_rows == 0:
            continue
        if marker is not None:
            _check_marker(root, dataset, marker, table)
            _check_vectors(root, dataset, marker, table)
    _check_accounts(dataset)
    _check_shape(root, dataset)
    _check_fingerprints(root, dataset)
    if source is not None:
        _check_source(newest, source)
    if at_rest:
        _check_rest(root, dataset)


def final_set(url: str | Path) -> FinalSet:
    """Every (id, version) of the committed log, and what became of it."""
    dataset = Dataset.open(str(url))
    found: FinalSet = {}
    for shard in dataset.committed():
        table, _ = dataset.documents(shard)
        marker = dataset.marker(shard)
        assert marker is not None
        vectors = dataset.vectors(shard)
        for row, record in enumerate(table.to_pylist()):
            status = layout.STATUSES[int(marker.statuses[row])]
            vector = vectors[row].tobytes() if status == "embedded" else b""
            found[record["id"], record["version"]] = FinalRow(record["text"], record["metadata"], status, vector)
    return found


def living(rows: FinalSet) -> FinalSet:
    """The deciding version of each id that is not deleted; failures and cancelled rows beside it."""
    last: dict[str, int] = {}
    for (id_, version), row in rows.items():
        if row.status in ("embedded", "deleted"):
            last[id_] = max(version, last.get(id_, 0))
    return {key: row for key, row in rows.items() if key[1] >= last.get(key[0], 0) and row.status != "deleted"}


def newest(url: str | Path) -> dict[str, tuple[int, str | None, bytes]]:
    """What a reader by the rules sees: version, text and vector of each id."""
    rows = living(final_set(url))
    return {id_: (version, row.text, row.vector) for (id_, version), row in rows.items() if row.status == "embedded"}


def assert_same_set(ours: FinalSet, expected: FinalSet) -> None:
    """Ids, versions, texts and statuses exactly, vectors bit for bit."""
    missing, extra = expected.keys() - ours.keys(), ours.keys() - expected.keys()
    assert not missing, f"{len(missing)} (id, version) are missing, for example {sorted(missing)[:3]}"
    assert not extra, f"{len(extra)} (id, version) are too many, for example {sorted(extra)[:3]}"
    for key, row in expected.items():
        found = ours[key]
        assert found.status == row.status, f"{key} is {found.status} and should be {row.status}"
        assert (found.text, found.metadata) == (row.text, row.metadata), f"{key} has another text or other metadata"
        assert found.vector == row.vector, f"{key} has another vector"


def logged_ids(url: str | Path) -> list[str]:
    """Ids in the order of the rows."""
    root = Path(url)
    ids: list[str] = []
    for path in sorted((root / layout.DOCUMENTS_FOLDER).glob("*.parquet")):
        ids += [str(id_) for id_ in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    return ids


def _check_log(root: Path) -> list[int]:
    names = sorted(path.name for path in (root / layout.DOCUMENTS_FOLDER).glob("*.parquet"))
    dense = [f"{number:08d}.parquet" for number in range(len(names))]
    assert names == dense, f"the document log is not dense: {names}"
    return list(range(len(names)))


def _check_versions(dataset: Dataset, shard: int, table: pa.Table, newest: dict[str, tuple[int, str | None]]) -> None:
    columns, origin = table.to_pydict(), dataset.origin(shard)
    retries = origin.retries
    if origin.replaces:
        # It holds what others held, whatever came in between.
        for id_, version, text, deleted in zip(
            columns["id"], columns["version"], columns["text"], columns["deleted"], strict=True
        ):
            newest[id_] = max(newest.get(id_, (0, None)), (version, None if deleted else text), key=lambda one: one[0])
        return
    for row, (id_, version, text) in enumerate(zip(columns["id"], columns["version"], columns["text"], strict=True)):
        before, text_before = newest.get(id_, (0, None))
        if row in retries:
            assert (version, text) == (before, text_before), f"shard {shard}: {id_!r} is tried again as something else"
            _check_retry(dataset, retries[row], id_, version)
        else:
            assert version > before, f"shard {shard}: version {version} of {id_!r} stands behind version {before}"
        newest[id_] = (version, None if columns["deleted"][row] else text)


def _check_retry(dataset: Dataset, place: tuple[int, int], id_: str, version: int) -> None:
    """Only what failed is tried again."""
    if place[0] in dataset.retired():
        return
    marker = dataset.marker(place[0])
    failed = {(f.row, f.id, f.version) for f in marker.failures} if marker is not None else set()
    assert (place[1], id_, version) in failed, f"row {place[1]} of shard {place[0]} was tried again and had not failed"


def _check_accounts(dataset: Dataset) -> None:
    """Every accepted (id, version) ends in exactly one status, and the summary says how many in each."""
    found: dict[tuple[str, int], Status] = {}
    for shard in sorted({*dataset.committed(), *dataset.owed()}):
        columns = dataset.documents(shard, columns=["id", "version"])[0].to_pydict()
        marker = dataset.marker(shard)
        for row, key in enumerate(zip(columns["id"], columns["version"], strict=True)):
            status: Status = "owed" if marker is None else layout.STATUSES[int(marker.statuses[row])]
            # What failed may be tried again elsewhere.
            found[key] = found.get(key, status) if status == "failed" else status
    summary = summarize(dataset)
    counted = {name: getattr(summary, name) for name in layout.STATUSES}
    expected = {name: sum(found_name == name for found_name in found.values()) for name in layout.STATUSES}
    assert counted == expected, f"the summary counts {counted}, and the log says {expected}"
    accepted = len(found) + summary.removed
    assert summary.admitted == accepted, f"{summary.admitted} are counted as accepted, and {accepted} are"


def _check_marker(root: Path, dataset: Dataset, marker: Marker, table: pa.Table) -> None:
    name = f"the marker of shard {marker.shard}"
    record = json.loads((root / layout.commit_key(marker.shard)).read_bytes())
    assert record["shard"] == marker.shard, f"{name} says that it is of shard {record['shard']}"
    rows = sum(length for _, length in record["statuses"])
    assert rows == record["rows"] == table.num_rows, f"{name} gives {rows} statuses to {table.num_rows} rows"
    unknown = {status for status, _ in record["statuses"]} - set(layout.STATUSES[1:])
    assert not unknown, f"{name} has rows that are {unknown}"
    failed = np.flatnonzero(marker.statuses == layout.FAILED).tolist()
    causes = [(f["row"], f["id"], f["version"]) for f in record["failures"]]
    ids, versions = table["id"].to_pylist(), table["version"].to_pylist()
    assert causes == [(row, ids[row], versions[row]) for row in failed], (
        f"{name}: failed rows {failed}, causes {causes}"
    )
    deleted = np.array(table["deleted"].to_pylist(), dtype=bool)
    assert not (deleted & (marker.statuses == layout.EMBEDDED)).any(), f"{name}: deleted rows are embedded"
    assert layout.documents_key(marker.shard) in record["objects"], f"{name} does not describe its documents"
    for key, promised in record["objects"].items():
        data = (root / key).read_bytes()
        assert len(data) == promised["bytes"], f"{key} has {len(data)} bytes, its marker says {promised['bytes']}"
        checksum = f"{google_crc32c.value(data):08x}"
        assert checksum == promised["crc32c"], f"{key} has the checksum {checksum}, not {promised['crc32c']}"


def _check_vectors(root: Path, dataset: Dataset, marker: Marker, table: pa.Table) -> None:
    name = f"shard {marker.shard}"
    embedded = marker.statuses == layout.EMBEDDED
    vectors = dataset.vectors(marker.shard)
    assert vectors.shape == (marker.rows, dataset.info.dimensions), f"{name} has vectors of shape {vectors.shape}"
    usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    assert usable[embedded].all(), f"{name}: {int((~usable[embedded]).sum())} embedded rows have no usable vector"
    assert np.isnan(vectors[~embedded]).all(), f"{name} shows vectors of rows that are not embedded"
    start = marker.shard * dataset.info.shard_rows
    plain = np.asarray(_array(root)[start : start + marker.rows])
    shown = min(len(plain), marker.rows)
    np.testing.assert_array_equal(
        plain[:shown], vectors[:shown], err_msg=f"{name}: zarr-python and the dataset read different vectors"
    )
    if dataset.info.embedder.model.startswith("null/"):
        texts = [text or "" for text in table["text"].to_pylist()]
        expected = hash_vectors(texts, dataset.info.dimensions).astype(dataset.info.dtype)
        np.testing.assert_array_equal(
            vectors[embedded], expected[embedded], err_msg=f"{name}: a row is not the embedding of its text"
        )


def _check_shape(root: Path, dataset: Dataset) -> None:
    committed = dataset.committed()
    array = _array(root)
    if not committed:
        return
    last = dataset.marker(committed[-1])
    assert last is not None
    end = last.shard * dataset.info.shard_rows + last.rows
    shape = array.shape[0]
    assert shape <= end, f"the array shows {shape} rows, and {end} are committed"


def _check_fingerprints(root: Path, dataset: Dataset) -> None:
    fingerprint = dataset.info.embedder.fingerprint
    attributes: Any = dict(zarr.open_group(root / "vectors.zarr", mode="r").attrs)["embedding"]
    found = {
        layout.DATASET_KEY: json.loads((root / layout.DATASET_KEY).read_bytes())["fingerprint"],
        layout.ZARR_GROUP_KEY: attributes["fingerprint"],
    }
    for path in (root / layout.COMMITS_FOLDER).glob("*.json"):
        found[path.name] = json.loads(path.read_bytes())["fingerprint"]
    others = {name: value for name, value in found.items() if value != fingerprint}
    assert not others, f"vector spaces are mixed: {others} besides {fingerprint}"


def _check_source(newest: Mapping[str, tuple[int, str | None]], source: Mapping[str, str]) -> None:
    newest = {id_: found for id_, found in newest.items() if found[1] is not None}
    lost, invented = source.keys() - newest.keys(), newest.keys() - source.keys()
    assert not lost, f"{len(lost)} documents of the source are lost, for example {sorted(lost)[:3]}"
    assert not invented, f"{len(invented)} documents are in no source, for example {sorted(invented)[:3]}"
    changed = [id_ for id_, text in source.items() if newest[id_][1] != text]
    assert not changed, f"the newest versions of {len(changed)} documents have another text, for example {changed[:3]}"


def _check_rest(root: Path, dataset: Dataset) -> None:
    owed = dataset.owed()
    assert not owed, f"shards {owed} are still owed"
    assert dataset.unpublished_rows() == 0, f"the array hides {dataset.unpublished_rows()} committed rows"
    left = [str(path.relative_to(root)) for path in (root / "checkpoints").rglob("*") if path.is_file()]
    assert not left, f"checkpoints are left over: {left}"
    half_written = [str(path.relative_to(root)) for path in root.rglob("*.tmp")]
    assert not half_written, f"temporary files are left over: {half_written}"


def _array(root: Path) -> zarr.Array[Any]:
    array = zarr.open_group(root / "vectors.zarr", mode="r")["vectors"]
    assert isinstance(array, zarr.Array)
    return array


def vector(row: FinalRow, *, dtype: str = "float32") -> NDArray[np.floating]:
    """The stored bytes of a row as numbers, (dimensions,)."""
    values: NDArray[np.floating] = np.frombuffer(row.vector, dtype=dtype)
    return values
