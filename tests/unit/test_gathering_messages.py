"""Late chunking through an inbox: documents over several messages, which may be lost and come again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import CANCELLED, EMBEDDED, Marker
from embedmill.documents import SourceDocument
from scheduler.batches import Closed
from scheduler.readings import Batch
from tests.datasets import document
from tests.late_documents import (
    admitter_on,
    batch,
    check_contexts,
    close_indexes,
    counted,
    keys,
    late_dataset,
    push,
    shards,
    split,
)


@pytest.fixture
def dataset(late: Dataset) -> Dataset:
    return late


def test_a_document_over_two_messages_keeps_the_first_one_waiting(dataset: Dataset) -> None:
    passages = split("a", *"123", record=1)
    admitter = admitter_on(dataset)
    first = admitter.admit_batches([batch("m1", document("x", "0", record=1), *passages[:2])])
    assert keys(first) == []
    assert keys([admitter.close_batches()]) == []
    second = admitter.admit_batches([batch("m2", passages[2])])
    assert keys([*second, admitter.close_batches()]) == ["m1", "m2"]
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["x"], ["a#0", "a#1", "a#2"]]


def test_a_message_that_waited_is_read_again_by_the_next_admitter(dataset: Dataset) -> None:
    passages = split("a", *"123", record=1)
    messages = [batch("m1", document("x", "0", record=1), *passages[:2]), batch("m2", passages[2])]
    before = admitter_on(dataset)
    before.admit_batches(messages[:1])
    before.close_batches()
    admitter = admitter_on(dataset)
    done = admitter.admit_batches(messages)
    assert keys([*done, admitter.close_batches()]) == ["m1", "m2"]
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["x"], ["a#0", "a#1", "a#2"]]


def test_passages_that_do_not_follow_each_other_are_refused_with_their_message(dataset: Dataset) -> None:
    passages = split("a", *"123", record=1)
    torn = [batch("m1", *passages[:2]), batch("m2", document("x", "0", record=1)), batch("m3", passages[2])]
    admitter = admitter_on(dataset)
    done = admitter.admit_batches(torn)
    assert keys([*done, admitter.close_batches()]) == ["m1", "m2", "m3"]
    assert [reject.id for reject in torn[0].rejects] == ["a#0", "a#1"]
    assert [reject.id for reject in torn[2].rejects] == ["a#2"]
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["x"]]


@pytest.mark.parametrize("again", [(0, 1), (1, 0), (1,), (0,), (0, 1, 0, 1)])
def test_messages_that_are_sent_again_in_the_middle_of_a_document_do_not_tear_it(
    dataset: Dataset, again: tuple[int, ...]
) -> None:
    """As after Redis lost its data: under their keys, in any order, before the message with the last passage."""
    passages = split("X", *"123", record=1)
    sent = [batch("p-1", passages[0]), batch("p-2", passages[1])]
    repeated = [batch(f"p-{number + 1}", passages[number]) for number in again]
    last = batch("p-3", passages[2])
    admitter = admitter_on(dataset)
    early = [closed for one in [*sent, *repeated] for closed in admitter.admit_batches([one])]
    assert keys([*early, admitter.close_batches()]) == []
    done = [*admitter.admit_batches([last]), admitter.close_batches()]
    assert keys(done) == [one.key for one in [*sent, *repeated, last]]
    assert shards(dataset) == [[("X#0", 1, False), ("X#1", 1, False), ("X#2", 1, False)]]
    assert counted([*sent, last]) == [(1, 0, 0)] * 3
    assert counted(repeated) == [(0, 1, 0)] * len(repeated)


def test_a_document_that_is_not_gone_on_with_is_refused_to_the_message_that_was_sent_again_as_well(
    dataset: Dataset,
) -> None:
    passages = split("X", *"123", record=1)
    sent = [batch("p-1", passages[0]), batch("p-2", passages[1])]
    repeated = [batch("p-1", passages[0]), batch("p-2", passages[1])]
    admitter = admitter_on(dataset)
    done = admitter.admit_batches([*sent, *repeated, batch("other", document("y", "0", record=1))])
    assert keys([*done, admitter.close_batches()]) == ["p-1", "p-2", "p-1", "p-2", "other"]
    assert counted([*sent, *repeated]) == [(0, 0, 1)] * 4
    assert admitter.counts.rejected == 4
    assert [[id_ for id_, _, _ in rows] for rows in shards(dataset)] == [["y"]]


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2), (0, 2, 1), (0, 1, 3)])
def test_a_document_with_a_gap_between_its_passages_is_refused_whole(
    dataset: Dataset, numbers: tuple[int, ...]
) -> None:
    passages = split("X", *"1234", record=1)
    records = [replace(passages[number], last=number == numbers[-1]) for number in numbers]
    sent = [batch(f"p-{number}", record) for number, record in enumerate(records)]
    admitter = admitter_on(dataset)
    done = admitter.admit_batches(sent)
    assert keys([*done, admitter.close_batches()]) == [one.key for one in sent]
    assert [len(one.rejects) for one in sent] == [1] * len(numbers)
    missing = next(place for place, number in enumerate(numbers) if place != number)
    assert f"'X#{missing}' did not come in its place" in sent[0].rejects[0].reason
    assert shards(dataset) == []


def test_a_message_that_the_log_has_and_that_is_sent_again_does_not_end_the_document_that_is_being_read(
    dataset: Dataset,
) -> None:
    """Its receipt was lost with Redis."""
    first, passages = split("Y", "4", "5", record=1), split("X", *"12", record=2)
    logged = [document("a", "0", record=1), *first]
    admitter = admitter_on(dataset)
    admitter.admit_batches([batch("q", *logged), batch("p-1", passages[0])])
    assert keys([admitter.close_batches()]) == ["q"]
    again = batch("q", *logged)
    done = admitter.admit_batches([again, batch("p-1", passages[0]), batch("p-2", passages[1])])
    assert keys([*done, admitter.close_batches()]) == ["p-1", "q", "p-1", "p-2"]
    assert counted([again]) == [(0, 3, 0)]
    assert shards(dataset)[1] == [("X#0", 1, False), ("X#1", 1, False)]


def test_messages_that_are_sent_again_behind_the_last_passage_do_not_wait_for_it_to_come_again(
    dataset: Dataset,
) -> None:
    """Redis lost the first two, and the third was pushed before anybody had seen that."""
    passages = split("X", *"123", record=1)
    sent = [batch(f"p-{number}", passage) for number, passage in enumerate(passages)]
    admitter = admitter_on(dataset)
    done = admitter.admit_batches(sent)
    assert keys([*done, admitter.close_batches()]) == ["p-0", "p-1", "p-2"]
    again = [batch("p-0", passages[0]), batch("p-1", passages[1])]
    assert keys(admitter.admit_batches(again)) == ["p-0", "p-1"]
    assert counted(again) == [(0, 1, 0)] * 2
    assert len(shards(dataset)) == 1


def test_messages_of_a_document_that_was_refused_can_be_sent_again(dataset: Dataset) -> None:
    passages = split("X", *"123", record=1)
    admitter = admitter_on(dataset)
    admitter.admit_batches([batch("p-0", passages[0]), batch("other", document("y", "0", record=1))])
    assert keys([admitter.close_batches()]) == ["p-0", "other"]
    again = [batch(f"p-{number}", passage) for number, passage in enumerate(passages)]
    done = admitter.admit_batches(again)
    assert keys([*done, admitter.close_batches()]) == ["p-0", "p-1", "p-2"]
    assert counted(again) == [(1, 0, 0)] * 3


@pytest.mark.parametrize("status", [EMBEDDED, CANCELLED])
def test_a_document_that_was_given_up_in_part_is_admitted_again_whole(dataset: Dataset, status: int) -> None:
    passages = split("X", *"123", record=1)
    admitter = admitter_on(dataset)
    admitter.admit_batches([batch(f"p-{number}", passage) for number, passage in enumerate(passages)])
    admitter.close_batches()
    statuses = np.array([EMBEDDED, status, EMBEDDED], np.uint8)
    dataset.commit(Marker(0, statuses, dataset.info.embedder.fingerprint, "t", "w", "now"))
    again = [batch(f"p-{number}", passage) for number, passage in enumerate(passages)]
    after = admitter_on(dataset)
    after.admit_batches(again)
    after.close_batches()
    assert counted(again) == [(1, 0, 0) if status == CANCELLED else (0, 1, 0)] * 3


def test_a_message_with_a_whole_document_is_given_back_after_a_lost_race(dataset: Dataset) -> None:
    """Also one that was sent again, and its documents are counted once."""
    passages = split("X", "1", "2", record=1)
    sent = [batch("p-1", passages[0]), batch("p-1", passages[0]), batch("p-2", passages[1])]
    whole = batch("p-3", *split("Y", "3", "4", record=2))
    admitter = admitter_on(dataset)
    admitter.admit_batches([*sent, whole])
    push(dataset, "other", document("z", "0", record=1))
    assert keys([admitter.close_batches()]) == ["p-1", "p-1", "p-2", "p-3"]
    assert counted([*sent, whole]) == [(1, 0, 0), (0, 1, 0), (1, 0, 0), (2, 0, 0)]
    assert shards(dataset)[1] == [("X#0", 1, False), ("X#1", 1, False), ("Y#0", 1, False), ("Y#1", 1, False)]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_redis_loses_and_the_producer_sends_again_every_document_is_admitted_whole(
    data: st.DataObject,
) -> None:
    """One producer, documents over messages, and schedulers that come and go; what has no receipt is sent again in order."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = late_dataset(Path(folder) / "d")
        said = data.draw(st.lists(st.lists(st.sampled_from("xy"), min_size=1, max_size=4), min_size=1, max_size=4))
        records = [r for n, texts in enumerate(said, 1) for r in split(f"d{n}", *texts, record=n)]
        sizes = data.draw(st.lists(st.integers(1, 3), min_size=len(records), max_size=len(records)))
        messages: list[list[SourceDocument]] = []
        while records:
            messages.append(records[: sizes[len(messages)]])
            records = records[len(messages[-1]) :]
        received: set[str] = set()
        stream: list[Batch] = []
        unread: list[Batch] = []
        admitter = admitter_on(dataset)

        def settle(closed: Sequence[Closed]) -> None:
            for one in [one for part in closed for one in part.batches]:
                if one in stream:
                    assert one.rejects == []
                    received.add(one.key)
                    stream.remove(one)

        def send(number: int) -> None:
            message = batch(f"m{number}", *messages[number])
            stream.append(message)
            unread.append(message)

        for number in range(len(messages)):
            send(number)
            for step in data.draw(st.lists(st.sampled_from(["read", "close", "lose", "die"]), max_size=4)):
                if step == "read":
                    settle(admitter.admit_batches(unread))
                    unread.clear()
                elif step == "close":
                    settle([admitter.close_batches()])
                elif step == "lose":
                    stream.clear()
                    unread.clear()
                    for lost in range(number + 1):
                        if f"m{lost}" not in received:
                            send(lost)
                else:
                    admitter = admitter_on(dataset)
                    unread[:] = stream
        settle(admitter.admit_batches(unread))
        settle([admitter.close_batches()])
        assert stream == []
        check_contexts(dataset, {f"d{n}": tuple(texts) for n, texts in enumerate(said, 1)})
        close_indexes()
