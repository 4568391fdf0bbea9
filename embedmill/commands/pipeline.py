"""Everything in one process: intake, queue, worker and loader around one dataset, until nothing is owed.

It can be stopped or killed anywhere and started again: what is true stands in the dataset, and the queue is rebuilt from it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread

from embedmill.connection import Connection
from scheduler.admission import Admitter
from scheduler.embedded import embedded_server
from scheduler.intake import Intake
from scheduler.queue import Queue
from scheduler.readings import AdmissionCounts
from scheduler.reconcile import owed_by_running_jobs, reconcile
from worker.service import Worker

from ..dataset.dataset import Dataset
from ..dataset.index import DatasetIndex
from ..errors import CapReached, TransientError
from ..sources.opening import Source
from .progress import Snapshot, show
from .standard_input import StoppableInput

if TYPE_CHECKING:
    from loader.service import Loader

_POLL_S = 0.2
_SWEEP_S = 2.0


@asynccontextmanager
async def open_connection(redis: str | None) -> AsyncIterator[Connection]:
    """The given server, checked, or an embedded one that lives as long as the context."""
    with nullcontext(redis) if redis is not None else embedded_server() as url:
        connection = Connection(url) if redis is not None else Connection(url, retry_for_s=2.0, embedded=True)
        try:
            await connection.check()
            yield connection
        finally:
            await connection.aclose()


@dataclass(slots=True)
class Outcome:
    """How a run ended. stopped: with work left, by a signal or at its job's cap, which is `capped`; done: passages with a
    result, in checkpoints or committed."""

    stopped: bool = False
    done: int = 0
    seconds: float = 0.0
    admitted: AdmissionCounts = field(default_factory=AdmissionCounts)
    capped: CapReached | None = None


class Pipeline:
    """One run over one dataset."""

    def __init__(
        self,
        dataset: Dataset,
        index: DatasetIndex,
        queue: Queue,
        *,
        worker: Worker,
        intake: Intake,
        admitter: Admitter,
        loader: Loader | None,
        standard_input: StoppableInput | None = None,
    ) -> None:
        self._dataset = dataset
        self._index = index
        self._queue = queue
        self._intake = intake
        self._admitter = admitter
        self._loader = loader
        self._standard_input = standard_input
        self.worker = worker
        self._stopping = anyio.Event()
        self._committed = anyio.Event()
        self._embedding_done = False
        self._trouble: Exception | None = None
        self._before = 0
        self._earlier_rows = 0

    async def run(self, sources: Sequence[Source], *, quiet: bool) -> Outcome:
        """Until everything read is committed and loaded, or until a signal. A second signal stops at once.

        Raises what makes going on useless; everything paid for is kept then, too.
        """
        started = time.monotonic()
        self._earlier_rows, self._before = await to_thread.run_sync(self._count_earlier)
        await reconcile(self._dataset, self._queue)
        async with anyio.create_task_group() as background:
            background.start_soon(self._watch_signals, background.cancel_scope)
            background.start_soon(self._show, quiet)
            try:
                async with anyio.create_task_group() as parts:
                    parts.start_soon(self._guard, self._intake.run, sources)
                    parts.start_soon(self._guard, self._embed)
                    if self._loader is not None:
                        parts.start_soon(self._guard, self._load, self._loader)
            finally:
                background.cancel_scope.cancel()
        capped, trouble = cap_and_rest(self._trouble)
        if trouble is not None:
            raise trouble
        await to_thread.run_sync(self._dataset.publish_shape)
        seconds = time.monotonic() - started
        return Outcome(self._stopping.is_set(), self.snapshot().done, seconds, self._admitter.counts, capped)

    def stop(self) -> None:
        self._stopping.set()
        self._stop_reading()
        self.worker.stop()
        self._committed.set()

    def _stop_reading(self) -> None:
        self._intake.stop()
        if self._standard_input is not None:
            self._standard_input.stop()

    async def _guard(self, part: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a part. When it fails, the others end in good order: what they have sent is paid for."""
        try:
            await part(*arguments)
        except Exception as error:
            self._trouble = self._trouble or error
            self.stop()

    async def _embed(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._stop_when_done)
                await self.worker.run(on_commit=lambda _shard: self._committed.set())
                group.cancel_scope.cancel()
        finally:
            self._embedding_done = True
            self._stop_reading()
            self._committed.set()

    async def _stop_when_done(self) -> None:
        """Everything is admitted and nothing is owed, here or in the hands of other workers."""
        while True:
            await anyio.sleep(_POLL_S)
            if not self._intake.finished or (await self._queue.depth()).open:
                continue
            if not await to_thread.run_sync(owed_by_running_jobs, self._dataset):
                self.worker.stop()
                return
            await reconcile(self._dataset, self._queue)

    async def _load(self, loader: Loader) -> None:
        while not self._stopping.is_set():
            done = self._embedding_done
            try:
                await loader.sweep(self._stopping)
                if done and not self._stopping.is_set():
                    await loader.finish()
                    return
            except TransientError as error:
                # Embedding goes on without Milvus; only at the end somebody has to know.
                if done:
                    raise
                self.worker.counts.last_trouble = str(error)
            with anyio.move_on_after(_SWEEP_S):
                await self._committed.wait()
            if not self._stopping.is_set():
                self._committed = anyio.Event()

    async def _show(self, quiet: bool) -> None:
        await show(self.snapshot, quiet=quiet)

    def snapshot(self) -> Snapshot:
        counts = self.worker.counts
        admitted = self._before + self._admitter.counts.admitted
        fraction = self._intake.fraction
        reading = not self._intake.finished and fraction is not None and fraction > 0
        read = self._admitter.counts.admitted
        total = self._before + int(read / fraction) if reading and fraction else admitted
        return Snapshot(
            done=self._earlier_rows + counts.embedded + counts.adopted + counts.failed,
            total=total if self._intake.finished or reading else None,
            estimated=not self._intake.finished,
            fresh=counts.embedded,
            failed=counts.failed,
            tokens=counts.tokens,
            loaded=self._loader.counts.rows_upserted if self._loader is not None else None,
            trouble=counts.last_trouble,
        )

    def _count_earlier(self) -> tuple[int, int]:
        """Rows committed, and rows admitted, before this run."""
        committed = sum(marker.rows for shard in self._dataset.committed() if (marker := self._dataset.marker(shard)))
        return committed, self._index.rows

    async def _watch_signals(self, scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if self._stopping.is_set():
                    scope.cancel()
                    return
                self.stop()


def cap_and_rest(error: Exception | None) -> tuple[CapReached | None, Exception | None]:
    """A reached cap, and what else went wrong, among what concurrent parts raise together."""
    if not isinstance(error, ExceptionGroup):
        return (error, None) if isinstance(error, CapReached) else (None, error)
    reached, rest = error.split(CapReached)
    first: CapReached | ExceptionGroup[CapReached] | None = reached
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return first, rest
