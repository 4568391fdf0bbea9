"""What a simulated process must not get from the real machine: time, chance, names, threads, the patience of a disk."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial, wraps
from itertools import count
from random import Random
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio._backends._asyncio import CancelScope

from embedmill.dataset.local_store import LocalStore

from .loop import Baton, SimulatedLoop

EPOCH_S = 1_800_000_000.0
_STEP_S = 0.02
_STORE_METHODS = ("read_or_none", "create", "swap", "append", "names", "exists", "delete", "delete_folder")
_inside_store = threading.local()


@contextmanager
def simulated_world(
    loop: SimulatedLoop, chance: Random, *, note: Callable[[str], None], batons: list[Baton]
) -> Iterator[None]:
    """Time is the loop's, chance comes from `chance`, threads take turns, and every operation on a store is a step.

    note: told of each operation that changes a store.
    """
    before = random.getstate()
    numbers = count(1000)

    async def run_sync(
        call: Callable[..., Any], *arguments: Any, limiter: Any = None, abandon_on_cancel: bool = False
    ) -> Any:
        await anyio.lowlevel.checkpoint()
        async with limiter or nullcontext():
            with anyio.CancelScope(shield=True):
                baton = Baton(partial(copy_context().run, call, *arguments))
                batons.append(baton)
                while not baton.go_on():  # noqa: ASYNC110
                    await asyncio.sleep(chance.uniform(0, _STEP_S))
                batons.remove(baton)
        if baton.error is not None:
            raise baton.error
        return baton.result

    with ExitStack() as patches:

        def patch(target: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(target, name, value))

        patch(time, "time", lambda: EPOCH_S + loop.time())
        for clock in ("monotonic", "perf_counter"):
            patch(time, clock, lambda: 1000.0 + loop.time())
        patch(uuid, "uuid4", lambda: uuid.UUID(int=chance.getrandbits(128), version=4))
        patch(os, "getpid", lambda: next(numbers))
        patch(os, "fsync", lambda _descriptor: None)
        patch(socket, "gethostname", lambda: "simulated")
        patch(anyio.to_thread, "run_sync", run_sync)
        # Sets of scopes are walked when they are cancelled; equal hashes leave them in the order of insertion.
        patch(CancelScope, "__hash__", lambda _scope: 0)
        for name in _STORE_METHODS:
            patch(LocalStore, name, _stepwise(getattr(LocalStore, name), note))
        random.seed(chance.getrandbits(64))
        try:
            yield
        finally:
            random.setstate(before)


def _stepwise(method: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
    """The method as one step: others run, or its process dies, before it and not within it."""
    changes = method.__name__ in ("create", "swap", "append", "delete")

    @wraps(method)
    def stepwise(store: LocalStore, key: str, *arguments: Any, **options: Any) -> Any:
        if getattr(_inside_store, "deep", False):
            return method(store, key, *arguments, **options)
        Baton.pause()
        _inside_store.deep = True
        try:
            result = method(store, key, *arguments, **options)
        except Exception as error:
            if changes:
                note(f"{method.__name__} {key}: {type(error).__name__}")
            raise
        else:
            if changes:
                note(f"{method.__name__} {key}")
            return result
        finally:
            _inside_store.deep = False

    return stepwise
