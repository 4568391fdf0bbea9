"""What an inbox refused, as it stands in the dataset."""

from __future__ import annotations

import json
from pathlib import Path

from embedmill.dataset.dataset import Dataset
from embedmill.documents import Cursor, Reject
from scheduler.refusals import keep_refusals
from tests.datasets import small_dataset


def reject(number: int) -> Reject:
    return Reject(place=f"message {number}", reason="no text", id=None, cursor=Cursor(record=number))


def lines(dataset: Dataset) -> list[bytes]:
    return (Path(dataset.url) / "rejects" / "inbox-wiki.jsonl").read_bytes().split(b"\n")


def test_a_line_that_a_kill_cut_short_spoils_no_other_and_is_said_again(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d")
    keep_refusals(dataset, "wiki", [reject(1), reject(2)])
    path = Path(dataset.url) / "rejects" / "inbox-wiki.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    keep_refusals(dataset, "wiki", [reject(2), reject(3)])
    whole, torn, *added, end = lines(dataset)
    assert [json.loads(line)["place"] for line in (whole, *added)] == ["message 1", "message 2", "message 3"]
    assert torn
    assert torn not in added
    assert end == b""


def test_a_reject_that_is_met_twice_stands_there_once(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d")
    keep_refusals(dataset, "wiki", [reject(1), reject(1)])
    keep_refusals(dataset, "wiki", [reject(1), reject(2)])
    assert [json.loads(line)["place"] for line in lines(dataset)[:-1]] == ["message 1", "message 2"]
