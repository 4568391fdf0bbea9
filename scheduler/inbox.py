"""The inbox admitted: messages of any producer become shards of the document log.

Nothing here has a state that could be lost. Messages are read with XRANGE, in order, and stay in the stream until one script
queues the shard that holds their documents, removes exactly them and writes the receipts. What is read twice, because
somebody died in between or two schedulers read the same inbox, is found in the log by its key and not admitted again.
A shard that is open when the scheduler is stopped is dropped: its messages are still in the inbox, for whoever comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import anyio
from anyio import to_thread

from embedmill.connection import Connection, key_prefix
from embedmill.dataset.dataset import Dataset, now_iso
from embedmill.dataset.index import DatasetIndex
from embedmill.dataset.layout import Job
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ConfigurationError, EmbedmillError
from embedmill.failpoints import afailpoint
from embedmill.inbox import INBOX_VERSION, InboxMessage, Receipt, check_inbox_name, inbox_key, read_message
from embedmill.messages import Task
from embedmill.sources.fields import printable

from .admission import Admitter
from .batches import Closed
from .queue import Queue, enqueue_arguments
from .readings import Batch
from .reconcile import reconcile
from .refusals import keep_refusals

_log = logging.getLogger("embedmill.scheduler")
_BLOCK_MESSAGES = 500
_BLOCK_BYTES = 8 * 1024 * 1024
_SCRIPT_MESSAGES = 200
_REFUSED_FIELDS = 100
_OPEN_JOBS = 4
# With late chunking, jobs that wait for the last passage of a document.
_GATHERING_JOBS = 256
_OPEN_BYTES = 128 * 1024 * 1024
_POLL_S = 5.0
_TROUBLE_S = 5.0
_CLAIM_EVERY_S, _CLAIM_MS = 5.0, 20_000
_CANCELLED = "the job {} was cancelled: resume it, or push under another job"


@dataclass(slots=True)
class InboxCounts:
    """What this scheduler has done with an inbox since it started."""

    messages: int = 0
    documents: int = 0
    rejected: int = 0
    shards: int = 0


@dataclass(slots=True)
class _Filling:
    """The open shard of one job, since when something waits in it, and when its last message was read."""

    admitter: Admitter
    since: float | None = None
    read_at: float = 0.0


class InboxAdmission:
    """Admits the inbox `name` into one dataset.

    linger_s: how long a document may wait for its shard to become full.
    """

    def __init__(
        self,
        dataset: Dataset,
        queue: Queue,
        connection: Connection,
        *,
        name: str,
        namespace: str = "default",
        linger_s: float = 2.0,
    ) -> None:
        self._dataset = dataset
        self._queue = queue
        self._connection = connection
        self._name = check_inbox_name(name)
        self._prefix = key_prefix(namespace)
        self._stream = inbox_key(namespace, name)
        self._linger_s = linger_s
        self._index: DatasetIndex | None = None
        self._filling: dict[str, _Filling] = {}
        self._held: dict[str, InboxMessage] = {}
        self._behind = ""
        self._claimed_at = float("-inf")
        self.counts = InboxCounts()

    async def run(self, stopping: anyio.Event) -> None:
        """Admit what comes, until `stopping` is set. Trouble is logged, and everything not admitted is read again."""
        said = ""
        while not stopping.is_set():
            try:
                index = await to_thread.run_sync(self._dataset.open_index)
                with closing(index):
                    await self._admit_until(stopping, index)
            except EmbedmillError as error:
                if said != str(error):
                    said = str(error)
                    _log.warning("inbox %s: %s; what is in it stays there until that is over", self._name, error)
            except (OSError, RuntimeError, ValueError):
                _log.exception("inbox %s: unforeseen trouble; going on with what is still in it", self._name)
            else:
                return
            with anyio.move_on_after(_TROUBLE_S):
                await stopping.wait()

    async def admit_waiting(self, index: DatasetIndex) -> None:
        """Admit everything that is in the inbox now, without lingering."""
        self._start(index)
        while await self._read_block():
            pass
        for job in list(self._filling):
            await self._close(job)

    async def _admit_until(self, stopping: anyio.Event, index: DatasetIndex) -> None:
        self._start(index)
        while not stopping.is_set():
            await self._claim()
            more = await self._read_block()
            now = anyio.current_time()
            for job in [job for job, filling in self._filling.items() if self._ends_at(filling) <= now]:
                await self._close(job)
            if not more:
                await self._wait(stopping)

    async def _claim(self) -> None:
        """Raises ConfigurationError when the inbox is admitted into another dataset: it would get a part of it each."""
        now = anyio.current_time()
        if now - self._claimed_at < _CLAIM_EVERY_S:
            return
        words = [self._name, self._dataset.info.id, self._dataset.url, _CLAIM_MS]
        other = await self._connection.script("scheduler/claim", [self._prefix], words)
        if other:
            raise ConfigurationError(
                f"another scheduler admits this inbox into {other}: give one of the datasets another name, as NAME=DATASET"
            )
        self._claimed_at = now

    def _start(self, index: DatasetIndex) -> None:
        self._index, self._filling, self._held, self._behind = index, {}, {}, ""

    async def _wait(self, stopping: anyio.Event) -> None:
        """For a message behind those that are held, for the end of a linger, or to be stopped."""
        ends = min((self._ends_at(filling) for filling in self._filling.values()), default=float("inf"))
        timeout_s = max(0.001, min(_POLL_S, ends - anyio.current_time()))
        trouble: EmbedmillError | None = None
        async with anyio.create_task_group() as group:

            async def end() -> None:
                await stopping.wait()
                group.cancel_scope.cancel()

            group.start_soon(end)
            after = self._behind or "0"
            try:
                await self._connection.wait_for_entry(self._stream, after, timeout_s=timeout_s, most=1)
            except EmbedmillError as error:
                trouble = error
            group.cancel_scope.cancel()
        if trouble is not None:
            raise trouble

    def _ends_at(self, filling: _Filling) -> float:
        return float("inf") if filling.since is None else filling.since + self._linger_s

    async def _read_block(self) -> bool:
        """Read and admit the next messages behind those that are held; False when there are none.

        With nothing held, from the beginning: a server that lost its data may count from anywhere.
        """
        if not self._held:
            self._behind = ""
        start = f"({self._behind}" if self._behind else "-"
        limits = [_BLOCK_MESSAGES, _BLOCK_BYTES]
        entries = await self._connection.script("scheduler/read", [self._prefix], [self._name, start, *limits])
        if not entries:
            return False
        messages = await to_thread.run_sync(_read, entries, self._name)
        for run in _runs_of_one_job(messages):
            await self._admit(run)
        return True

    async def _admit(self, messages: Sequence[InboxMessage]) -> None:
        """Messages of one job, in their order. One that is refused as a whole has no documents, and waits for nothing."""
        job = messages[0].job
        for message in messages:
            self._held[message.id] = message
        self._behind = messages[-1].id
        refused = [message for message in messages if message.refusal]
        if refused:
            await self._finish(Closed([], [_MessageBatch(m.key, (), message=m) for m in refused]))
            messages = [message for message in messages if not message.refusal]
            if not messages:
                return
        records = [record for message in messages for record in message.records if isinstance(record, SourceDocument)]
        ids = {record.id for record in records} | {record.group for record in records if record.group is not None}
        for other, filling in list(self._filling.items()):
            # What is newer must not come into the log first.
            if other != job and any(filling.admitter.holds(ids, key=message.key) for message in messages):
                await self._close(other)
        filling = await self._fill(job, messages[0])
        if await to_thread.run_sync(self._is_cancelled, job):
            messages = [replace(message, records=(), refusal=_CANCELLED.format(job)) for message in messages]
        batches = [_MessageBatch(message.key, message.records, message=message) for message in messages]
        try:
            closed = await to_thread.run_sync(filling.admitter.admit_batches, batches)
        finally:
            if filling.admitter.is_empty:
                filling.since = None
        for part in closed:
            await self._finish(part)
            if part.tasks:
                filling.since = None
        if filling.since is None and not filling.admitter.is_empty:
            filling.since = anyio.current_time()

    async def _fill(self, job: str, message: InboxMessage) -> _Filling:
        if job not in self._filling:
            record = await to_thread.run_sync(self._ensure_job, job, message)
            assert self._index is not None
            admitter = Admitter(self._dataset, self._index, job=job, lane=record.lane)
            self._filling[job] = _Filling(admitter)
        self._filling[job].read_at = anyio.current_time()
        await self._make_room(job)
        return self._filling[job]

    async def _make_room(self, job: str) -> None:
        """Close what has waited longest, where too much is open.

        The passages that a job gathers would be lost with it, since their messages are not read again while they are held.
        Where they are too many they are refused, those first of whose job nothing has come for longest.
        """
        while True:
            fillings = self._filling.values()
            gathered_bytes = sum(f.admitter.gathered_bytes for f in fillings)
            open_bytes = gathered_bytes + sum(f.admitter.open_bytes for f in fillings)
            idle = [name for name, f in self._filling.items() if name != job and not f.admitter.is_gathering]
            gathering = [name for name, f in self._filling.items() if f.admitter.is_gathering]
            if idle and (len(fillings) > _OPEN_JOBS or open_bytes > _OPEN_BYTES):
                oldest = min(idle, key=self._since)
                await self._close(oldest)
                del self._filling[oldest]
            elif gathering and (len(gathering) > _GATHERING_JOBS or gathered_bytes > _OPEN_BYTES):
                await self._give_up(min(gathering, key=lambda name: (name == job, self._filling[name].read_at)))
            else:
                return

    def _since(self, job: str) -> float:
        since = self._filling[job].since
        return float("-inf") if since is None else since

    async def _close(self, job: str) -> None:
        filling = self._filling[job]
        closed = await to_thread.run_sync(filling.admitter.close_batches)
        filling.since = None
        await self._finish(closed)

    async def _give_up(self, job: str) -> None:
        """Refuse the document that a job gathers."""
        filling = self._filling[job]
        closed = await to_thread.run_sync(filling.admitter.give_up_gathered)
        filling.since = None
        await self._finish(closed)

    async def _finish(self, closed: Closed) -> None:
        """Queue the shard, take away the messages whose documents are in the log, write their receipts."""
        messages = [batch.message for batch in closed.batches if isinstance(batch, _MessageBatch)]
        if not messages and not closed.tasks:
            return
        if any(batch.counts.repeated for batch in closed.batches):
            # Somebody wrote a shard and perhaps died before queueing it; without its messages nobody would be reminded.
            await reconcile(self._dataset, self._queue)
        await to_thread.run_sync(keep_refusals, self._dataset, self._name, list(_rejects(closed.batches)))
        await afailpoint("scheduler.before_admit")
        tasks = closed.tasks
        if tasks and not await to_thread.run_sync(self._is_running, tasks[0].job):
            tasks = []
        if len(tasks) > 1:
            await self._queue.enqueue(tasks[:-1])
        task = tasks[-1] if tasks else None
        for start in range(0, max(1, len(closed.batches)), _SCRIPT_MESSAGES):
            part = closed.batches[start : start + _SCRIPT_MESSAGES]
            await self._run_script(task if start == 0 else None, part)
        await afailpoint("scheduler.after_admit")
        self._count(closed)
        for message in messages:
            self._held.pop(message.id, None)

    async def _run_script(self, task: Task | None, batches: Sequence[Batch]) -> None:
        arguments: list[str | int] = [self._name, int(task is not None)]
        if task is not None:
            arguments += enqueue_arguments([task])
        for batch in batches:
            if isinstance(batch, _MessageBatch):
                arguments += _message_arguments(batch)
        await self._connection.script("scheduler/admit", [self._prefix], arguments)

    def _count(self, closed: Closed) -> None:
        self.counts.shards += len(closed.tasks)
        for batch in closed.batches:
            self.counts.messages += 1
            self.counts.documents += batch.counts.admitted + batch.counts.deleted
            self.counts.rejected += len(batch.rejects)
        for task in closed.tasks:
            _log.debug("inbox %s: shard %d is admitted", self._name, task.shard)

    def _is_running(self, job: str) -> bool:
        """A paused job's shards are not queued; reconciling does that when it goes on."""
        record = self._dataset.job(job)
        return record is None or record.state == "running"

    def _is_cancelled(self, job: str) -> bool:
        record = self._dataset.job(job)
        return record is not None and record.state == "cancelled"

    def _ensure_job(self, job: str, message: InboxMessage) -> Job:
        record = self._dataset.job(job)
        if record is not None:
            return record
        new = Job(job, lane=message.lane, created_at=now_iso(), sources=(f"inbox:{self._name}",))
        return self._dataset.change_job(job, lambda known: known if replace(known, created_at="") != Job(job) else new)


