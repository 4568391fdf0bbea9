"""Late chunking in a worker: a document's passages are embedded together, whatever is refused, lost or killed on the way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedmill import failpoints
from embedmill.connection import Connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DELETED, EMBEDDED, FAILED, Window
from embedmill.dataset.passages import Passage, ShardOrigin
from embedmill.documents import hash16
from embedmill.embedder import EmbedderSpec
from embedmill.errors import InputRejected, InputTooLong, JobFatalError
from scheduler.queue import Queue
from scheduler.reconcile import reconcile
from tests.datasets import small_dataset
from tests.inbox_bench import admit_all, doc, put, receipts, waiting
from tests.worker_bench import TestedEmbedder, check, statuses, work_off
from worker.checkpoints import Checkpoint
from worker.embedders.null import hash_vectors
from worker.results import Increment

pytestmark = pytest.mark.server
LATE = EmbedderSpec("late/3", 3, revision="1", options={"late_chunking": True})
Hook = Callable[[list[str]], Awaitable[None]]


class LateEmbedder(TestedEmbedder):
    """A token a character, 20 to a window. A vector depends on all texts of its request."""

    def __init__(self, *, before: Hook | None = None, window_tokens: int = 20, concurrency: int = 1) -> None:
        super().__init__(before=before, change=together, max_inputs=100, concurrency=concurrency, spec=LATE)
        self.window_tokens = window_tokens

    def planned_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]


def together(texts: Sequence[str], _vectors: object = None) -> np.ndarray:
    return hash_vectors(["|".join([text, *texts]) for text in texts], 3)


@pytest.fixture
def late(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "late", embedder=LATE, shard_rows=16)


async def owe(
    dataset: Dataset, queue: Queue, *rows: tuple[str, str | None] | None, origin: ShardOrigin | None = None
) -> None:
    """One shard of (text, group); None for a deleted row."""
    shard = len(dataset.admitted())
    passages = [
        Passage(f"p{shard}-{number}", *(("", "{}") if row is None else (row[0], "{}")), 1, hash16(row[0] if row else ""),
                hash16("{}"), row is None, row[1] if row else None)
        for number, row in enumerate(rows)
    ]  # fmt: skip
    dataset.append_passages(shard, passages, origin=origin or ShardOrigin(shard, "main"))
    await reconcile(dataset, queue)


def vectors(dataset: Dataset, shard: int = 0) -> np.ndarray:
    return Dataset.open(dataset.url).vectors(shard)


def windows(dataset: Dataset, shard: int = 0) -> tuple[Window, ...]:
    marker = Dataset.open(dataset.url).marker(shard)
    assert marker is not None
    return marker.windows


async def test_each_document_is_a_request_whole_and_alone(late: Dataset, queue: Queue) -> None:
    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", None), ("d", None), None, ("e", "E"), ("f", "E"), ("g", "G"))
    embedder = LateEmbedder(concurrency=2)
    await work_off(queue, embedder)
    check(late)
    assert sorted(embedder.requests) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert statuses(late) == [EMBEDDED] * 4 + [DELETED] + [EMBEDDED] * 3
    assert np.array_equal(vectors(late)[:2], together(["a", "b"]))
    assert windows(late) == ()


async def test_a_document_that_is_too_long_is_embedded_in_windows_and_the_marker_tells(
    late: Dataset, queue: Queue
) -> None:
    await owe(late, queue, ("x", "X"), *((letter * 8, "A") for letter in "abcd"))
    embedder = LateEmbedder()
    await work_off(queue, embedder)
    assert embedder.requests == [["x"], ["a" * 8, "b" * 8], ["c" * 8, "d" * 8]]
    assert windows(late) == (Window(1, 2), Window(3, 2))


async def test_a_window_that_the_provider_finds_too_long_is_halved_between_passages(
    late: Dataset, queue: Queue
) -> None:
    async def refuse(request: list[str]) -> None:
        if sum(map(len, request)) > 9:
            raise InputTooLong("too long")

    await owe(late, queue, ("aaaa", "A"), ("bbbb", "A"), ("cccc", "A"), ("dddd", "A"))
    embedder = LateEmbedder(before=refuse)
    await work_off(queue, embedder)
    check(late)
    assert embedder.requests[1:] == [["aaaa", "bbbb"], ["cccc", "dddd"]]
    assert windows(late) == (Window(0, 2), Window(2, 2))


async def test_a_passage_that_is_too_long_alone_is_a_dead_letter_that_says_so(late: Dataset, queue: Queue) -> None:
    async def refuse(request: list[str]) -> None:
        if "long" in "".join(request):
            raise InputTooLong("more than 8192 tokens")

    await owe(late, queue, ("aa", "A"), ("long", "A"), ("bb", "A"))
    embedder = LateEmbedder(before=refuse)
    await work_off(queue, embedder)
    check(late)
    marker = late.marker(0)
    assert marker is not None
    assert [(failure.row, failure.code) for failure in marker.failures] == [(1, "too_long")]
    assert statuses(late) == [EMBEDDED, FAILED, EMBEDDED]


async def test_without_the_bad_passage_the_others_are_embedded_together_once_more(late: Dataset, queue: Queue) -> None:
    async def refuse(request: list[str]) -> None:
        if "bad" in request:
            raise InputRejected("not allowed")

    await owe(late, queue, ("a", "A"), ("b", "A"), ("bad", "A"), ("c", "A"), ("d", "D"))
    embedder = LateEmbedder(before=refuse)
    worker = await work_off(queue, embedder)
    check(late)
    assert statuses(late) == [EMBEDDED, EMBEDDED, FAILED, EMBEDDED, EMBEDDED]
    assert np.array_equal(vectors(late)[[0, 1, 3]], together(["a", "b", "c"]))
    assert windows(late) == ()
    # What the search for it brought is paid for and thrown away.
    assert worker.counts.tokens == len("ab") + len("c") + len("abc") + len("d")


async def test_passages_that_are_refused_only_together_become_windows(late: Dataset, queue: Queue) -> None:
    async def refuse(request: list[str]) -> None:
        if "b" in request and "c" in request:
            raise InputRejected("not both")

    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "A"), ("d", "A"))
    await work_off(queue, LateEmbedder(before=refuse))
    check(late)
    assert statuses(late) == [EMBEDDED] * 4
    assert windows(late) == (Window(0, 2), Window(2, 2))


async def test_a_vector_that_is_no_good_is_asked_for_again_with_its_whole_document(late: Dataset, queue: Queue) -> None:
    spoilt = [True]

    def spoil(texts: list[str], _vectors: np.ndarray) -> np.ndarray:
        made = together(texts)
        if "b" in texts and spoilt.pop() if spoilt else False:
            made[1] = 0
        return made

    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "A"))
    embedder = LateEmbedder()
    embedder._change = spoil
    await work_off(queue, embedder)
    check(late)
    assert embedder.requests == [["a", "b", "c"]] * 2
    assert np.array_equal(vectors(late), together(["a", "b", "c"]))


async def test_a_vector_that_never_gets_good_is_a_dead_letter_and_the_others_stay(late: Dataset, queue: Queue) -> None:
    def spoil(texts: list[str], _vectors: np.ndarray) -> np.ndarray:
        made = together(texts)
        made[[position for position, text in enumerate(texts) if text == "b"]] = 0
        return made

    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "A"))
    embedder = LateEmbedder()
    embedder._change = spoil
    await work_off(queue, embedder)
    check(late)
    assert statuses(late) == [EMBEDDED, FAILED, EMBEDDED]
    assert np.array_equal(vectors(late)[[0, 2]], together(["a", "b", "c"])[[0, 2]])


async def test_a_document_of_which_a_checkpoint_has_a_part_is_embedded_again_whole(late: Dataset, queue: Queue) -> None:
    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "C"), ("d", "C"))
    kept = together(["a", "b"]), together(["c", "d"])
    torn = Increment(np.array([0], np.int32), kept[0][:1], windows=((0,),))
    whole = Increment(np.array([2, 3], np.int32), kept[1], windows=((2, 3),), billed_tokens=2, requests=1)
    checkpoint = Checkpoint(late, 0, attempt="earlier")
    checkpoint.keep(torn)
    checkpoint.keep(whole)
    embedder = LateEmbedder()
    await work_off(queue, embedder)
    check(late)
    assert embedder.requests == [["a", "b"]]
    assert np.array_equal(vectors(late), np.concatenate(kept))


async def test_rows_that_failed_before_are_not_tried_again_with_the_rest(late: Dataset, queue: Queue) -> None:
    calls = []

    async def die_late(request: list[str]) -> None:
        calls.append(request)
        if "bad" in request:
            raise InputRejected("not allowed")
        if request == ["a", "b"]:
            raise JobFatalError("killed")

    await owe(late, queue, ("a", "A"), ("bad", "A"), ("b", "A"))
    with pytest.raises(JobFatalError):
        await work_off(queue, LateEmbedder(before=die_late))
    await reconcile(late, queue)
    embedder = LateEmbedder()
    await work_off(queue, embedder)
    check(late)
    assert embedder.requests == [["a", "b"]]
    assert statuses(late) == [EMBEDDED, FAILED, EMBEDDED]


async def test_a_carried_document_of_which_a_vector_is_missing_is_embedded_again_whole(
    late: Dataset, queue: Queue
) -> None:
    async def refuse(request: list[str]) -> None:
        if "b" in request:
            raise InputRejected("not today")

    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "C"))
    await work_off(queue, LateEmbedder(before=refuse))
    origin = ShardOrigin(1, "main", carried={0: (0, 0), 1: (0, 1), 2: (0, 2)})
    await owe(late, queue, ("a", "A"), ("b", "A"), ("c", "C"), origin=origin)
    embedder = LateEmbedder()
    await work_off(queue, embedder)
    check(late)
    assert embedder.requests == [["a", "b"]]
    assert np.array_equal(vectors(late, 1), np.concatenate([together(["a", "b"]), together(["c"])]))


async def test_a_passage_that_fails_for_ever_is_found_and_the_others_are_embedded_together_once_more(
    late: Dataset, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(request: list[str]) -> None:
        if "poison" in request:
            raise ValueError("a bug")

    await owe(late, queue, ("a", "A"), ("b", "A"), ("poison", "A"), ("c", "A"), ("d", "D"))
    for name in ("_FIRST_RETRY_S", "_LONGEST_RETRY_S", "_IDLE_S"):
        monkeypatch.setattr(f"worker.service.{name}", 0.02)
    embedder = LateEmbedder(before=fail)
    await work_off(queue, embedder, patient=True)
    check(late)
    assert statuses(late) == [EMBEDDED, EMBEDDED, FAILED, EMBEDDED, EMBEDDED]
    assert np.array_equal(vectors(late)[[0, 1, 3]], together(["a", "b", "c"]))
    assert windows(late) == ()
    assert embedder.requests.count(["a", "b", "c"]) == 1


@pytest.mark.parametrize("step", ["", "scheduler.after_documents", "scheduler.before_admit", "scheduler.after_admit"])
async def test_a_document_over_messages_of_the_inbox_is_admitted_whole_whoever_dies_between(
    late: Dataset, connection: Connection, step: str
) -> None:
    passages = [doc(f"a#{number}", f"text {number}", group="a", last=number == 5) for number in range(6)]
    await put(connection, doc("x", "one"), *passages[:2])
    first = await admit_all(late, connection)
    assert (first.counts.messages, await waiting(connection)) == (0, 1)
    if step:
        failpoints.arm(f"{step}=raise@1")
        await put(connection, *passages[2:4])
        await put(connection, *passages[4:], doc("y", "two"))
        with pytest.raises(RuntimeError, match="failpoint"):
            await admit_all(late, connection)
        failpoints.arm("")
    else:
        await put(connection, *passages[2:4])
        await admit_all(late, connection)
        await put(connection, *passages[4:], doc("y", "two"))
    await admit_all(late, connection)
    assert await waiting(connection) == 0
    logged = [[row["id"] for row in late.documents(shard)[0].to_pylist()] for shard in late.admitted()]
    assert sorted(id_ for ids in logged for id_ in ids) == sorted(["x", "y", *(f"a#{n}" for n in range(6))])
    whole = next(ids for ids in logged if "a#0" in ids)
    start = whole.index("a#0")
    assert whole[start : start + 6] == [f"a#{number}" for number in range(6)]
    assert not any(receipt.rejected for receipt in await receipts(connection))
