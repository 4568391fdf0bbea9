"""What the queue promises at every step, held against each script that the simulated server has executed.

I1  no task vanishes: it goes when it is finished, dropped or forgotten, and until then it is in exactly one place
I3  a shard is announced once for each time that its task was there, and only when its marker is
I4  epochs grow, even when Redis forgot everything, and only the newest counts
I7  what is ready has its turn
I10 deliveries count up without progress only
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import fakeredis

from embedmill.connection import key_prefix

_READING = {"reserve", "settle", "keep", "unknown", "depth", "jobs", "report", "workers"}
_REMOVING = {"finish", "drop"}


class QueuePromises:
    """Raises AssertionError with the name of the promise that was broken.

    is_committed: whether the shard of a task has its marker.
    """

    def __init__(self, server: fakeredis.FakeServer, *, namespace: str, is_committed: Callable[[str], bool]) -> None:
        # One connection: a client with a pool spends most of its time on opening them.
        self._redis = fakeredis.FakeRedis(
            server=server, decode_responses=True, protocol=2, single_connection_client=True
        )
        self._prefix = key_prefix(namespace)
        self._is_committed = is_committed
        self._last_epoch = 0
        self._newest: dict[str, int] = {}
        self._tasks: set[str] = set()
        self._deliveries: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._checks = {
            "lease": self._after_lease,
            "extend": self._after_extend,
            "give_back": self._after_give_back,
            "finish": self._after_finish,
            "drop": self._after_drop,
        }

    def redis_lost_everything(self) -> None:
        """A new time line: what was announced may be announced again, but epochs go on growing."""
        self._tasks.clear()
        self._deliveries.clear()
        self._finished.clear()

    def executed(self, script: str, arguments: list[Any], reply: Any) -> None:
        """A script ran on the server, whether or not its caller will hear of it. arguments: those behind the keys."""
        name = script.partition("/")[2]
        if not script.startswith("scheduler/") or name in _READING:
            return
        before, self._tasks = self._tasks, self._known_tasks()
        gone = before - self._tasks
        removed = {arguments[0]} if name in _REMOVING and reply else set()
        assert gone <= removed or name in ("forget", "clear"), f"I1: {sorted(gone)} vanished in {name}"
        assert not removed & self._tasks, f"I1: {removed} is still there after {name}"
        for id_ in self._tasks - before:
            self._deliveries[id_] = 0
        if name in self._checks:
            self._checks[name](arguments, reply)
        self._check_places()

    def _known_tasks(self) -> set[str]:
        start = f"{self._prefix}:task:"
        return {key.removeprefix(start) for key in self._redis.keys(f"{start}*")}

    def _after_lease(self, arguments: list[Any], reply: list[list[Any]]) -> None:
        for id_, _, epoch, deliveries, _ in reply:
            assert int(epoch) > self._last_epoch, f"I4: the epoch went from {self._last_epoch} to {epoch}"
            self._last_epoch = self._newest[id_] = int(epoch)
            self._deliveries[id_] += 1
            assert int(deliveries) == self._deliveries[id_], (
                f"I10: {id_} was delivered {self._deliveries[id_]} times without progress, the lease says {deliveries}"
            )

    def _after_extend(self, arguments: list[Any], reply: list[list[str]]) -> None:
        for id_, epoch, grown in zip(arguments[1::3], arguments[2::3], arguments[3::3], strict=True):
            if id_ not in reply[0]:
                self._require_newest("extended", id_, epoch)
                if str(grown) == "1":
                    self._deliveries[id_] = 0

    def _after_give_back(self, arguments: list[Any], reply: int) -> None:
        id_, epoch = arguments[:2]
        if reply:
            self._require_newest("handed back", id_, epoch)
            self._deliveries[id_] = max(0, self._deliveries[id_] - 1)

    def _after_drop(self, arguments: list[Any], reply: int) -> None:
        if reply:
            self._require_newest("dropped", arguments[0], arguments[1])

    def _after_finish(self, arguments: list[Any], reply: int) -> None:
        id_ = arguments[0]
        assert self._is_committed(id_), f"I3: {id_} was finished without its marker"
        self._finished[id_] += bool(reply)
        ending = f'"shard": {id_.rpartition(":")[2]}}}'
        entries = self._redis.xrange(f"{self._prefix}:announced")
        announced = sum(fields["shard"].endswith(ending) for _, fields in entries)
        assert announced == self._finished[id_], (
            f"I3: {id_} left {self._finished[id_]} times, announced {announced} times"
        )

    def _require_newest(self, what: str, id_: str, epoch: Any) -> None:
        newest = self._newest.get(id_)
        assert int(epoch) == newest, f"I4: {id_} was {what} by epoch {epoch}, and the newest is {newest}"

    def _check_places(self) -> None:
        redis, prefix = self._redis, self._prefix
        places: Counter[str] = Counter()
        for name in ("leased", "delayed"):
            places.update(redis.zrange(f"{prefix}:{name}", 0, -1))
        for job in redis.smembers(f"{prefix}:jobs"):
            ready = redis.zrange(f"{prefix}:ready:{job}", 0, -1)
            places.update(ready)
            known = redis.hgetall(f"{prefix}:job:{job}")
            if ready and known.get("paused") != "1":
                turns = f"{prefix}:turns:{known['lane']}:{known['fingerprint']}"
                assert redis.zscore(turns, job) is not None, f"I7: {job} has ready tasks and no turn"
        twice = sorted(id_ for id_, times in places.items() if times > 1)
        assert not twice, f"I1: {twice} are in two places"
        assert places.keys() == self._tasks, f"I1: {sorted(self._tasks)} are known, {sorted(places)} are somewhere"
