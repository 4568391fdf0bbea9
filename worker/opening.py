"""The datasets that a worker has open, and those in trouble, whose tasks wait while the others go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from anyio import to_thread

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import DATASET_KEY
from embedmill.dataset.spending import spent_recently
from embedmill.dataset.store import open_store
from embedmill.embedder import Embedder
from embedmill.errors import CorruptStore, EmbedmillError, StorageError
from embedmill.messages import Task
from embedmill.token_estimates import LearnsTokens, read_estimates, write_estimates

_WORTH_KEEPING = 1.1
_FIRST_DELAY_S, _LONGEST_DELAY_S = 30.0, 600.0
_log = logging.getLogger("embedmill.worker")


class OpenDatasets:
    """Datasets by the place where they are. `on_open` is called with each before anything of it is embedded."""

    def __init__(self, embedder: Embedder, on_open: Callable[[Dataset], None] | None) -> None:
        self._embedder = embedder
        self._on_open = on_open
        self._open: dict[str, Dataset] = {}
        self._kept_bills = 0

    def get(self, task: Task) -> Dataset | None:
        """The dataset that a task is about; None where it is gone or another one stands in its place. Blocking.

        Raises ConfigurationError for a dataset of another embedder, StorageError where it cannot be looked at.
        """
        known = self._open.get(task.dataset)
        if known is None or known.info.id != task.dataset_id:
            self._open.pop(task.dataset, None)
            try:
                there = open_store(task.dataset).exists(DATASET_KEY)
            except OSError as error:
                raise StorageError(f"cannot look at {task.dataset}: {error.strerror}") from error
            if not there:
                return None
            known = Dataset.open(task.dataset)
            if known.info.id != task.dataset_id:
                return None
            known.require(self._embedder.spec)
            if self._on_open is not None:
                self._on_open(known)
            self._learn_from(known)
            self._open[task.dataset] = known
        return known

    def keep_learned(self, task: Task) -> None:
        """Write down what was learned of token counts since, when it is worth it. Blocking; trouble is only logged."""
        dataset = self.known(task)
        if dataset is None or not isinstance(self._embedder, LearnsTokens):
            return
        bills = self._embedder.estimator.bills
        if bills > _WORTH_KEEPING * self._kept_bills:
            try:
                write_estimates(dataset.store, self._embedder.estimator)
                self._kept_bills = bills
            except StorageError as error:
                _log.warning("what was learned of token counts was not kept: %s", error)

    def _learn_from(self, dataset: Dataset) -> None:
        if not isinstance(self._embedder, LearnsTokens):
            return
        try:
            learned = read_estimates(dataset.store)
        except CorruptStore as error:
            _log.warning("%s; token counts of %s are learned anew", error, dataset.url)
            return
        if learned is not None and learned.bills > self._embedder.estimator.bills:
            self._embedder.estimator.adopt(learned)
            self._kept_bills = learned.bills

    async def busy(self, key_id: str) -> bool:
        """Whether the spend logs of the open datasets show that a key was billed within the last minute."""

        def look() -> bool:
            return any(key_id in spent_recently(dataset) for dataset in list(self._open.values()))

        return await to_thread.run_sync(look)

    def known(self, task: Task) -> Dataset | None:
        """The dataset of a task where it is open."""
        return self._open.get(task.dataset)


@dataclass(slots=True)
class _Trouble:
    message: str
    delay_s: float
    until_s: float


@dataclass(slots=True)
class Troubles:
    """What keeps tasks from being worked on for now: a damaged object holds up its own shard, anything else the dataset."""

    _by_place: dict[str, _Trouble] = field(default_factory=dict)

    def delay_s(self, task: Task) -> float:
        """For how long a task has to wait yet; 0 where nothing is known against it."""
        known = [self._by_place[place] for place in (task.id, task.dataset_id) if place in self._by_place]
        return max((trouble.until_s - time.monotonic() for trouble in known), default=0.0)

    def add(self, task: Task, error: EmbedmillError) -> float:
        """Note trouble, and log it when it is news; for how long the task has to wait, growing from 30 s to 10 minutes."""
        place = task.id if isinstance(error, CorruptStore) else task.dataset_id
        now_s, known = time.monotonic(), self._by_place.get(place)
        if known is None or known.message != str(error):
            _log.error("%s; the tasks of %s wait meanwhile, and others go on", error, task.dataset)
            known = self._by_place[place] = _Trouble(str(error), _FIRST_DELAY_S, now_s + _FIRST_DELAY_S)
        elif known.until_s <= now_s:
            known.delay_s = min(_LONGEST_DELAY_S, 2 * known.delay_s)
            known.until_s = now_s + known.delay_s
        return known.until_s - now_s

    def over(self, task: Task) -> None:
        """A task was done."""
        for place in (task.id, task.dataset_id):
            if self._by_place.pop(place, None) is not None:
                _log.info("the trouble with %s is over", task.dataset)
