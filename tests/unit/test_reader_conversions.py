"""A dataset in the hands of other tools: through the reader, and opened by them without us."""

from __future__ import annotations

import sys
from pathlib import Path

import dask.array
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import tensorstore
import xarray
import zarr

from embedmill import open_dataset
from embedmill.dataset.layout import DELETED
from embedmill.dataset.reader import DatasetReader
from embedmill.errors import ConfigurationError
from tests.committed import Made, Row, made_dataset, rows_of

DTYPES = ["float32", "float16"]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(tmp_path: Path, dtype: str) -> Made:
    """a to i, of which b was changed and c deleted; the second shard is full, nothing of the third counts."""
    made = made_dataset(tmp_path / "d", dtype=dtype)
    made.add("abc")
    made.add([Row("b", 2), Row("c", 2, DELETED), *rows_of("defghi")])
    made.add([Row("c", 1, DELETED)])
    made.dataset.publish_shape()
    return made


@pytest.fixture
def reader(made: Made) -> DatasetReader:
    return open_dataset(made.url)


ROWS = [Row("a"), Row("b", 2), *rows_of("defghi")]
ADDRESSES = [0, 8, *range(10, 16)]


def matrix(dtype: str) -> np.ndarray:
    return np.array([row.vector for row in ROWS]).astype(dtype)


def test_as_a_numpy_array(reader: DatasetReader, dtype: str) -> None:
    array = reader.to_numpy()
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, matrix(dtype))
    assert list(reader.ids) == [row.id for row in ROWS]


def test_as_an_arrow_table(reader: DatasetReader, dtype: str) -> None:
    table = reader.to_arrow()
    assert table.column_names == ["id", "text", "metadata", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 3)
    assert table["id"].to_pylist() == [row.id for row in ROWS]
    assert table["text"].to_pylist() == [row.text for row in ROWS]
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), matrix(dtype))


def test_as_a_stream_of_record_batches_with_the_columns_that_were_asked_for(reader: DatasetReader) -> None:
    stream = reader.arrow_reader(["version"])
    assert stream.schema.names == ["id", "version", "vector"]
    assert [batch.num_rows for batch in stream] == [1, 7]
    assert reader.to_arrow([]).column_names == ["id", "vector"]
    with pytest.raises(ConfigurationError, match="no column"):
        reader.arrow_reader(["body"])


def test_as_a_dask_array_with_a_chunk_for_each_shard(reader: DatasetReader, dtype: str) -> None:
    array = reader.to_dask()
    assert (array.shape, array.dtype, array.chunks) == ((8, 3), np.dtype(dtype), ((1, 7), (3,)))
    np.testing.assert_array_equal(array.compute(), matrix(dtype))
    np.testing.assert_array_equal(array[6].compute(scheduler="synchronous"), matrix(dtype)[6])


def test_a_dask_array_reads_nothing_before_it_is_computed(made: Made, reader: DatasetReader) -> None:
    array = reader.to_dask()
    (Path(made.url) / "vectors.zarr/vectors/c/1/0").unlink()
    np.testing.assert_array_equal(array[:1].compute(), reader.to_dask()[:1])
    with pytest.raises(Exception, match="c/1/0 is missing"):
        array.compute()


def test_as_an_xarray_array_with_ids(reader: DatasetReader, dtype: str) -> None:
    array = reader.to_xarray()
    assert array.dims == ("row", "dim")
    assert array.attrs["model"] == "null/3"
    assert array["id"].chunks is not None
    assert array["id"].values.tolist() == [row.id for row in ROWS]
    assert array["address"].values.tolist() == ADDRESSES
    np.testing.assert_array_equal(array.values, matrix(dtype))
    np.testing.assert_array_equal(array.set_xindex("id").sel(id="e").values, matrix(dtype)[3])


def test_an_empty_dataset_as_anything(tmp_path: Path) -> None:
    reader = open_dataset(made_dataset(tmp_path / "d").url)
    assert reader.to_numpy().shape == reader.to_dask().compute().shape == reader.to_xarray().shape == (0, 3)
    assert reader.to_arrow().num_rows == 0
    assert reader.to_xarray()["id"].values.tolist() == []


@pytest.mark.parametrize(
    ("missing", "convert", "says"),
    [
        ("dask.array", DatasetReader.to_dask, r"dask\[array\] is not installed.*pip install 'embedmill\[arrays\]'"),
        ("xarray", DatasetReader.to_xarray, r"xarray is not installed.*pip install 'embedmill\[arrays\]'"),
    ],
)
def test_a_package_that_is_not_there_is_asked_for(
    reader: DatasetReader, monkeypatch: pytest.MonkeyPatch, missing: str, convert: object, says: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError, match=says):
        convert(reader)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", ["float32"])
def test_duckdb_reads_the_stream(reader: DatasetReader) -> None:
    stream = reader.arrow_reader(["text"])
    with duckdb.connect() as connection:
        connection.register("passages", stream)
        found = connection.sql("SELECT id, text, vector[2] FROM passages WHERE text LIKE '% v2'").fetchall()
    assert found == [("b", "b v2", 2.0)]


def test_zarr_python_opens_the_vectors(made: Made, dtype: str) -> None:
    array = zarr.open_group(f"{made.url}/vectors.zarr", mode="r")["vectors"]
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.dtype) == ((17, 3), np.dtype(dtype))
    np.testing.assert_array_equal(array[:][ADDRESSES], matrix(dtype))
    assert np.isnan(array[3:8]).all()


def test_xarray_opens_the_vectors(made: Made, dtype: str) -> None:
    with xarray.open_zarr(f"{made.url}/vectors.zarr", consolidated=False, chunks={"row": 8}) as found:
        assert found["vectors"].dims == ("row", "dim")
        assert found["vectors"].dtype == dtype
        assert found.attrs["embedding"]["model"] == "null/3"
        np.testing.assert_array_equal(found["vectors"].values[ADDRESSES], matrix(dtype))


def test_dask_opens_the_vectors(made: Made, dtype: str) -> None:
    array = dask.array.from_zarr(f"{made.url}/vectors.zarr", component="vectors", chunks=(8, 3))
    assert array.chunks == ((8, 8, 1), (3,))
    np.testing.assert_array_equal(array.compute()[ADDRESSES], matrix(dtype))


def test_tensorstore_opens_the_vectors(made: Made, dtype: str) -> None:
    place = {"driver": "file", "path": f"{made.url}/vectors.zarr/vectors/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True, open=True).result()
    assert (array.shape, array.dtype.numpy_dtype) == ((17, 3), np.dtype(dtype))
    assert array.domain.labels == ("row", "dim")
    np.testing.assert_array_equal(array.read().result()[ADDRESSES], matrix(dtype))


def test_pyarrow_opens_the_documents(made: Made) -> None:
    table = pyarrow.dataset.dataset(f"{made.url}/documents", format="parquet").to_table(columns=["id", "version"])
    assert table.num_rows == 12
    assert table.to_pylist()[3] == {"id": "b", "version": 2}
