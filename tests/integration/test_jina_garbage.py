"""The table of bad inputs for the lane that is paid for: `embedmill run` against the simulator, whole.

Each ends with its status and one line, and the rest of the job is done, or goes on when it may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from pathlib import Path

import anyio
import numpy as np
import pytest
from anyio import to_thread

from embedmill.connection import FAKE_URL, Connection
from embedmill.dataset.dataset import Dataset
from embedmill.errors import RateLimited
from embedmill.rehearsal import Rehearsal, pretend_vector, serve_rehearsal
from scheduler.budget import Budget
from tests.conftest import Command, Ended, write_jsonl
from tests.invariants import check_dataset
from worker.attempts import Attempt, embed_batch
from worker.embedders.jina import JinaEmbedder

CLOSED_PORT = 1
GOOD = [{"id": f"good{n}", "text": f"Number {n} is a good text."} for n in range(40)]
FULL = {"tpm": 10**7, "rpm": 10**4, "concurrency": 8}


async def run(
    embedmill: Command,
    *options: str,
    api_base: str,
    key: str = "jina_secret",
    model: str = "jina/jina-embeddings-v3",
    command: str = "run",
) -> Ended:
    """`embedmill run in.jsonl --to out`, beside the simulator's event loop."""
    arguments = [command, "in.jsonl", "--to", "out", "--model", model, "--api-base", api_base, "--dimensions", "8"]
    limits = [part for name, value in FULL.items() for part in (f"--{name}", str(value))]
    call = partial(embedmill, *arguments, *limits, "--no-milvus", *options, environment={"JINA_API_KEY": key})
    ended = await to_thread.run_sync(call)
    assert "secret" not in ended.output
    return ended


def assert_one_line(ended: Ended) -> None:
    """Beside progress, and what is waited for."""
    quiet = (" passages/s", "waiting for the provider to answer a first request")
    (line,) = [line for line in ended.stderr.splitlines() if not any(words in line for words in quiet)]
    assert line.startswith("embedmill: ")
    assert "internal error" not in line


@dataclass(frozen=True)
class Text:
    """One bad document among good ones. embedded: whether it has a vector in the end."""

    name: str
    text: str
    status: int
    embedded: bool
    says: str = ""
    behaviour: Mapping[str, object] = field(default_factory=dict)


TEXTS = [
    Text("empty", "", 1, embedded=False, says="rejected    1, listed"),
    Text("blank", " \n\t", 1, embedded=False, says="rejected    1, listed"),
    Text("a lone surrogate", "before \ud800 after", 1, embedded=False, says="rejected    1, listed"),
    Text("5 MB", "many words " * 450_000, 0, embedded=True),
    Text("over-long", "word " * 20_000, 0, embedded=True),
    Text("a NUL", "before \0 after", 0, embedded=True),
    Text(
        "refused",
        "FORBIDDEN text",
        1,
        embedded=False,
        says="failed      1; see",
        behaviour={"reject_marker": "FORBIDDEN"},
    ),
]


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name.replace(" ", "_"))
async def test_one_bad_text_among_500_is_named_and_the_rest_is_done(case: Text, embedmill: Command) -> None:
    records = [{"id": f"good{n}", "text": f"Number {n} is a good text."} for n in range(500)]
    records[250] = {"id": "bad", "text": case.text}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (embedmill.folder / "in.jsonl").write_text(lines)
    async with serve_rehearsal(Rehearsal(**case.behaviour)) as (api_base, simulator):  # type: ignore[arg-type]
        ended = await run(embedmill, api_base=api_base)
        assert simulator.stats()["max_per_text"] <= 12, "a good text was paid for again and again"
    assert ended.status == case.status, ended.output
    assert case.says in ended.output
    check_dataset(embedmill.folder / "out")
    status = await to_thread.run_sync(partial(embedmill, "status", "out", "--json"))
    assert status.record["passages"]["embedded"] == 499 + case.embedded


