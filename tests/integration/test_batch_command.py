"""`embedmill run --batch` as users run it, killed at every step, and `embedmill batches`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.submissions import Submissions
from embedmill.rehearsal import ProviderSimulator, Rehearsal, serve_rehearsal
from tests.conftest import ROOT, Command, write_jsonl
from tests.datasets import small_dataset
from tests.invariants import check_dataset

# Seconds that pass for minutes: how long after an intent the provider's list is believed.
_SOON = """
from worker import batch_lane, batch_matching
batch_lane._FIRST_LOOK_S = batch_lane.LOOK_AGAIN_S = batch_matching.LOOK_AGAIN_S = 0.1
batch_matching.SETTLED_S = 1.0
from embedmill.commands.main import run
run()
"""
TEXTS = {f"d{number}": f"text number {number}" for number in range(60)}
MODEL = "jina/jina-embeddings-v5-text-nano"
CRASHED = 137


class Commands:
    """Commands beside a simulator in this process, in a folder with `corpus.jsonl`."""

    def __init__(self, folder: Path, simulator: ProviderSimulator, api_base: str) -> None:
        self.folder, self.simulator, self.api_base = folder, simulator, api_base
        write_jsonl(folder / "corpus.jsonl", [{"id": id_, "text": text} for id_, text in TEXTS.items()])

    def start(self, *arguments: str, failpoints: str = "") -> subprocess.Popen[str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        ours = {"PYTHONPATH": str(ROOT), "JINA_API_KEY": "jina_test", "COLUMNS": "200"}
        plan = {"EMBEDMILL_FAILPOINTS": failpoints} if failpoints else {}
        return subprocess.Popen(
            [sys.executable, "-c", _SOON, *arguments], cwd=self.folder, env={**kept, **ours, **plan},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    async def __call__(self, *arguments: str, failpoints: str = "") -> tuple[int, str]:
        """Status and what was said."""
        process = self.start(*arguments, failpoints=failpoints)
        try:
            said, _ = await to_thread.run_sync(lambda: process.communicate(timeout=50))
        finally:
            process.kill()
        assert "Traceback" not in said, said
        return process.returncode, said

    @property
    def run(self) -> Sequence[str]:
        return ("run", "corpus.jsonl", "--to", "out", "--no-milvus", "--model", MODEL, "--dimensions", "8", "--batch",
                "--api-base", self.api_base)  # fmt: skip

    @property
    def submissions(self) -> list[Any]:
        return Submissions(Dataset.open(str(self.folder / "out"))).of_shard(0)

    def check(self) -> None:
        check_dataset(self.folder / "out", source=TEXTS)

    def stats(self, name: str) -> Any:
        return self.simulator.stats()[name]


@asynccontextmanager
async def commands(folder: Path, **behaviour: Any) -> AsyncIterator[Commands]:
    async with serve_rehearsal(Rehearsal(**{"batch_s": 0, **behaviour})) as (api_base, simulator):
        yield Commands(folder, simulator, api_base)


@pytest.mark.parametrize(
    "point",
    [
        "batch.after_intent",
        "batch.after_submit",
        "batch.after_accept",
        "worker.before_checkpoint",
        "batch.after_results",
        "batch.after_end",
        "worker.before_vectors",
        "worker.after_vectors",
        "worker.after_marker",
    ],
)
async def test_killed_at_any_step_the_same_command_ends_with_the_same_set_and_one_batch_is_paid(
    tmp_path: Path, point: str
) -> None:
    async with commands(tmp_path) as on:
        status, said = await on(*on.run, failpoints=f"{point}=crash@1")
        assert status == CRASHED, said
        status, said = await on(*on.run)
        assert status == 0, said
        check_dataset(tmp_path / "out", source=TEXTS)
        assert on.stats("batches") == {"completed": 1}
        # A passage is embedded by an ordinary request, too, once by each process that compares; so is a probe.
        assert on.stats("texts_embedded") <= len(TEXTS) + 4
        [*_, last] = on.submissions
        assert last.state == "done"
        logs = list((tmp_path / "out" / "spend").glob("batch-*.log"))
        assert len(logs) == 1
        assert len(logs[0].read_text().splitlines()) == 1


async def test_sigkill_between_the_submission_and_the_note_of_its_batch_pays_nothing_twice(tmp_path: Path) -> None:
    async with commands(tmp_path, batch_s=1.0) as on:
        process = on.start(*on.run, failpoints="batch.after_submit=stall:60")
        try:
            with anyio.fail_after(20):
                while not on.stats("batches"):  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            await to_thread.run_sync(process.communicate)
        assert [one.state for one in on.submissions] == ["unanswered"]
        status, said = await on(*on.run)
        assert status == 0, said
        on.check()
        assert on.stats("batches") == {"completed": 1}
        [submission] = on.submissions
        assert submission.accepted.by == "match"


async def test_a_held_submission_is_shown_and_a_person_decides(tmp_path: Path) -> None:
    async with commands(tmp_path, batch_lost_answer=1.0, batch_failed=1.0) as on:
        status, said = await on(*on.run)
        assert status == 3
        assert "submission 00000000-0001 is held" in said
        assert "`embedmill batches discard 00000000-0001 --to DATASET`" in said
        _, listed = await on("batches", "list", "--to", "out")
        assert "00000000-0001  held" in listed
        status, said = await on("batches", "discard", "00000000-0002", "--to", "out")
        assert (status, "no submission 00000000-0002" in said) == (2, True)
        assert f"`embedmill batches list --to {tmp_path / 'out'}`" in said
        assert on.stats("batches") == {"failed": 1}
        for fault in ("batch_lost_answer", "batch_failed"):
            object.__setattr__(on.simulator._rehearsal, fault, 0.0)
        [held] = on.submissions
        status, said = await on("batches", "adopt", "00000000-0001", held.held.candidates[0], "--to", "out")
        assert (status, "is batch_" in said) == (0, True)
        status, said = await on("batches", "discard", "00000000-0001", "--to", "out", "--json")
        assert (status, '"discarded"' in said) == (0, True)
        status, said = await on("batches", "adopt", "00000000-0001", "batch_x", "--to", "out")
        assert (status, "there is nothing to decide" in said) == (2, True)
        status, said = await on(*on.run)
        assert status == 0, said
        on.check()


def test_settings_of_the_file_count_for_the_subcommands_too(embedmill: Command) -> None:
    dataset = small_dataset(embedmill.folder / "d")
    (embedmill.folder / "embedmill.toml").write_text('to = "d"\n')
    assert embedmill("batches", "list", "--json").record == {"dataset": dataset.url, "submissions": []}


async def test_a_cancelled_job_cancels_its_batches_at_the_provider(tmp_path: Path) -> None:
    async with commands(tmp_path, batch_s=600) as on:
        process = on.start(*on.run)
        try:
            with anyio.fail_after(20):
                while not (tmp_path / "out" / "submissions" / "00000000-0001.batch.json").exists():  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            process.terminate()
            await to_thread.run_sync(lambda: process.communicate(timeout=20))
        finally:
            process.kill()
        assert process.returncode == 3
        status, said = await on("pause", "main", "--to", "out")
        assert status == 0
        assert "Its batches at the provider (1) go on, and have to be fetched within the provider's 24 hours." in said
        status, said = await on("cancel", "main", "--to", "out", "--yes")
        assert status == 0
        assert "say --api-base" in said, "the key is not sent to where a dataset says"
        status, said = await on("cancel", "main", "--to", "out", "--yes", "--api-base", on.api_base)
        assert status == 0, said
        assert on.stats("batches") == {"cancelled": 1}
        assert [one.state for one in on.submissions] == ["cancelled"]
        await on("resume", "main", "--to", "out")
        status, said = await on("pause", "main", "--to", "out")
        assert (status, "24 hours" in said) == (0, False), said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "jina/jina-embeddings-v3"), "jina/jina-embeddings-v3 cannot be had in batches"),
        (("--model", "null/8"), "null/8 cannot be had in batches"),
        (("--task", "retrieval.query"), "the task retrieval.query cannot be had in batches"),
    ],
)
async def test_what_the_endpoint_does_not_take_is_refused_at_once_in_one_sentence(
    tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    async with commands(tmp_path) as on:
        command = [*on.run, *options]
        if "null/8" in options:
            del command[command.index("--api-base") :][:2]
            command = [part for part in command if part not in ("--api-base", on.api_base)]
        status, words = await on(*command)
        assert status == 2, words
        assert said in words
        assert not (tmp_path / "out").exists()
        assert on.stats("batches") == {}


async def test_the_mode_stays_with_the_job_until_it_is_said_otherwise(tmp_path: Path) -> None:
    async with commands(tmp_path) as on:
        status, _ = await on("create", "out", "--model", MODEL, "--dimensions", "8", "--batch")
        assert status == 0
        without = [part for part in on.run if part != "--batch"]
        status, said = await on(*without)
        assert status == 0, said
        assert on.stats("batches") == {"completed": 1}
        write_jsonl(tmp_path / "corpus.jsonl", [{"id": "more", "text": "one more"}])
        status, said = await on(*without, "--no-batch")
        assert status == 0, said
        assert on.stats("batches") == {"completed": 1}


async def test_no_more_is_sent_than_the_jobs_cap_allows_whatever_the_batches_cost(tmp_path: Path) -> None:
    async with commands(tmp_path) as on:
        status, said = await on(*on.run, "--max-tokens", "200")
        assert status == 3, said
        assert "200" in said
        assert on.stats("tokens_billed") <= 200
        status, said = await on(*on.run, "--max-tokens", "100000")
        assert status == 0, said
        on.check()
