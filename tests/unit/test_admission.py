"""Admission: what becomes a row of the log, under which version, whoever else admits at the same time."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import CANCELLED, Marker
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ObjectExists, StorageError
from scheduler import admission
from scheduler.admission import Admitted, Admitter
from scheduler.readings import Batch
from tests.datasets import document, small_dataset
from tests.invariants import logged_ids

Row = tuple[str, int, str]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "d", shard_rows=4)


_opened: list[DatasetIndex] = []


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def index_of(dataset: Dataset) -> DatasetIndex:
    index = Dataset.open(dataset.url).open_index()
    _opened.append(index)
    return index


def admitter_on(dataset: Dataset) -> Admitter:
    return Admitter(Dataset.open(dataset.url), index_of(dataset), job="main")


def documents(texts: Iterable[tuple[str, str]]) -> list[SourceDocument]:
    return [document(id_, text, record=number) for number, (id_, text) in enumerate(texts, start=1)]


def push(dataset: Dataset, key: str, records: Sequence[SourceDocument | Reject]) -> tuple[Admitter, Admitted]:
    """Admit a whole push with an admitter of its own."""
    admitter = admitter_on(dataset)
    admitted = admitter.admit(key, f"{key}.jsonl", records)
    admitted.tasks.extend(admitter.close_shard())
    return admitter, admitted


def log_of(dataset: Dataset) -> list[Row]:
    rows = []
    for shard in dataset.admitted():
        table, origin = dataset.documents(shard)
        assert origin.shard == shard
        rows += [(r["id"], r["version"], r["text"]) for r in table.to_pylist()]
    return rows


def pushes_of_rows(dataset: Dataset) -> list[tuple[str, str]]:
    """(push key, id) of every row of the log."""
    found = []
    for shard in dataset.admitted():
        table, origin = dataset.documents(shard, columns=["id"])
        ids: list[str] = [record["id"] for record in table.to_pylist()]
        for row, id_ in enumerate(ids):
            found.append(([s.push_key for s in origin.sources if s.first_row <= row][-1], id_))
    return found


def newest(log: Iterable[Row]) -> dict[str, str]:
    texts: dict[str, tuple[int, str]] = {}
    for id_, version, text in log:
        texts[id_] = max(texts.get(id_, (0, "")), (version, text))
    return {id_: text for id_, (_, text) in texts.items()}


def check_log(dataset: Dataset, offered: dict[str, list[tuple[str, str]]]) -> None:
    """What holds for any number of admitters, in any order: see each assertion."""
    log = log_of(dataset)
    versions: dict[str, list[tuple[int, str]]] = {}
    for id_, version, text in log:
        versions.setdefault(id_, []).append((version, text))
    for id_, found in versions.items():
        assert [version for version, _ in found] == list(range(1, len(found) + 1)), f"versions of {id_}: {found}"
        repeated = [text for (_, text), (_, following) in itertools.pairwise(found) if text == following]
        assert not repeated, f"{id_} was admitted again although it had not changed: {found}"
    rows = pushes_of_rows(dataset)
    assert len(rows) == len(set(rows)), "a push admitted one of its ids twice"
    lost = {(id_, text) for texts in offered.values() for id_, text in texts} - {(id_, text) for id_, _, text in log}
    assert not lost, f"lost: {lost}"
    invented = {(id_, text) for id_, _, text in log} - {pair for texts in offered.values() for pair in texts}
    assert not invented, f"invented: {invented}"
    index = index_of(dataset)
    for key, texts in offered.items():
        cursor = index.cursor(key)
        assert cursor is None or cursor.record <= len(texts)


def test_documents_fill_shards_in_the_order_of_reading(dataset: Dataset) -> None:
    admitter, admitted = push(dataset, "p", documents((f"i{n}", f"t{n}") for n in range(10)))
    assert log_of(dataset) == [(f"i{n}", 1, f"t{n}") for n in range(10)]
    assert [(task.shard, task.rows, task.job, task.dataset_id) for task in admitted.tasks] == [
        (0, 4, "main", "d0"),
        (1, 4, "main", "d0"),
        (2, 2, "main", "d0"),
    ]
    assert [task.text_bytes for task in admitted.tasks] == [8, 8, 4]
    assert (admitter.counts.new, admitter.counts.admitted) == (10, 10)


def test_what_was_not_closed_is_not_in_the_log_and_closing_nothing_makes_no_shard(dataset: Dataset) -> None:
    admitter = admitter_on(dataset)
    assert admitter.admit("p", "p", documents([("a", "1")])).tasks == []
    assert dataset.admitted() == []
    assert [task.rows for task in admitter.close_shard()] == [1]
    assert admitter.close_shard() == []
    assert dataset.admitted() == [0]


def test_an_id_that_stands_twice_in_one_source_is_rejected_before_and_after_its_shard_was_closed(
    dataset: Dataset,
) -> None:
    records = documents([("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("d", "1"), ("a", "3")])
    admitter, admitted = push(dataset, "p", records)
    assert [(reject.id, reject.place) for reject in admitted.rejects] == [("a", "source:2"), ("a", "source:6")]
    assert all("stands twice" in reject.reason for reject in admitted.rejects)
    assert newest(log_of(dataset)) == {"a": "1", "b": "1", "c": "1", "d": "1"}
    assert admitter.counts.rejected == 2


def test_rejects_of_the_source_are_passed_on_and_counted(dataset: Dataset) -> None:
    reject = Reject("source:2", "it is empty", Cursor(record=2))
    _, admitted = push(dataset, "p", [document("a", "1", record=1), reject])
    assert admitted.rejects == [reject]
    assert log_of(dataset) == [("a", 1, "1")]


def test_an_unchanged_document_is_not_admitted_again_and_a_changed_one_gets_the_next_version(dataset: Dataset) -> None:
    push(dataset, "p", documents([("a", "1"), ("b", "1"), ("c", "1")]))
    admitter, _ = push(dataset, "q", documents([("a", "1"), ("b", "2"), ("e", "1")]))
    assert log_of(dataset)[3:] == [("b", 2, "2"), ("e", 1, "1")]
    counts = admitter.counts
    assert (counts.new, counts.updated, counts.unchanged, counts.admitted) == (1, 1, 1, 2)
    push(dataset, "r", documents([("b", "1")]))
    assert log_of(dataset)[5:] == [("b", 3, "1")]


def test_two_pushes_in_one_open_shard_version_one_another(dataset: Dataset) -> None:
    admitter = admitter_on(dataset)
    admitter.admit("p", "p", documents([("a", "1"), ("b", "1")]))
    admitter.admit("q", "q", documents([("a", "2"), ("b", "1")]))
    admitter.close_shard()
    assert log_of(dataset) == [("a", 1, "1"), ("b", 1, "1"), ("a", 2, "2")]


def test_new_metadata_alone_carries_the_vector_over(dataset: Dataset) -> None:
    push(dataset, "p", documents([("z", "0"), ("a", "1")]))
    changed = [
        document("a", "1", record=1, metadata='{"k":1}'),
        document("z", "9", record=2),
        document("n", "1", record=3),
    ]
    push(dataset, "q", changed)
    _, origin = dataset.documents(1)
    assert origin.carried == {0: (0, 1)}
    assert log_of(dataset)[2:] == [("a", 2, "1"), ("z", 2, "9"), ("n", 1, "1")]


def test_the_bytes_of_texts_close_a_shard_before_it_is_full(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_SHARD_TEXT_BYTES", 10)
    _, admitted = push(dataset, "p", documents([("a", "ü" * 5), ("b", "x" * 9), ("c", "x"), ("d", "x" * 99)]))
    assert [(task.rows, task.text_bytes) for task in admitted.tasks] == [(1, 10), (2, 10), (1, 99)]


def test_reading_goes_on_where_the_log_says_and_a_new_push_starts_at_its_beginning(dataset: Dataset) -> None:
    records = documents((f"i{n}", "t") for n in range(7))
    killed = admitter_on(dataset)
    killed.admit("p", "p", records[:6])
    resumed = admitter_on(dataset)
    assert resumed.reading("p")[1] == Cursor(record=4)
    assert resumed.reading("q")[1] is None
    resumed.admit("p", "p", records[4:])
    resumed.close_shard()
    assert logged_ids(dataset.url) == [f"i{n}" for n in range(7)]
    assert admitter_on(dataset).reading("p")[1] == Cursor(record=7)


def test_the_cursor_passes_records_that_left_no_row(dataset: Dataset) -> None:
    push(dataset, "p", documents([("a", "1"), ("b", "1")]))
    push(dataset, "q", documents([("c", "1"), ("a", "1"), ("b", "1")]))
    assert admitter_on(dataset).reading("q")[1] == Cursor(record=3)


def test_reading_a_logged_push_again_from_its_beginning_changes_nothing(dataset: Dataset) -> None:
    records = documents([("a", "1"), ("b", "1"), ("c", "1")])
    push(dataset, "p", records)
    admitter, admitted = push(dataset, "p", records)
    assert (admitted.tasks, admitted.rejects) == ([], [])
    assert admitter.counts.admitted == 0


def test_a_push_read_again_does_not_bring_back_what_a_later_push_changed(dataset: Dataset) -> None:
    old, new = documents([("a", "1"), ("b", "1")]), documents([("a", "2")])
    push(dataset, "p", old)
    push(dataset, "q", new)
    _, admitted = push(dataset, "p", old)
    assert admitted.rejects == []
    assert log_of(dataset) == [("a", 1, "1"), ("b", 1, "1"), ("a", 2, "2")]


def test_an_admitter_that_was_overtaken_sees_it_although_they_share_the_index(dataset: Dataset) -> None:
    slow, fast = admitter_on(dataset), admitter_on(dataset)
    slow.admit("p", "p", documents([("a", "1"), ("b", "1")]))
    fast.admit("p", "p", documents([("a", "1"), ("b", "1"), ("c", "1")]))
    fast.close_shard()
    assert slow.close_shard() == []
    assert slow.counts.admitted == 0
    slow.admit("q", "q", documents([("a", "2"), ("d", "1")]))
    fast.admit("r", "r", documents([("a", "3")]))
    assert [task.shard for task in fast.close_shard()] == [1]
    assert [task.shard for task in slow.close_shard()] == [2]
    assert log_of(dataset)[3:] == [("a", 2, "3"), ("a", 3, "2"), ("d", 1, "1")]


def test_a_full_disk_loses_nothing_that_a_resumed_admitter_does_not_read_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = documents((f"i{n}", "t") for n in range(6))
    admitter = admitter_on(dataset)

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "append_passages", refuse)
        with pytest.raises(StorageError):
            admitter.admit("p", "p", records)
    resumed = admitter_on(dataset)
    assert resumed.reading("p")[1] is None
    push(dataset, "p", records)
    assert logged_ids(dataset.url) == [f"i{n}" for n in range(6)]


def read_push(dataset: Dataset, key: str, records: Sequence[SourceDocument], *, block: int) -> list[int]:
    """One process' part: an admitter that reads a push in blocks; its shards."""
    admitter = admitter_on(dataset)
    shards = []
    after = admitter.reading(key)[1]
    left = [record for record in records if after is None or record.cursor > after]
    for start in range(0, len(left), block):
        shards += [task.shard for task in admitter.admit(key, key, left[start : start + block]).tasks]
    return shards + [task.shard for task in admitter.close_shard()]