@dataclass(frozen=True)
class Trouble:
    """What is wrong with the provider from the first request on."""

    name: str
    status: int
    says: str
    behaviour: Mapping[str, object] = field(default_factory=dict)
    key: str = "jina_secret"
    model: str = "jina/jina-embeddings-v3"
    path: str = "/v1"


TROUBLES = [
    Trouble("a wrong key", 3, "401: Invalid API key", {"bad_key": True}),
    Trouble("two wrong keys", 3, "401: Invalid API key", {"bad_key": True}, key="jina_secret,jina_secret2"),
    Trouble("a key that is none", 2, "set JINA_API_KEY again", key="jina_\x7fsecret"),
    Trouble("an unknown model", 2, "jina-embeddings-v3", model="jina/jina-embeddings-v33"),
    Trouble("a wrong address", 2, "is --api-base right?", path="/v9"),
    Trouble("an empty account", 3, "Insufficient account balance", {"no_balance_after": 1}),
    Trouble("a login page", 3, "not JSON", {"html_200": 1.0}),
    Trouble("nothing but 500", 3, "answered 500", {"error_500": 1.0}),
    Trouble("connections that are reset", 3, "did not answer", {"drop_before": 1.0}),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name.replace(" ", "_"))
async def test_trouble_from_the_first_request_on_is_one_line_and_its_status(
    trouble: Trouble, embedmill: Command
) -> None:
    write_jsonl(embedmill.folder / "in.jsonl", GOOD)
    async with serve_rehearsal(Rehearsal(**trouble.behaviour)) as (api_base, _):  # type: ignore[arg-type]
        base = api_base.replace("/v1", trouble.path)
        ended = await run(embedmill, api_base=base, key=trouble.key, model=trouble.model)
        if trouble.name == "an empty account":
            # What it takes to learn of it is the first request.
            ended = ended if ended.status else await run(embedmill, api_base=base)
    assert ended.status == trouble.status, ended.output
    assert trouble.says in ended.stderr
    assert_one_line(ended)


async def test_no_network_is_one_line_and_the_same_command_goes_on_when_there_is_one(embedmill: Command) -> None:
    write_jsonl(embedmill.folder / "in.jsonl", GOOD)
    ended = await run(embedmill, api_base=f"http://127.0.0.1:{CLOSED_PORT}/v1")
    assert (ended.status, ended.stdout) == (3, "")
    assert f"cannot connect to http://127.0.0.1:{CLOSED_PORT}/v1" in ended.stderr
    assert_one_line(ended)
    async with serve_rehearsal(Rehearsal()) as (api_base, _):
        assert (await run(embedmill, api_base=api_base)).status == 0
    check_dataset(embedmill.folder / "out")


def _job(folder: Path) -> dict[str, str]:
    job: dict[str, str] = json.loads((folder / "out" / "jobs" / "main.json").read_text())
    return job


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ({"no_balance_after": 6_000}, {}, "Insufficient account balance"),
        ({"bad_key_marker": "secret", "bad_key_after": 6_000}, {}, "Invalid API key"),
    ],
    ids=["no balance", "revoked key"],
)
async def test_a_key_that_ends_in_mid_job_pauses_it_and_the_same_command_goes_on(
    embedmill: Command, first: dict[str, object], then: dict[str, object], says: str
) -> None:
    texts = {f"d{n}": f"Number {n} " + "of many words " * 30 for n in range(400)}
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    revoked_after = first.pop("bad_key_after", None)
    behaviour = Rehearsal() if revoked_after else Rehearsal(**first)  # type: ignore[arg-type]
    async with serve_rehearsal(behaviour) as (api_base, simulator):
        if revoked_after:
            bill = simulator._bill

            def revoke(account, texts: Sequence[str], tokens: Sequence[int]) -> None:  # type: ignore[no-untyped-def]
                bill(account, texts, tokens)
                if account.lifetime.tokens_billed > revoked_after:  # type: ignore[operator]
                    simulator._rehearsal = Rehearsal(**first)  # type: ignore[arg-type]

            simulator._bill = revoke  # type: ignore[method-assign]
        ended = await run(embedmill, "--concurrency", "1", "--tpm", "100000", api_base=api_base)
        paid = simulator.stats()["texts_embedded"]
    assert ended.status == 3, ended.output
    assert says in ended.stderr
    job = _job(embedmill.folder)
    assert (job["state"], job["stopped_by"], says in job["reason"]) == ("paused", "worker", True)
    async with serve_rehearsal(Rehearsal(**then)) as (api_base, simulator):  # type: ignore[arg-type]
        ended = await run(embedmill, api_base=api_base)
        again = simulator.stats()["texts_embedded"]
    assert ended.status == 0, ended.output
    assert "main was paused" in ended.stderr
    assert _job(embedmill.folder)["state"] == "running"
    check_dataset(embedmill.folder / "out", source=texts)
    # The two probes are paid for beside the texts.
    assert paid + again == len(texts) + 2  # type: ignore[operator]


