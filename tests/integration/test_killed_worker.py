"""A worker is killed with requests in flight: how soon the others have the whole quota, and what is paid twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.rehearsal import Rehearsal
from embedmill.rehearsal.server import ProviderSimulator
from scheduler.queue import LEASE_S
from tests.conftest import Command, write_jsonl
from tests.invariants import check_dataset
from tests.servers import Server, running

pytestmark = [pytest.mark.server, pytest.mark.slow]
TPM, CONCURRENCY = 1_200_000, 6
WINDOW_S = 10.0
DOCUMENTS = 135_000


class Watched:
    """A simulator that counts the tokens of requests whose client was gone before the answer."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.simulator = ProviderSimulator(rehearsal)
        self.abandoned_tokens: list[int] = []

    async def __aenter__(self) -> Watched:
        app = self.simulator.application()
        app.middlewares.append(self._watch)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.api_base = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._runner.cleanup()

    @property
    def _watch(self) -> Callable[..., object]:
        @web.middleware
        async def watch(request: web.Request, handler: Callable[..., object]) -> object:
            response = await handler(request)  # type: ignore[misc]
            if request.transport is None or request.transport.is_closing():
                self.abandoned_tokens.append(json.loads(response.body)["usage"]["total_tokens"])
            return response

        return watch

    def utilisation(self) -> float:
        """Of the time since the last call."""
        return float(self.simulator.reset()["utilisation"])  # type: ignore[arg-type]


async def test_within_a_lease_the_rest_of_the_fleet_uses_all_of_the_key_and_little_is_paid_twice(
    embedmill: Command, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    texts = {str(n): f"number {n} of the words that are sent " for n in range(DOCUMENTS)}
    source = write_jsonl(tmp_path / "c.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    limits = {"tpm": TPM, "rpm": 10_000, "concurrency": CONCURRENCY}
    rehearsal = Rehearsal(**limits, latency_ms=1500, jitter_ms=100)
    with running(Server(embedmill.temporary / "redis", on_socket=True)) as server:
        async with Watched(rehearsal) as provider:
            common = ["--model", "jina/jina-embeddings-v3", "--dimensions", "8", "--api-base", provider.api_base]
            allowed = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
            environment = {"JINA_API_KEY": "rehearsal", "EMBEDMILL_REDIS": server.url}
            push = partial(embedmill, "push", source, "--to", "out", *common, environment=environment)
            assert (await to_thread.run_sync(push)).status == 0
            workers = [embedmill.start("worker", *common, *allowed, environment=environment) for _ in range(3)]
            try:
                with anyio.fail_after(30):
                    while provider.simulator.stats()["tokens_billed"] < 200_000:  # type: ignore[operator]  # noqa: ASYNC110
                        await anyio.sleep(0.1)
                provider.utilisation()
                await anyio.sleep(WINDOW_S)
                before = provider.utilisation()
                os.kill(workers[0].pid, signal.SIGKILL)
                await anyio.sleep(LEASE_S)
                meanwhile = provider.utilisation()
                await anyio.sleep(WINDOW_S)
                after = provider.utilisation()
                with anyio.fail_after(60):
                    while Dataset.open(str(tmp_path / "out")).owed():  # noqa: ASYNC110
                        await anyio.sleep(0.5)
                again = provider.simulator.stats()["tokens_billed_again"]
            finally:
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
                for worker in workers:
                    await to_thread.run_sync(worker.communicate)
    figures = {
        "utilisation before": before,
        "in the lease after the kill": meanwhile,
        "after it": after,
        "tokens in flight at the kill": sum(provider.abandoned_tokens),
        "tokens billed again": again,
    }
    print(json.dumps(figures))
    for name, value in figures.items():
        record_property(name, value)
    assert provider.abandoned_tokens, "nothing was in flight"
    assert before >= 0.9
    # One request more or less is 3 % of the time that is measured.
    assert after >= 0.95 * before
    # An answer of the last tenth of a second may not have been kept.
    assert again <= sum(provider.abandoned_tokens) + max(provider.abandoned_tokens)  # type: ignore[operator]
    Dataset.open(str(tmp_path / "out")).publish_shape()
    await to_thread.run_sync(partial(check_dataset, tmp_path / "out", source=texts))
