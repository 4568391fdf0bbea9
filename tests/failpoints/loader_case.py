"""A case of the loader: it dies or stands still while it loads into Milvus Lite, and the dataset goes on growing."""

from __future__ import annotations

import json

from anyio import to_thread

from embedmill.dataset.dataset import Dataset

from .loading import BASE, LATE, NEXT, SHARDS, applied, check_ledger, check_loaded, check_source, commit_shards
from .parts import REFUSED, Place
from .points import Action, Ended, Outcome
from .processes import CRASHED, Processes, until, until_ended


async def run_loader_case(place: Place, processes: Processes, action: Action) -> Outcome:
    """Raises AssertionError unless the collection and the ledger say in the end what the dataset says."""
    dataset = Dataset.open(str(place.dataset))
    await to_thread.run_sync(commit_shards, dataset, BASE)
    armed = processes.start_armed()
    await until(lambda: applied(place.dataset) == set(range(len(BASE))), what="the first shards in Milvus")
    await to_thread.run_sync(commit_shards, dataset, NEXT)
    await until(lambda: place.fault.exists() or armed.exitcode is not None, what="the fault")
    ended: Ended = "went on"
    if action == "stall":
        second = processes.start("loader")
        await until_ended(second)
        assert second.exitcode == REFUSED, f"a second loader ended with status {second.exitcode}"
    else:
        await until_ended(armed)
        ended = "died" if armed.exitcode == CRASHED else "gave up"
    await to_thread.run_sync(commit_shards, dataset, LATE)
    current = processes.start("loader") if armed.exitcode is not None else armed
    await until(lambda: _all_applied(place) or current.exitcode is not None, what="all shards in Milvus")
    assert current.exitcode is None, f"the loader ended with status {current.exitcode}"
    seconds = processes.since_the_fault_s()
    await processes.end(armed)
    assert current.exitcode == 0, f"told to end, the loader ended with status {current.exitcode}"
    reader = processes.start("reader")
    await until_ended(reader)
    assert reader.exitcode == 0, f"the collection cannot be read: status {reader.exitcode}"
    await to_thread.run_sync(_check, place, dataset)
    return Outcome(seconds, ended)


def _all_applied(place: Place) -> bool:
    return len(applied(place.dataset)) == len(SHARDS) and not list(place.dataset.glob("loads/*/*.intent.json"))


def _check(place: Place, dataset: Dataset) -> None:
    dataset.publish_shape()
    # What a killed process leaves half-written is of no effect, and swept by age.
    place.sweep()
    check_source(place.dataset)
    check_ledger(place.dataset)
    check_loaded(dataset, json.loads(place.rows.read_text()))
