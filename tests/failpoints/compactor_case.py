"""A case of the compactor: it dies or stands still in the middle, and the dataset goes on growing."""

from __future__ import annotations

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.verification import verify_dataset
from tests.invariants import check_dataset, final_set, living
from tests.shard_log import ShardLog

from .parts import REFUSED, Place
from .points import Action, Ended, Outcome
from .processes import CRASHED, Processes, until, until_ended


async def run_compactor_case(place: Place, processes: Processes, action: Action) -> Outcome:
    """Raises AssertionError unless the dataset says in the end what one says that nobody has compacted."""
    dataset = Dataset.open(str(place.dataset))
    log = ShardLog(dataset)
    await to_thread.run_sync(_commit_first, log)
    armed = processes.start_armed()
    await until(lambda: place.fault.exists() or armed.exitcode is not None, what="the fault")
    ended: Ended = "went on"
    if action == "stall":
        second = processes.start("compactor")
        await until_ended(second)
        assert second.exitcode == REFUSED, f"a second compactor ended with status {second.exitcode}"
    else:
        await until_ended(armed)
        ended = "died" if armed.exitcode == CRASHED else "gave up"
    await to_thread.run_sync(_commit_late, log)
    await until_ended(armed)
    again = processes.start("compactor")
    await until_ended(again)
    assert again.exitcode == 0, f"a clean compactor ended with status {again.exitcode}"
    seconds = processes.since_the_fault_s()
    await to_thread.run_sync(_check, place, log)
    return Outcome(seconds, ended)


def _commit_first(log: ShardLog) -> None:
    log.shard(("a", "one"), ("b", "one"), ("c", "!bad"))
    log.shard(("a", "two"), ("d", "one"))
    log.shard(("b", None), ("e", "one"), ("f", "one"))
    log.shard(
        ("g", "one"),
    )


def _commit_late(log: ShardLog) -> None:
    log.shard(("a", "three"), ("d", None), ("c", "good"))
    log.shard(("b", "back again"), ("h", "one"))


def _check(place: Place, log: ShardLog) -> None:
    # What a killed process leaves half-written is of no effect, and swept by age.
    place.sweep()
    dataset = Dataset.open(str(place.dataset))
    dataset.publish_shape()
    check_dataset(place.dataset, source=log.source)
    assert verify_dataset(dataset).passed
    found = {id_: row.text for (id_, _), row in living(final_set(place.dataset)).items() if row.status == "embedded"}
    assert found == log.source, f"{found} is there, and {log.source} was written"
    stored = {path.parent.name for path in place.dataset.glob("vectors.zarr/vectors/c/*/0")}
    assert stored <= {str(shard) for shard in dataset.committed()}, f"vectors of {stored} are stored"