@dataclass(slots=True, eq=False, kw_only=True)
class _MessageBatch(Batch):
    """A batch that knows its message."""

    message: InboxMessage


def _read(entries: Sequence[tuple[str, Sequence[str]]], name: str) -> list[InboxMessage]:
    return [read_message(id_, dict(zip(flat[::2], flat[1::2], strict=True)), inbox=name) for id_, flat in entries]


def _runs_of_one_job(messages: Sequence[InboxMessage]) -> Iterator[list[InboxMessage]]:
    run: list[InboxMessage] = []
    for message in messages:
        if run and run[0].job != message.job:
            yield run
            run = []
        run.append(message)
    if run:
        yield run


def _rejects(batches: Sequence[Batch]) -> Iterator[Reject]:
    for batch in batches:
        yield from batch.rejects
        if isinstance(batch, _MessageBatch) and batch.message.refusal:
            yield Reject(f"inbox/{batch.message.id}", batch.message.refusal, Cursor())


def _message_arguments(batch: _MessageBatch) -> list[str | int]:
    """What scripts/admit.lua takes of one message."""
    message, counts = batch.message, batch.counts
    rejected = [(reject.id, reject.reason) for reject in batch.rejects]
    if message.refusal:
        rejected.append((None, message.refusal))
    rejected = [(id_ and printable(id_), printable(reason)) for id_, reason in rejected]
    receipt = Receipt(
        message.key, counts.new, counts.updated, counts.unchanged, counts.deleted, counts.repeated, tuple(rejected)
    )
    refused = _refused_entry(batch)
    arguments: list[str | int] = [message.id, message.key, message.reply, receipt.to_json(), int(bool(refused))]
    return [*arguments, len(refused), *refused] if refused else arguments


def _refused_entry(batch: _MessageBatch) -> list[str]:
    """A refused message whole, of any other one its refused lines, as a message that can be mended and sent again."""
    message = batch.message
    if message.refusal:
        kept = dict(list(message.raw.items())[:_REFUSED_FIELDS])
        reason = message.refusal
    elif batch.rejects:
        lines = message.raw["documents"].encode("utf-8", "surrogateescape").split(b"\n")
        refused = b"\n".join(lines[reject.cursor.line - 1] for reject in batch.rejects)
        kept = {"v": INBOX_VERSION, "job": message.job, "documents": refused.decode("utf-8", "surrogateescape")}
        reason = batch.rejects[0].reason
    else:
        return []
    kept |= {"refused_message": message.id, "refused_reason": printable(reason)}
    return [part for pair in kept.items() for part in pair]
