"""Messages of an inbox as they are read: what is in them can be used, or is refused, whoever wrote them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from embedmill.documents import Reject, SourceDocument
from embedmill.errors import InputRejected
from embedmill.inbox import InboxMessage, check_key, encode_document, read_message

NOT_UTF8 = b"\xff\xfe".decode("utf-8", "surrogateescape")


def read(*documents: Any, **fields: str) -> InboxMessage:
    lines = "\n".join(json.dumps(document) for document in documents or [{"id": "a", "text": "t"}])
    return read_message("5-0", {"v": "1", "documents": lines, **fields}, inbox="wiki")


def read_one(**document: Any) -> SourceDocument | Reject:
    (record,) = read(document).records
    return record


@pytest.mark.parametrize(
    "job", ["../../evil", "a/b", "..", ".hidden", "j" * 5000, "a\0b", "a\nb", NOT_UTF8, "a b", "é"]
)
def test_a_message_for_what_is_no_job_is_refused_and_has_the_job_main(job: str) -> None:
    message = read(job=job, key="mine")
    assert "`job`" in message.refusal
    assert (message.job, message.key, message.records) == ("main", "mine", ())
    assert message.raw["job"] == job


@pytest.mark.parametrize("key", ["k" * 513, "a\0b", NOT_UTF8, "inbox/1-0/0000", "inbox/" + "x" * 10_000])
def test_a_message_whose_key_is_none_is_refused_and_has_that_of_a_message_without(key: str) -> None:
    message = read(key=key, job="news")
    assert message.refusal
    assert len(message.refusal) < 300
    message.refusal.encode()
    assert message.key == read().key
    assert message.key.startswith("inbox/5-0/")
    assert message.job == "main"


@pytest.mark.parametrize("fields", [{"v": "2"}, {"lane": "fast"}, {"documents": " \n"}])
def test_a_message_that_is_refused_for_anything_else_keeps_its_key_and_no_job(fields: dict[str, str]) -> None:
    message = read(**{"key": "mine", "job": "news", **fields})
    assert message.refusal
    assert (message.key, message.job, message.records) == ("mine", "main", ())


def test_a_good_message_has_its_own_key_and_job() -> None:
    message = read(key="mine", job="news-2.b_c")
    assert (message.refusal, message.key, message.job, len(message.records)) == ("", "mine", "news-2.b_c", 1)


@pytest.mark.parametrize("key", [5, None, b"k", "", "inbox/x", "a\nb"])
def test_what_cannot_be_a_key_is_refused_in_a_sentence(key: object) -> None:
    with pytest.raises(InputRejected, match="key"):
        check_key(key)


@pytest.mark.parametrize("number", ["0", "1", "10", "999999999"])
def test_a_passage_has_the_id_of_its_document_and_its_number(number: str) -> None:
    record = read_one(id=f"D#1#{number}", text="t", group="D#1")
    assert isinstance(record, SourceDocument)
    assert (record.id, record.group) == (f"D#1#{number}", "D#1")


@pytest.mark.parametrize(
    "id_", ["a", "D", "D#", "D#01", "D#-1", "D#1.0", "D#x", "E#0", "D#٣", "D#1000000000", "D#0#0", "D #0"]
)
def test_a_passage_with_another_id_is_refused_where_it_is_added_and_where_it_is_read(id_: str) -> None:
    record = read_one(id=id_, text="t", group="D")
    assert isinstance(record, Reject)
    assert "GROUP#0" in record.reason
    assert record.id == id_
    with pytest.raises(InputRejected, match="GROUP#0"):
        encode_document(id_, "t", group="D")


def test_only_a_passage_can_be_said_not_to_be_the_last() -> None:
    record = read_one(id="a", text="t", last=False)
    assert isinstance(record, Reject)
    assert "`group`" in record.reason
    with pytest.raises(InputRejected, match="`group`"):
        encode_document("a", "t", last=False)


@pytest.mark.parametrize("digits", [513, 900, 4000])
def test_an_integer_is_an_id_of_so_many_bytes_as_it_has_digits(digits: int) -> None:
    record = read_one(id=int("9" * digits), text="t")
    assert isinstance(record, Reject)
    assert "longer than 512 bytes" in record.reason
    assert record.id is None
    accepted = read_one(id=int("9" * 512), text="t")
    assert isinstance(accepted, SourceDocument)
    assert accepted.id == "9" * 512


@pytest.mark.parametrize("id_", [10**513, 10**5000, -(10**512)], ids=["long", "unwritable", "negative"])
def test_an_integer_that_python_does_not_write_is_too_long_as_well(id_: int) -> None:
    with pytest.raises(InputRejected, match="longer than 512 bytes"):
        encode_document(id_, "t")


def test_a_refused_document_is_named_by_its_id_where_that_is_one() -> None:
    ids = [5, "five", "x" * 600, None, True]
    assert [record.id for record in read(*({"id": id_, "text": ""} for id_ in ids)).records] == [
        "5",
        "five",
        None,
        None,
        None,
    ]


def test_fields_that_are_neither_true_nor_false_are_refused_where_they_are_added() -> None:
    for fields in ({"deleted": None}, {"deleted": "yes"}, {"last": None, "group": "D"}):
        with pytest.raises(InputRejected, match="true or false"):
            encode_document("D#0", "t", **fields)  # type: ignore[arg-type]