FAULTS = [
    "error_500", "error_502", "error_503", "error_504", "drop_before", "drop_after", "truncated_body", "html_200",
    "error_200", "missing_row", "extra_row", "duplicate_index", "nan_row", "zero_row", "same_vectors",
    "request_429", "token_429", "concurrency_429",
]  # fmt: skip


@pytest.mark.slow
async def test_whatever_the_provider_answers_only_good_vectors_are_stored_and_nobody_is_buried(
    embedmill: Command,
) -> None:
    texts = {f"d{n}": f"Number {n} of many words " * 800 for n in range(400)}
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": id_, "text": text} for id_, text in texts.items()])
    # Every fifth request meets the next fault.
    waiting = chain.from_iterable([None] * 4 + [fault] for fault in cycle(FAULTS))
    async with serve_rehearsal(Rehearsal(shuffle=0.5, retry_after=0.2, **FULL)) as (api_base, simulator):
        simulator._dice.fault = lambda: next(waiting)  # type: ignore[method-assign]
        ended = await run(embedmill, "--json", api_base=api_base)
        met = simulator.stats()["faults"]
    assert ended.status == 0, ended.output
    assert set(met) == set(FAULTS)  # type: ignore[call-overload]
    dataset = Dataset.open(str(embedmill.folder / "out"))
    check_dataset(dataset.url, source=texts)
    stored = dataset.vectors(0)
    ids = dataset.documents(0)[0].column("id").to_pylist()
    for row, id_ in enumerate(ids):
        assert np.array_equal(stored[row], pretend_vector(texts[id_], model="jina-embeddings-v3", dimensions=8))


@pytest.mark.parametrize("retry_after", [None, 0.5], ids=["no Retry-After", "Retry-After"])
@pytest.mark.parametrize(
    ("kind", "limit"),
    [("request_429", "requests"), ("token_429", "tokens"), ("concurrency_429", "concurrency"), ("ip_429", "address")],
)
async def test_every_kind_of_429_is_told_apart_and_closes_the_key_for_the_fleet(
    kind: str, limit: str, retry_after: float | None
) -> None:
    connection = Connection(FAKE_URL)
    ours, theirs = (Budget(connection, namespace="t", key_id="k", rpm=10**6, tpm=10**8) for _ in range(2))
    behaviour = Rehearsal(**{kind: 1.0}, retry_after=retry_after, rpm=10**6, tpm=10**8)  # type: ignore[arg-type]
    async with serve_rehearsal(behaviour) as (api_base, _):
        embedder = JinaEmbedder("jina/jina-embeddings-v3", key="jina_x", api_base=api_base)
        events: list[Attempt] = []
        with anyio.fail_after(10), anyio.CancelScope() as scope:

            def end(attempt: Attempt) -> None:
                events.append(attempt)
                scope.cancel()

            await embed_batch(embedder, ["a"], budget=ours, on_event=end)
        with pytest.raises(RateLimited) as caught:
            await embedder.embed(["a"])
        await embedder.aclose()
    assert [event.outcome for event in events] == ["rate_limited"]
    assert (caught.value.limit, caught.value.retry_after_s) == (limit, retry_after)
    began = anyio.current_time()
    async with theirs.reserve(1):
        waited_s = anyio.current_time() - began
    assert waited_s > 0.01
    await connection.aclose()
