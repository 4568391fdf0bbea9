"""An event loop whose time is virtual and whose order is drawn from a seed: simulated processes on one real thread.

Every callback belongs to the process in whose context it was created. Each process runs its own callbacks in their order, as
asyncio does; which process is next is drawn. A process can be killed (nothing of it ever runs again, as after SIGKILL) or
stalled (nothing of it runs for a while, then all that came due meanwhile, as after SIGSTOP and SIGCONT).
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar
from itertools import count
from random import Random
from typing import Any


class Process:
    """What lives and dies together. `mortal`: faults may hit it."""

    def __init__(self, name: str, *, mortal: bool = False) -> None:
        self.name = name
        self.mortal = mortal
        self.dead = False
        self.stalled_until = 0.0
        self.ready: deque[asyncio.Handle] = deque()


_process: ContextVar[Process | None] = ContextVar("process", default=None)
_CLOSINGS = 20


def current_process() -> str:
    """The name of the process that this code runs in; `world` for the network and whoever conducts the simulation."""
    process = _process.get()
    return "world" if process is None else process.name


def process_or_none() -> Process | None:
    """The process that this code runs in; None for the world."""
    return _process.get()


def process_of_this_task() -> Process:
    """Raises AssertionError outside of every process."""
    process = _process.get()
    assert process is not None
    return process


class Stuck(AssertionError):
    """Nothing is ready and nobody waits for a time: a deadlock."""


class SimulatedTask(asyncio.Task[Any]):
    """A task whose hash is a serial number, so that sets of tasks have the same order in every run."""

    serial: int

    def __hash__(self) -> int:
        return self.serial


class SimulatedLoop(asyncio.BaseEventLoop):
    """before_step: called ahead of every callback of a process; it may kill or stall that process."""

    def __init__(self, random: Random, *, before_step: Callable[[Process], None]) -> None:
        super().__init__()
        self._random = random
        self._before_step = before_step
        self._now = 0.0
        self._world = Process("world")
        self._processes = [self._world]
        self._tasks: list[SimulatedTask] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._serials = count(1)
        self.steps = 0
        self.set_task_factory(self._new_task)

    def time(self) -> float:
        return self._now

    def spawn(self, process: Process, main: Callable[[], Any]) -> None:
        """Start a process whose main coroutine is `main()`."""
        self._processes.append(process)
        context = Context()
        context.run(_process.set, process)
        self.create_task(context.run(main), context=context)

    def call_first(self, process: Process, callback: Callable[[], None]) -> None:
        """Run this ahead of everything else of a process, as a handler of a signal is."""
        context = Context()
        context.run(_process.set, process)
        process.ready.appendleft(asyncio.Handle(callback, (), self, context))

    def kill(self, process: Process) -> None:
        """Nothing of it runs any more. Its tasks stay as they are, so that none of their `finally` runs either."""
        process.dead = True
        process.ready.clear()
        self._processes.remove(process)

    def latest_wake(self) -> float:
        """When the last one that stands still gets up."""
        return max(process.stalled_until for process in self._processes)

    def bury(self) -> None:
        """Let go of every task that is not done, and close."""
        with warnings.catch_warnings():
            # Coroutines that were killed before their first step were never awaited.
            warnings.simplefilter("ignore")
            for task in self._tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                for _ in range(_CLOSINGS):
                    with suppress(BaseException):
                        task.get_coro().close()  # type: ignore[union-attr]
                        break
        self._tasks.clear()
        self.close()

    # What BaseEventLoop leaves to its children, and what it would do with a selector.

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._hand_over(handle)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        # fakeredis wakes the waiter on another connection so: that is the server's doing, not the writer's.
        handle = asyncio.Handle(callback, args, self, context)
        self._world.ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._serials), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are passed over when they come due."""

    def _write_to_self(self) -> None:
        """There is no selector to wake."""

    def _run_once(self) -> None:
        self._make_due()
        runnable = [process for process in self._processes if process.ready and process.stalled_until <= self._now]
        if not runnable:
            self._advance()
            return
        process = runnable[self._random.randrange(len(runnable))] if len(runnable) > 1 else runnable[0]
        self.steps += 1
        if process.mortal:
            self._before_step(process)
            if process.dead or process.stalled_until > self._now:
                return
        handle = process.ready.popleft()
        if not handle.cancelled():
            handle._run()

    def _make_due(self) -> None:
        while self._timers and self._timers[0][0] <= self._now:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                self._hand_over(handle)

    def _advance(self) -> None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        wakes = [p.stalled_until for p in self._processes if p.ready and p.stalled_until > self._now]
        if self._timers:
            wakes.append(self._timers[0][0])
        if not wakes:
            raise Stuck(f"at {self._now:.3f} s nothing is ready and nobody waits for a time")
        self._now = max(self._now, min(wakes))

    def _hand_over(self, handle: asyncio.Handle) -> None:
        process = handle._context.get(_process) or self._world
        if not process.dead:
            process.ready.append(handle)

    def _new_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, context: Context | None = None) -> Any:
        # asyncio.Task puts itself into a set while it is made.
        task = SimulatedTask.__new__(SimulatedTask)
        task.serial = next(self._serials)
        task.__init__(coroutine, loop=loop, context=context)  # type: ignore[misc]
        self._tasks.append(task)
        return task


class Baton:
    """Blocking code in a thread of its own that runs only while the loop waits for it, from one `pause` to the next.

    One real thread runs at a time, so order is as certain as without threads; a killed process leaves its thread at a pause.
    """

    _mine = threading.local()

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._over = False
        self._nested = 0
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> bool:
        """Run to the next pause or to the end; True at the end."""
        self._go.release()
        self._stopped.acquire()
        return self.done

    def abandon(self) -> None:
        """End a thread that nobody will go on with, when nothing is looked at any more."""
        if not self.done:
            self._over = True
            self.go_on()
        self._thread.join()

    @classmethod
    def pause(cls) -> None:
        """Let the others run. Outside of such a thread it does nothing."""
        baton: Baton | None = getattr(cls._mine, "baton", None)
        if baton is not None and not baton._over:
            baton._stopped.release()
            baton._go.acquire()
            if baton._over:
                raise SimulationOver

    def _run(self) -> None:
        self._mine.baton = self
        self._go.acquire()
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()


class SimulationOver(BaseException):
    """Unwinds a thread of a process that was killed, after everything was checked."""
