"""Known-bad variants of the queue, of admission and of what stands around them, and what must catch each.

A layer that lets one of its mutants live has gone blind. `contract` is tests/contract: one scenario on real servers.
`simulation` is tests/simulation: the whole system on virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from embedmill import connection
from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import Marker
from embedmill.dataset.local_store import LocalStore
from embedmill.inbox import InboxMessage
from embedmill.messages import Announcement, DeadLetter, Task
from scheduler.inbox import InboxAdmission, _MessageBatch
from scheduler.queue import Queue
from tests.contract import cap_scenarios as caps
from tests.contract import inbox_scenarios as inbox
from tests.contract import queue_scenarios as queue
from tests.contract import scheduler_scenarios as scheduler
from tests.contract.queue_scenarios import Scenario

Layer = Literal["contract", "simulation"]
# More seeds follow a known one: any change of the product gives every seed another history.
_SEEDS = 60
# Taken before anything is patched.
_script_text = connection.script_text
_finish = Queue.finish
_commit = Dataset.commit
_run_script = InboxAdmission._run_script
_admit = InboxAdmission._admit


@dataclass(frozen=True)
class Mutant:
    """`apply()` is a context in which the product has the fault.

    noticed_by: the scenario of the contract that must fail; seeds: one of them must make the simulation fail.
    """

    name: str
    apply: Callable[[], AbstractContextManager[Any]]
    noticed_by: Scenario | None = None
    seeds: range | None = None


def script_mutant(scripts: str, text: str, replacement: str) -> Callable[[], AbstractContextManager[Any]]:
    """The script, or several by names with blanks between, with `text`, which stands in each once, replaced."""

    def mutated(name: str) -> str:
        source = _script_text(name)
        if name not in {f"scheduler/{script}" for script in scripts.split()}:
            return source
        assert source.count(text) == 1, f"{name} has {text!r} {source.count(text)} times: the mutant is out of date"
        return source.replace(text, replacement)

    return lambda: mock.patch.object(connection, "script_text", mutated)


async def _finish_in_two_calls(self: Queue, task: Task, *, dead: Sequence[DeadLetter] = ()) -> bool:
    removed = await _finish(self, task, dead=dead)
    if removed:
        record = Announcement(task.dataset, task.dataset_id, task.shard).to_json()
        await self._connection.command("XADD", f"{self._prefix}:announced", "*", "shard", record)
    return removed


def _finish_apart() -> AbstractContextManager[Any]:
    text = "redis.call('XADD', prefix .. ':announced', 'MAXLEN', '~', 100000, '*', 'shard', ARGV[3])\n"
    both = ExitStack()
    both.enter_context(script_mutant("finish", text, "")())
    both.enter_context(mock.patch.object(Queue, "finish", _finish_in_two_calls))
    return both


def _commit_later(self: Dataset, marker: Marker) -> Marker:
    """Markers are kept in memory until the next one."""
    late: list[Marker] = self.__dict__.setdefault("late", [])
    while late:
        _commit(self, late.pop())
    late.append(marker)
    return marker


def _publish_over_others(_store: LocalStore, temporary: Path, path: Path) -> None:
    temporary.replace(path)


async def _queue_after_removing(self: InboxAdmission, task: Task | None, batches: Sequence[Any]) -> None:
    await _run_script(self, None, batches)
    if task is not None:
        await self._queue.enqueue([task])


async def _remove_before_admitting(self: InboxAdmission, messages: Sequence[InboxMessage]) -> None:
    await _run_script(self, None, [_MessageBatch(m.key, m.records, message=m) for m in messages])
    await _admit(self, messages)


async def _reconcile_nothing(*_arguments: Any, **_options: Any) -> int:
    return 0


def _patched(target: str, replacement: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch(target, replacement)


def _from(seed: int) -> range:
    """Seeds from one that is known to notice the mutant, and soon."""
    return range(seed, seed + _SEEDS)


MUTANTS = [
    Mutant(
        "extend without a fence",
        script_mutant("extend", "task[1] == ARGV[i + 1] and ", ""),
        queue.an_old_lease_cannot_extend_a_later_one,
        _from(10),
    ),
    Mutant(
        "hand back without a fence",
        script_mutant("give_back", "redis.call('HGET', key, 'epoch') ~= epoch or ", ""),
        queue.an_old_lease_can_neither_release_nor_retry_a_later_one,
        _from(0),
    ),
    Mutant(
        "finish leaves the lease",
        script_mutant("finish", "  redis.call('ZREM', leased, id)\n", ""),
        queue.a_finished_task_is_nowhere,
        _from(2),
    ),
    Mutant(
        "nothing is ever reclaimed",
        script_mutant("lease extend", "\nback(leased)\n", "\n"),
        queue.what_a_dead_worker_held_comes_back,
        _from(0),
    ),
    Mutant(
        "reclaim that looks at one lease, and that the newest",
        script_mutant(
            "lease",
            "ipairs(redis.call('ZRANGEBYSCORE', from, '-inf', now_ms, 'LIMIT', 0, 100)) do\n",
            "ipairs(redis.call('ZRANGE', from, -1, -1)) do\n    if tonumber(redis.call('ZSCORE', from, id)) > now_ms then"
            " break end\n",
        ),
        queue.expired_leases_all_come_back_beside_one_that_lives,
    ),
    Mutant(
        "an epoch that starts again when Redis was lost",
        script_mutant("lease", "math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))", "last + 1"),
        queue.a_lease_from_before_redis_lost_everything_is_lost,
        _from(2),
    ),
    Mutant(
        "deliveries that progress does not reset",
        script_mutant("extend", "if ARGV[i + 2] == '1' then", "if false then"),
        queue.deliveries_count_until_there_is_progress,
        _from(11),
    ),
    Mutant(
        "enqueue that forgets that a task is known",
        script_mutant("enqueue", "if redis.call('EXISTS', task_key(id)) == 0 then", "if true then"),
        queue.a_known_task_is_not_added_again,
        _from(2),
    ),
    Mutant(
        "a clock that was set back holds up what it gave",
        script_mutant("lease", "    local latest = now_ms + tonumber(longest)\n", "    local latest = math.huge\n"),
        queue.a_clock_that_was_set_back_delays_what_is_due_by_no_more_than_it_was_given_for,
    ),
    Mutant(
        "one turn for the bulk of all embedders",
        script_mutant("lease", "'turn:' .. mine", "'turn:'"),
        queue.bulk_of_one_embedder_has_its_turns_whatever_others_take,
    ),
    Mutant(
        "extend without reclaim",
        script_mutant("extend", "\nback(leased)\n", "\n"),
        queue.what_expired_and_what_is_due_comes_back_when_a_full_worker_extends,
    ),
    Mutant(
        "a release that stays charged",
        script_mutant("give_back", "  refund()\n", ""),
        queue.what_is_released_is_not_charged,
    ),
    Mutant(
        "drop of what is not leased",
        script_mutant("drop", " or not redis.call('ZSCORE', leased, ARGV[1])", ""),
        queue.only_what_is_leased_can_be_dropped,
    ),
    Mutant(
        # The simulation does not see it: the scheduler reconciles the queue with the log, and nothing is lost.
        "admit takes messages away before the shard is queued",
        _patched("scheduler.inbox.InboxAdmission._run_script", _queue_after_removing),
        inbox.a_message_stays_until_its_shard_is_queued,
    ),
    Mutant(
        "admit takes messages away before the log has them",
        _patched("scheduler.inbox.InboxAdmission._admit", _remove_before_admitting),
        inbox.a_message_stays_until_its_shard_is_queued,
        _from(10),
    ),
    Mutant(
        # Nor this: the same text again is no new version, unless one message has two versions of a document.
        "admission does not look up the keys of batches in the log",
        _patched("embedmill.dataset.index.DatasetIndex.batches", lambda _index, _keys: {}),
        inbox.a_message_that_is_read_again_adds_nothing,
    ),
    Mutant(
        "a message that is sent again ends the document that it is a part of",
        _patched("scheduler.gathering.Gathering.hold_again", lambda *_: False),
        inbox.a_document_whose_messages_are_lost_and_sent_again_is_admitted_whole,
    ),
    Mutant(
        "a job makes room for another in the middle of a document",
        _patched("scheduler.admission.Admitter.is_gathering", False),
        inbox.documents_of_many_jobs_are_gathered_side_by_side,
    ),
    Mutant(
        "what waits for the last passage of its document takes no room",
        _patched("scheduler.admission.Admitter.gathered_bytes", 0),
        inbox.documents_whose_last_passage_never_comes_are_refused_where_they_take_too_much_room,
    ),
    Mutant("finish and announce in two calls", _finish_apart, seeds=_from(2)),
    Mutant(
        "finish before the marker is durable",
        _patched("embedmill.dataset.dataset.Dataset.commit", _commit_later),
        seeds=_from(2),
    ),
    Mutant(
        "objects that overwrite each other",
        _patched("embedmill.dataset.local_store.LocalStore._publish", _publish_over_others),
        seeds=_from(0),
    ),
    Mutant(
        "a scheduler that rebuilds nothing",
        _patched("scheduler.service.reconcile", _reconcile_nothing),
        scheduler.what_is_owed_and_not_queued_is_queued,
    ),
    Mutant(
        "a scheduler that sweeps nothing",
        # What is left over does not show in the simulation until somebody dies at the right place: in one seed of many.
        _patched("scheduler.housekeeping.Housekeeping.sweep", lambda _self: None),
        scheduler.what_a_worker_left_of_a_committed_shard_is_swept,
    ),
    Mutant(
        "a cap that forgets what is under way",
        script_mutant("cap_reserve", " and spent + held + most <= limit then", " then"),
        caps.workers_together_never_hold_more_than_the_cap_leaves,
    ),
    Mutant(
        "a cap for which nobody waits",
        script_mutant("cap_reserve", "if spent + most > limit then", "if spent + held + most > limit then"),
        caps.what_others_give_back_is_there_at_once_and_what_never_fits_is_refused,
    ),
    Mutant(
        "a request that is charged each time it is settled",
        script_mutant("cap_settle", "  redis.call('HDEL', KEYS[3], ARGV[1])\n", ""),
        caps.a_request_is_charged_once_with_what_it_was_billed,
    ),
    Mutant(
        "a hold for each time of asking",
        script_mutant("cap_reserve", "if redis.call('HEXISTS', KEYS[3], op) == 1 then", "if false then"),
        caps.asking_again_for_one_request_holds_it_once,
    ),
    Mutant(
        "what a dead worker held stays held",
        script_mutant("cap_reserve", "redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', whole(now), 'LIMIT', 0, 100)", "{}"),
        caps.a_dead_workers_hold_comes_back_but_for_what_it_may_have_cost,
    ),
    Mutant(
        "what a dead worker sent is free",
        script_mutant("cap_reserve", "spent + tonumber(their_doubtful)", "spent"),
        caps.a_dead_workers_hold_comes_back_but_for_what_it_may_have_cost,
    ),
    Mutant(
        "holds that expire while their worker lives",
        script_mutant("cap_keep", "  if not unknown then redis.call('ZADD'", "  if false then redis.call('ZADD'"),
        caps.a_living_workers_hold_stays,
    ),
    Mutant(
        "an account that begins at nothing",
        _patched("embedmill.dataset.spending.SpendLogs.charged", lambda _logs, _job, with_markers=False: 0),
        caps.an_account_that_was_lost_is_read_from_the_spend_logs,
    ),
    Mutant(
        "an account that does not take up what others hold",
        script_mutant("cap_keep", "  if unknown and birth", "  if false and birth"),
        caps.an_account_that_was_lost_learns_what_living_workers_hold,
    ),
    Mutant(
        "an account that is open as soon as it is born",
        script_mutant("cap_reserve", "now + tonumber(ARGV[7])", "now"),
        caps.an_account_that_was_lost_learns_what_living_workers_hold,
    ),
    Mutant(
        "what was sent before the account was lost is free",
        script_mutant("cap_settle", "elseif ARGV[3] ~= '' and", "elseif false and"),
        caps.what_was_under_way_when_the_account_was_lost_is_charged_once,
    ),
    Mutant(
        "what ends while the logs are read is free",
        script_mutant("cap_settle", "redis.call('HINCRBY', KEYS[1], 'late', charge)", ""),
        caps.what_ends_while_the_logs_are_read_is_charged,
    ),
    Mutant(
        "a cap that believes its own account alone",
        script_mutant("cap_reserve", "spent = math.max(spent, tonumber(ARGV[6]) - held)", ""),
        caps.logs_that_know_of_more_are_believed,
    ),
    Mutant(
        "what is logged and not settled is charged twice",
        script_mutant("cap_reserve", "tonumber(ARGV[6]) - held)", "tonumber(ARGV[6]))"),
        caps.what_is_logged_and_not_settled_yet_is_not_charged_twice,
    ),
    Mutant(
        "an account that waits for nobody whose requests no log has",
        _patched("scheduler.caps.JobCap._begin", lambda _cap: False),
        caps.an_account_that_was_lost_waits_for_requests_that_no_log_has_yet,
    ),
    Mutant(
        "an account that waits though nobody was there before",
        _patched("scheduler.caps.JobCap._begin", lambda _cap: True),
        caps.the_first_request_of_a_new_job_waits_for_nobody,
    ),
    Mutant(
        "a cap for requests that does not know of batches",
        _patched("embedmill.dataset.spending.JobAccount._open_intents", lambda _account: []),
        caps.what_open_batches_can_cost_is_given_to_nobody_until_their_bill_is_known,
    ),
    Mutant(
        "an account that takes up what has ended",
        script_mutant("cap_keep", " and redis.call('SISMEMBER', KEYS[4], op) == 0", ""),
        caps.what_ended_without_a_bill_is_not_taken_up_again,
    ),
    Mutant(
        "a cap that looks for batches now and then only",
        script_mutant("cap_settle", "if ARGV[4] == '1' and", "if false and"),
        caps.a_batch_is_held_until_it_is_noted_and_then_everybody_knows_of_it,
    ),
]


def mutants_for(layer: Layer) -> list[Mutant]:
    return [m for m in MUTANTS if (m.noticed_by if layer == "contract" else m.seeds) is not None]
