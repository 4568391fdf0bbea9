"""The failpoints of each part, where they lie in words, and what may happen there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["crash", "stall", "lost", "raise"]
Ended = Literal["died", "gave up", "went on"]


@dataclass(frozen=True)
class Point:
    """A failpoint that acts the `at`-th time that it is reached. done, next: the steps before and behind it."""

    part: str
    name: str
    done: str
    next: str
    at: int = 1
    told_to_end: bool = False

    @property
    def actions(self) -> tuple[Action, ...]:
        if self.name.startswith("redis."):
            return ("crash", "stall", "lost") if self.name.endswith(".reply") else ("crash", "stall")
        return ("crash", "stall", "raise")


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    seconds: from fault to rest; ended: what became of the process; again: passages that were sent to the embedder more
    than once.
    """

    seconds: float
    ended: Ended
    again: int = 0

    def __str__(self) -> str:
        again = f", {self.again} passages embedded again" if self.again else ""
        return f"it {self.ended}; at rest after {self.seconds:.1f} s{again}"


POINTS = [
    Point("producer", "redis.embedmill/push", "a batch is formed", "it is in the inbox"),
    Point("producer", "redis.embedmill/push.reply", "the batch is in the inbox", "its producer knows so"),
    Point("producer", "producer.after_push", "the producer knows so", "it has the receipt"),
    Point("scheduler", "scheduler.after_documents", "documents are in the log", "the index has them"),
    Point("scheduler", "scheduler.before_admit", "the index has them", "the task is queued, the messages are gone"),
    Point("scheduler", "redis.scheduler/admit.reply", "the task is queued, the messages are gone", "it knows so"),
    Point("scheduler", "scheduler.after_admit", "the scheduler knows so", "the next messages are read"),
    Point("pusher", "scheduler.after_documents", "documents are in the log", "the index has them"),
    Point("pusher", "redis.scheduler/enqueue", "the index has them", "the task is queued"),
    Point("pusher", "redis.scheduler/enqueue.reply", "the task is queued", "the pusher knows so"),
    Point("worker", "redis.scheduler/lease.reply", "Redis has given it a lease", "it knows so"),
    Point("worker", "worker.after_lease", "it has the lease", "the dataset is opened"),
    Point("worker", "worker.after_open", "the dataset is opened", "earlier results are adopted"),
    Point("worker", "worker.after_adopt", "earlier results are adopted", "the first request is formed"),
    Point("worker", "worker.before_request", "a request is formed", "it is sent"),
    Point("worker", "worker.after_request", "the vectors of a request came", "a checkpoint has them"),
    Point("worker", "redis.scheduler/extend.reply", "Redis has extended the lease", "the worker knows so"),
    Point("worker", "worker.before_vectors", "all vectors came", "they are stored"),
    Point("worker", "worker.after_vectors", "the vectors are stored", "the marker is written"),
    Point("worker", "worker.after_marker", "the marker is written", "the checkpoints are removed"),
    Point("worker", "worker.after_sweep", "the checkpoints are removed", "Redis is told"),
    Point("worker", "redis.scheduler/finish", "Redis is about to be told", "the task is finished and announced"),
    Point("worker", "redis.scheduler/finish.reply", "the task is finished and announced", "the worker knows so"),
    Point("worker", "worker.after_finish", "the worker knows so", "it takes the next task"),
    Point("worker", "worker.before_release", "it was told to end", "the task is handed back", told_to_end=True),
    Point(
        "worker",
        "redis.scheduler/give_back.reply",
        "it was told to end, and the task is handed back",
        "it knows so",
        told_to_end=True,
    ),
    Point("batch worker", "batch.after_intent", "an intent is noted", "its batch is sent"),
    Point("batch worker", "batch.after_submit", "its batch is sent", "the batch's id is noted"),
    Point("batch worker", "batch.after_accept", "the batch's id is noted", "it is waited for"),
    Point("batch worker", "batch.after_results", "its vectors are in a checkpoint", "its bill and its end are noted"),
    Point("batch worker", "batch.after_end", "its bill and its end are noted", "the shard is committed"),
    # `at` counts what the shards before the fault take, see loading.BASE: two of all, five batches, one flush for both.
    Point("loader", "loader.before_intent", "the shard is read", "its intent is noted", at=3),
    Point("loader", "loader.after_intent", "its intent is noted", "its rows are sent", at=3),
    Point("loader", "loader.after_batch", "some of its rows are sent", "all are", at=6),
    Point("loader", "loader.after_upsert", "all of its rows are sent", "its deletions are", at=3),
    Point("loader", "loader.after_delete", "its deletions are sent", "Milvus has flushed them", at=3),
    Point("loader", "loader.after_flush", "Milvus has flushed everything", "the result is noted", at=2),
    Point("loader", "loader.after_result", "the result is noted", "the intent is removed", at=3),
    Point("compactor", "compaction.after_documents", "a replacement is in the log", "its vectors are stored"),
    Point("compactor", "compaction.after_vectors", "its vectors are stored", "its marker is written"),
    Point("compactor", "compaction.after_marker", "its marker is written", "all replacements are there"),
    Point("compactor", "compaction.before_switch", "all replacements are there", "they count"),
    Point("compactor", "compaction.after_switch", "they count", "what they replace is deleted"),
    Point("compactor", "compaction.after_vectors_deleted", "old vectors are deleted", "their rows are", at=2),
    Point("compactor", "compaction.after_rows_deleted", "old rows are deleted", "their marker is", at=2),
]
