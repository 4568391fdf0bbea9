"""A clock that a test sets, a Redis that reads it, a dataset with late chunking, and datasets that are made by hand."""

import time
from pathlib import Path

import pytest

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.layout import CANCELLED, DELETED, FAILED
from tests.budget_bench import Clock
from tests.committed import Made, Row, made_dataset
from tests.late_documents import close_indexes, late_dataset


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
async def connection():
    connection = Connection(FAKE_URL)
    yield connection
    await connection.aclose()


@pytest.fixture
def late(tmp_path):
    yield late_dataset(tmp_path / "d")
    close_indexes()


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return made_dataset(tmp_path / "d")


@pytest.fixture
def mixed(made: Made) -> Made:
    """a to f, of which b was changed, c deleted, d failed to change, e was cancelled at first; and a shard that is owed."""
    made.add("abcd")
    made.add([Row("b", 2), Row("c", 2, DELETED), Row("d", 2, FAILED), Row("e", 1, CANCELLED), Row("e", 2)])
    made.add([Row("x", 1, FAILED)])
    made.add("f")
    made.add("uvwz", commit=False)
    return made