@pytest.mark.parametrize("keys", [["p", "p"], ["p", "q"], ["p", "p", "q"]], ids="-".join)
def test_admitters_racing_on_one_dataset_leave_a_dense_log_without_loss_or_repetition(
    tmp_path: Path, keys: list[str]
) -> None:
    for number in range(4):
        dataset = small_dataset(tmp_path / str(number), shard_rows=4)
        offered = {key: [(f"i{n}", f"{key}{n % 3}" if n % 2 else "same") for n in range(50)] for key in keys}
        barrier = threading.Barrier(len(keys))

        def read(
            part: tuple[int, str],
            dataset: Dataset = dataset,
            offered: dict[str, list[tuple[str, str]]] = offered,
            barrier: threading.Barrier = barrier,
        ) -> list[int]:
            barrier.wait(10)
            return read_push(dataset, part[1], documents(offered[part[1]]), block=5 + 2 * part[0])

        with ThreadPoolExecutor(len(keys)) as pool:
            shards = list(pool.map(read, enumerate(keys)))
        assert sorted(itertools.chain(*shards)) == dataset.admitted(), "every shard is the task of one admitter"
        check_log(dataset, offered)
        assert index_of(dataset).cursor(keys[-1]) is not None


@settings(max_examples=60, deadline=None)
@given(
    pushes=st.dictionaries(
        st.sampled_from(["p", "q", "r"]),
        st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["1", "2", "3"]), min_size=1),
        min_size=1,
    ),
    seed=st.integers(0, 10**6),
    admitters=st.integers(1, 3),
)
def test_any_interleaving_of_admitters_loses_and_repeats_nothing(
    pushes: dict[str, dict[str, str]], seed: int, admitters: int
) -> None:
    """Every admitter reads every push, in an order and in blocks of its own; the steps of all are interleaved."""
    offered = {key: list(texts.items()) for key, texts in pushes.items()}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        dataset = small_dataset(Path(folder), shard_rows=4)
        parts = [(admitter_on(dataset), _blocks(offered, rng)) for _ in range(admitters)]
        while parts:
            admitter, blocks = rng.choice(parts)
            if not blocks:
                admitter.close_shard()
                parts = [part for part in parts if part[0] is not admitter]
                continue
            key, block = blocks.pop(0)
            admitted = admitter.admit(key, key, block)
            assert admitted.rejects == []
            if rng.random() < 0.2:
                admitter.close_shard()
        check_log(dataset, offered)


