"""A clock that a test sets, a Redis that reads it, and a dataset with late chunking."""

import time

import pytest

from embedmill.connection import FAKE_URL, Connection
from tests.budget_bench import Clock
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
