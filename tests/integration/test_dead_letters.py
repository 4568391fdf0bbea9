"""`embedmill dead` and what it does to what the other commands say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Failure, Job
from embedmill.dataset.passages import ShardOrigin
from embedmill.messages import DeadLetter
from scheduler.budget import Unlimited
from scheduler.queue import Queue
from scheduler.reconcile import make_tasks
from tests.conftest import Command
from tests.datasets import passage, small_dataset
from tests.invariants import check_dataset, final_set
from worker.commit import commit_shard
from worker.embedders.null import NullEmbedder, hash_vectors
from worker.results import Increment, ShardResults
from worker.service import Worker

pytestmark = pytest.mark.server
CAUSES = {1: ("input_rejected", "[bold]no[/bold] such text"), 5: ("poison", "it killed its worker")}


@pytest.fixture
def dataset(embedmill: Command) -> Dataset:
    """One committed shard of job `main`, whose rows 1 and 5 failed."""
    made = small_dataset(embedmill.folder / "d", embedder=NullEmbedder(3).spec)
    made.write_job(Job("main"))
    texts = [f"text {row}" for row in range(8)]
    rows = [passage(f"id-{row}", text, metadata=json.dumps({"n": row})) for row, text in enumerate(texts)]
    made.append_passages(0, rows, origin=ShardOrigin(0, "main"))
    good = [row for row in range(8) if row not in CAUSES]
    failures = tuple(Failure(row, f"id-{row}", 1, code, cause) for row, (code, cause) in CAUSES.items())
    results = ShardResults(8, 3)
    results.add(Increment(np.array(good, np.int32), hash_vectors([texts[row] for row in good], 3), failures))
    passages = [(p.id, p.version) for p in rows]
    commit_shard(made, 0, results, origin=ShardOrigin(0, "main"), passages=passages, attempt="a", worker="tested")
    made.publish_shape()
    return made


@pytest.fixture
def queue(connection: Connection) -> Queue:
    return Queue(connection)


def test_dead_list_shows_id_version_code_and_cause_and_filters_by_code(embedmill: Command, dataset: Dataset) -> None:
    listed = embedmill("dead", "list", "main", "--to", "d")
    assert listed.status == 0
    lines = [line.strip().split(maxsplit=3) for line in listed.stdout.splitlines()]
    assert lines[:3] == [
        ["id", "version", "code", "cause"],
        ["id-1", "1", "input_rejected", "[bold]no[/bold] such text"],
        ["id-5", "1", "poison", "it killed its worker"],
    ]
    record = embedmill("dead", "list", "main", "--to", "d", "--code", "poison", "--json").record
    assert (record["total"], [letter["id"] for letter in record["letters"]]) == (1, ["id-5"])
    cut = embedmill("dead", "list", "main", "--to", "d", "--limit", "1")
    assert "... and 1 more" in cut.stdout
    assert embedmill("dead", "list", "other", "--to", "d").status == 2


def test_dead_show_has_the_whole_document_and_every_attempt(embedmill: Command, dataset: Dataset) -> None:
    shown = embedmill("dead", "show", "main", "id-5", "--to", "d", "--json").record["letters"]
    assert len(shown) == 1
    assert (shown[0]["text"], shown[0]["metadata"], shown[0]["state"]) == ("text 5", {"n": 5}, "open")
    assert [attempt["cause"] for attempt in shown[0]["attempts"]] == ["it killed its worker"]
    words = embedmill("dead", "show", "main", "id-1", "--to", "d").stdout
    assert "input_rejected: [bold]no[/bold] such text" in words
    assert words.endswith("text 1\n")
    unknown = embedmill("dead", "show", "main", "id-0", "--to", "d")
    assert unknown.status == 2
    assert "has no dead letter 'id-0'" in unknown.stderr


async def test_a_retried_letter_that_a_worker_embeds_is_none_any_more(
    embedmill: Command, dataset: Dataset, server_url: str, queue: Queue
) -> None:
    retry = ("dead", "retry", "main", "--to", "d", "--redis", server_url)
    assert embedmill("verify", "d").status == 1
    assert embedmill(*retry, "id-5", "--json").record["retried"] == 1
    again = embedmill(*retry, "--all", "--json").record
    assert (again["retried"], again["passed_over"]) == (1, 0)
    assert (await queue.depth()).ready_bulk == 2
    worker = Worker(queue, NullEmbedder(3), budget=Unlimited())
    committed: list[int] = []

    def note(shard: int) -> None:
        committed.append(shard)
        if len(committed) == 2:
            worker.stop()

    await worker.run(on_commit=note)
    assert embedmill("dead", "list", "main", "--to", "d", "--json").record["total"] == 0
    verified = embedmill("verify", "d")
    assert verified.status == 0
    assert "8 accepted = 8 embedded + 0 failed" in verified.stdout
    check_dataset(dataset.url)
    assert final_set(dataset.url)["id-5", 1].status == "embedded"


async def test_a_letter_that_is_being_tried_again_is_not_tried_twice(
    embedmill: Command, dataset: Dataset, server_url: str, queue: Queue
) -> None:
    assert embedmill("dead", "retry", "main", "--all", "--to", "d", "--redis", server_url).status == 0
    again = embedmill("dead", "retry", "main", "--all", "--to", "d", "--redis", server_url, "--json")
    assert (again.record["retried"], again.record["shards"]) == (0, [])
    assert dataset.admitted() == [0, 1]
    assert (await queue.depth()).open == 1
    check_dataset(dataset.url, at_rest=False)


@pytest.mark.parametrize("verb", ["drop", "retry"])
async def test_the_queue_forgets_a_letter_wherever_its_row_stood(
    embedmill: Command, dataset: Dataset, server_url: str, queue: Queue, verb: str
) -> None:
    """Compaction moves rows, and Redis knows the place where a passage failed."""
    task = make_tasks(dataset, [0])[0]
    elsewhere = DeadLetter(dataset.url, "main", "id-5", 1, 40, 2, "poison", "it killed its worker")
    others = [replace(elsewhere, id=f"other-{n}", row=n) for n in range(3, 503)]
    newer = replace(elsewhere, version=2, row=600)
    await queue.finish(task, dead=[elsewhere, newer, *others])
    assert embedmill("dead", verb, "main", "id-5", "--to", "d", "--redis", server_url).status == 0
    left = await queue.dead_letters(dataset.info.id, "main")
    assert left == {letter.key: (letter.id, letter.version) for letter in [newer, *others]}


def test_a_dropped_letter_ends_no_command_with_1_and_is_counted_apart(embedmill: Command, dataset: Dataset) -> None:
    assert "2 dead letters dropped" in embedmill("dead", "drop", "main", "--all", "--to", "d").stdout
    verified = embedmill("verify", "d")
    assert verified.status == 0
    assert "6 embedded + 2 failed (2 dropped)" in verified.stdout
    assert "2 (2 dropped)" in embedmill("status", "d").stdout
    hidden = embedmill("dead", "list", "main", "--to", "d")
    assert "0 dead letters of job main (2 dropped or superseded; --all shows them)" in hidden.output
    everything = embedmill("dead", "list", "main", "--to", "d", "--all", "--json").record["letters"]
    assert {letter["state"] for letter in everything} == {"dropped"}


def test_what_is_to_be_retried_or_dropped_has_to_be_named(embedmill: Command, dataset: Dataset) -> None:
    for command in ("retry", "drop"):
        for named in ((), ("id-1", "--all")):
            refused = embedmill("dead", command, "main", *named, "--to", "d")
            assert refused.status == 2
            assert "name the dead letters by their ids, or take --all or --code CODE" in refused.stderr


def test_a_retry_into_a_paused_job_is_refused(embedmill: Command, dataset: Dataset) -> None:
    embedmill("pause", "main", "--to", "d")
    refused = embedmill("dead", "retry", "main", "--all", "--to", "d")
    assert refused.status == 2
    assert "embedmill resume main" in refused.stderr


def test_settings_of_the_file_count_for_the_subcommands_too(embedmill: Command, dataset: Dataset) -> None:
    Path(embedmill.folder / "embedmill.toml").write_text('to = "d"\n')
    assert embedmill("dead", "list", "main", "--json").record["total"] == 2