def _blocks(offered: dict[str, list[tuple[str, str]]], rng: random.Random) -> list[tuple[str, list[SourceDocument]]]:
    blocks = []
    for key in rng.sample(sorted(offered), len(offered)):
        records = documents(offered[key])
        size = rng.randint(1, 4)
        blocks += [(key, records[start : start + size]) for start in range(0, len(records), size)]
    return blocks


@settings(max_examples=30, deadline=None)
@given(
    pushes=st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["1", "2"]), min_size=1), min_size=1, max_size=4
    ),
    together=st.booleans(),
)
def test_of_pushes_one_after_another_the_last_one_wins(pushes: list[dict[str, str]], together: bool) -> None:
    """The rule for the final text: the push that was admitted last, whether in one open shard or in several."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = small_dataset(Path(folder), shard_rows=4)
        admitter = admitter_on(dataset)
        for number, texts in enumerate(pushes):
            admitter.admit(str(number), "name", documents(texts.items()))
            if not together:
                admitter.close_shard()
                admitter = admitter_on(dataset)
        admitter.close_shard()
        expected: dict[str, str] = {}
        for texts in pushes:
            expected |= texts
        assert newest(log_of(dataset)) == expected
        check_log(dataset, {str(number): list(texts.items()) for number, texts in enumerate(pushes)})


def test_the_number_of_a_shard_is_taken_once(dataset: Dataset) -> None:
    push(dataset, "p", documents([("a", "1")]))
    table, origin = dataset.documents(0)
    assert table.num_rows == 1
    with pytest.raises(ObjectExists):
        dataset.append_passages(0, [], origin=origin)


def cancel_all(dataset: Dataset) -> None:
    for shard in dataset.owed():
        rows = dataset.documents(shard)[0].num_rows
        statuses = np.full(rows, CANCELLED, np.uint8)
        dataset.commit(Marker(shard, statuses, dataset.info.embedder.fingerprint, "t", "w", "now"))


def test_a_source_whose_rows_were_given_up_is_read_from_its_beginning_once_more(dataset: Dataset) -> None:
    texts = [("a", "1"), ("b", "2")]
    push(dataset, "k", documents(texts))
    assert admitter_on(dataset).reading("k")[1] == Cursor(record=2)
    cancel_all(dataset)
    key, after = admitter_on(dataset).reading("k")
    assert (key, after) == ("k.1", None)
    again, _ = push(dataset, key, documents(texts))
    assert again.counts.updated == 2
    assert admitter_on(dataset).reading("k") == ("k.1", Cursor(record=2))
    assert admitter_on(dataset).reading("other") == ("other", None)


def test_a_batch_whose_rows_were_given_up_is_admitted_again_under_its_key(dataset: Dataset) -> None:
    def admit(key: str, text: str) -> Batch:
        admitter, batch = admitter_on(dataset), Batch(key, documents([("a", text), ("b", "same")]))
        admitter.admit_batches([batch])
        admitter.close_batches()
        return batch

    assert admit("k", "old").counts.new == 2
    cancel_all(dataset)
    assert admit("other", "new").counts.updated == 2
    cancel_all(dataset)
    again = admit("k", "old").counts
    assert (again.repeated, again.updated) == (1, 1)
    assert newest(log_of(dataset)) == {"a": "new", "b": "same"}
