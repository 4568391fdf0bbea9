"""A clock that a test sets, and a Redis that reads it."""

import time

import pytest

from embedmill.connection import FAKE_URL, Connection
from tests.budget_bench import Clock


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
