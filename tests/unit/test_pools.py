"""What an idle worker says of tasks that wait for another model."""

from __future__ import annotations

import shlex

import pytest

from embedmill.commands.embedders import ModelChoice, make_spec
from embedmill.commands.services import worker
from worker.pools import start_command


@pytest.mark.parametrize(
    "choice",
    [
        ModelChoice("null/8"),
        ModelChoice("jina/jina-embeddings-v3", dimensions=16, task="text-matching", late_chunking=True),
        ModelChoice("jina/jina-embeddings-v4", late_chunking=True),
        ModelChoice("jina/jina-embeddings-v2-base-en"),
    ],
    ids=lambda choice: choice.model,
)
def test_the_command_that_is_said_starts_a_worker_that_takes_the_tasks(choice: ModelChoice) -> None:
    spec = make_spec(choice)
    program, command, *arguments = shlex.split(start_command(spec))
    assert (program, command) == ("embedmill", "worker")
    said = worker.make_context("worker", arguments).params
    names = ("model", "dimensions", "task", "late_chunking")
    assert make_spec(ModelChoice(**{name: said[name] for name in names})).fingerprint == spec.fingerprint
