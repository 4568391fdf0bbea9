"""Sparse rows: which index a token has, and what Milvus' client and scipy read in them."""

import math
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymilvus.client.entity_helper import entity_is_sparse_matrix, sparse_rows_to_proto

import embedmill
from embedmill.errors import ConfigurationError
from embedmill.sparse import SPARSE_DIMENSIONS, SparseRows, sparse_row, token_index

WEIGHTS = [{"fish": 0.5, "##ery": 1.25, "mine": 2.0}, {}, {"fish": 3.0}]


def rows_of(*weights):
    return SparseRows.joined([sparse_row(one) for one in weights])


def test_the_index_of_a_token_is_the_published_checksum_of_its_bytes_and_stays_it():
    # The check value of CRC-32/ISO-HDLC.
    assert token_index("123456789") == 0xCBF43926
    assert token_index("") == 0
    # Whose checksum is 2^32 - 1.
    assert token_index("bccbcccccbcbbbcbbcccbccbbbcbcccbbbbb") == 0
    assert [token_index(token) for token in ("fish", "##ery", "mänade")] == [1064584243, 2282256702, 3413359940]


@given(st.text())
def test_every_text_has_an_index_that_milvus_takes(token):
    assert 0 <= token_index(token) < SPARSE_DIMENSIONS == 2**32 - 1


def test_rows_are_sequences_of_weights_by_ascending_index():
    rows = rows_of(*WEIGHTS)
    assert rows.shape == (3, 2**32 - 1)
    assert list(rows) == [{token_index(token): weight for token, weight in one.items()} for one in WEIGHTS]
    assert (rows[-1], rows[1]) == ({token_index("fish"): 3.0}, {})
    assert list(rows[0]) == sorted(rows[0])
    assert (rows.indices.dtype, rows.data.dtype, rows.indptr.tolist()) == (np.uint32, np.float32, [0, 3, 3, 4])
    with pytest.raises(IndexError):
        rows[3]


def test_weights_of_tokens_that_share_an_index_are_added():
    assert token_index("plumless") == token_index("buckeroo")
    assert rows_of({"plumless": 1.0, "fish": 0.5, "buckeroo": 2.0})[0] == {
        token_index("plumless"): 3.0,
        token_index("fish"): 0.5,
    }


def test_no_rows_are_a_sequence_too():
    assert (len(rows_of()), list(rows_of()), rows_of().to_scipy().shape) == (0, [], (0, 2**32 - 1))


def test_pymilvus_takes_the_rows_as_they_are_one_by_one_and_from_scipy():
    rows = rows_of(*WEIGHTS)
    assert entity_is_sparse_matrix(rows)
    whole = list(sparse_rows_to_proto(rows).contents)
    assert whole == list(sparse_rows_to_proto(rows.to_scipy()).contents)
    assert whole == [sparse_rows_to_proto([row]).contents[0] for row in rows]
    assert whole[2] == struct.pack("<If", token_index("fish"), 3.0)


def test_rows_can_be_taken_out_of_scipys_array():
    rows = rows_of(*WEIGHTS)
    whole = rows.to_scipy()
    assert whole.shape == rows.shape
    for number, row in enumerate(rows):
        one = whole[[number]]
        assert dict(zip(one.indices.tolist(), one.data.tolist(), strict=True)) == row


def test_without_scipy_only_its_own_form_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    rows = rows_of({"fish": 1.0})
    assert rows[0] == {token_index("fish"): 1.0}
    with pytest.raises(ConfigurationError, match="pip install scipy"):
        rows.to_scipy()


def test_weights_too_large_or_small_for_float32_are_infinite_or_zero_without_a_warning():
    entries = sparse_row({"a": 1e39, "b": 1e-60})
    assert sorted(entries["weight"].tolist()) == [0, math.inf]


def test_it_can_be_imported_from_the_package():
    assert embedmill.SparseRows is SparseRows
