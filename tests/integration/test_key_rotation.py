"""Real workers, a real Redis and the simulator: several keys, keys that are replaced, and a provider that fails for long."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.spending import spend_lines
from embedmill.rehearsal import Rehearsal, serve_rehearsal
from embedmill.rehearsal.accounts import account_name
from embedmill.rehearsal.faults import Dice
from embedmill.rehearsal.server import ProviderSimulator
from scheduler.budget import key_id
from tests.conftest import Command, write_jsonl
from tests.invariants import check_dataset
from tests.servers import Server, running

pytestmark = [pytest.mark.server, pytest.mark.slow]
OLD, NEW, NEWER, BAD = "jina_old", "jina_new", "jina_newer", "jina_bad"


@pytest.fixture
def redis(embedmill: Command) -> Iterator[Server]:
    with running(Server(embedmill.temporary / "redis", on_socket=True)) as server:
        yield server


class Fleet:
    """Workers on one simulator. `push` admits documents before or while they work."""

    def __init__(self, embedmill: Command, redis: Server, api_base: str, simulator: ProviderSimulator) -> None:
        self.embedmill = embedmill
        self.simulator = simulator
        self.common = ["--model", "jina/jina-embeddings-v3", "--dimensions", "8", "--api-base", api_base]
        self.environment = {"EMBEDMILL_REDIS": redis.url}
        self.workers: list[subprocess.Popen[bytes]] = []
        self.texts: dict[str, str] = {}

    async def push(self, documents: int, *, key: str = OLD) -> None:
        made = {
            f"{len(self.texts) + n}": f"document {len(self.texts) + n} " + "of words " * 40 for n in range(documents)
        }
        self.texts |= made
        source = self.embedmill.folder / f"{len(self.texts)}.jsonl"
        write_jsonl(source, [{"id": id_, "text": text} for id_, text in made.items()])
        environment = {**self.environment, "JINA_API_KEY": key}
        push = partial(self.embedmill, "push", source, "--to", "out", *self.common, environment=environment)
        ended = await to_thread.run_sync(push)
        assert ended.status == 0, ended.output

    def start(self, count: int, *options: str, **keys: str | Path) -> None:
        limits = ("--rpm", "10000", "--tpm", "10000000", "--concurrency", "4", *options)
        environment = {**self.environment, **{name: str(value) for name, value in keys.items()}}
        self.workers += [
            self.embedmill.start("worker", *self.common, *limits, environment=environment) for _ in range(count)
        ]

    def requests(self, key: str) -> int:
        account = self.simulator._accounts.get(account_name(key))
        return account.lifetime.requests if account is not None else 0

    async def until(self, condition: Callable[[], bool], *, within_s: float = 40) -> None:
        with anyio.fail_after(within_s):
            while not condition():  # noqa: ASYNC110
                await anyio.sleep(0.02)

    async def stop(self) -> list[str]:
        """What they said."""
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        said = [(await to_thread.run_sync(worker.communicate))[1].decode() for worker in self.workers]
        self.workers = []
        return said

    async def end(self) -> list[str]:
        """Work off everything, stop, and check what is there; what the workers said."""
        markers = self.embedmill.folder / "out" / "commits"
        documents = self.embedmill.folder / "out" / "documents"
        await self.until(
            lambda: len(list(markers.glob("*.json"))) == len(list(documents.glob("*.parquet"))), within_s=90
        )
        said = await self.stop()
        Dataset.open(str(self.embedmill.folder / "out")).publish_shape()
        await to_thread.run_sync(partial(check_dataset, self.embedmill.folder / "out", source=self.texts))
        return said


@asynccontextmanager
async def fleet(embedmill: Command, redis: Server, **behaviour: object) -> AsyncIterator[Fleet]:
    async with serve_rehearsal(Rehearsal(**behaviour)) as (api_base, simulator):  # type: ignore[arg-type]
        made = Fleet(embedmill, redis, api_base, simulator)
        try:
            yield made
        finally:
            await made.stop()


def swap(folder: Path, generation: str, content: str | bytes) -> None:
    """As the kubelet replaces a mounted secret: a new folder, and a link that is renamed onto the old one."""
    (folder / generation).mkdir()
    (folder / generation / "keys").write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "..tmp").symlink_to(generation)
    (folder / "..tmp").rename(folder / "..data")
    if not (folder / "keys").is_symlink():
        (folder / "keys").symlink_to("..data/keys")


async def test_a_running_worker_takes_new_keys_from_its_file_and_keeps_the_old_ones_when_that_is_bad(
    embedmill: Command, redis: Server, tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    swap(secrets, "1", f"{OLD}\n")
    async with fleet(embedmill, redis, latency_ms=1200) as on:
        await on.push(12_000)
        on.start(1, JINA_API_KEY_FILE=secrets / "keys")
        await on.until(lambda: on.requests(OLD) > 2)
        swap(secrets, "2", f"{OLD}\n{NEW}\n")
        await on.until(lambda: on.requests(NEW) > 1)
        swap(secrets, "3", b"\xff\xfe")
        seen = on.requests(OLD), on.requests(NEW)
        await anyio.sleep(4)
        swap(secrets, "4", f"{NEWER}\n")
        await on.until(lambda: on.requests(NEWER) > 1)
        left = on.requests(OLD), on.requests(NEW)
        assert min(left[0] - seen[0], left[1] - seen[1]) > 0, "the old keys did not go on"
        (said,) = await on.end()
        assert (on.requests(OLD), on.requests(NEW)) == left
    assert said.count("the keys that we have go on: cannot read") == 1
    assert said.count("the API keys have changed") == 2
    assert not any(key in said for key in (OLD, NEW, NEWER))


async def test_one_refused_key_of_three_leaves_the_others_at_work_and_the_last_one_pauses_the_job(
    embedmill: Command, redis: Server
) -> None:
    async with fleet(embedmill, redis, latency_ms=100, bad_key_marker="bad") as on:
        await on.push(6000)
        on.start(2, JINA_API_KEY=f"{BAD},{OLD},{NEW}")
        said = await on.end()
        assert on.requests(BAD) <= 2 * 4
        assert min(on.requests(OLD), on.requests(NEW)) > 5
        spent: Counter[str] = Counter()
        for line in spend_lines(Dataset.open(str(embedmill.folder / "out"))):
            spent[line.key] += line.tokens
        # The probe of a push is paid for with the first key.
        billed = {key: on.simulator._accounts[account_name(key)].lifetime.tokens_billed for key in (OLD, NEW)}
        assert spent[key_id("jina", NEW)] == billed[NEW]
        assert spent[key_id("jina", OLD)] == pytest.approx(billed[OLD], abs=30)
        assert all(log.count("is not used any more (others left: 2): Jina answered 401") <= 1 for log in said)
        await on.push(100)
        on.start(1, JINA_API_KEY=f"{BAD} {BAD}2")
        worker = on.workers[0]
        with anyio.fail_after(30):
            assert await to_thread.run_sync(worker.wait) == 3
        status = await to_thread.run_sync(partial(embedmill, "status", "out", "--json"))
    (job,) = status.record["jobs"]
    assert (job["state"], "Invalid API key" in job["reason"]) == ("paused", True)


async def test_a_provider_that_fails_for_long_is_left_alone_by_all_workers_and_everything_is_done_in_the_end(
    embedmill: Command, redis: Server
) -> None:
    async with fleet(embedmill, redis, latency_ms=50) as on:
        await on.push(6000)
        on.simulator._dice = Dice(Rehearsal(error_503=1.0))
        before = on.requests(OLD)
        on.start(3, JINA_API_KEY=OLD)
        await on.until(lambda: on.requests(OLD) - before >= 5)
        await anyio.sleep(1)
        burst = on.requests(OLD) - before
        await anyio.sleep(10)
        probes = on.requests(OLD) - before - burst
        on.simulator._dice = Dice(Rehearsal())
        said = await on.end()
    # All permits of the key, before anybody knows; then after 5 s one probe, and after 10 s more another.
    assert burst <= 4 + 5
    assert 1 <= probes <= 2
    assert sum(log.count("fails again and again") for log in said) <= 3
    assert sum(log.count("answers again") for log in said) >= 1
