"""What dead processes leave in a dataset and nobody needs: taken away, now and then."""

from __future__ import annotations

import logging
import time

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.erasures import sweep_erased
from embedmill.dataset.layout import CHECKPOINTS_FOLDER, checkpoints_folder, commit_key, numbers
from embedmill.dataset.local_store import LocalStore

_LEFTOVERS_EVERY_S = 600.0
_TEMPORARIES_AGE_S = 3600.0
_log = logging.getLogger("embedmill.scheduler")


class Housekeeping:
    """Of one dataset. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._looked_at_s = float("-inf")

    def sweep(self) -> None:
        """Remove checkpoints of committed shards and, every ten minutes, half-written files of more than an hour ago and
        what is stored again of erased shards.

        The worker that commits a shard sweeps its checkpoints. One that was killed in between, or that stood still and wrote
        a checkpoint late, leaves some behind, and no task leads anybody there again.
        """
        store = self._dataset.store
        for shard in numbers(store.names(CHECKPOINTS_FOLDER), suffix=""):
            # Not the marker that is remembered: a shard whose marker was put aside is owed again.
            if store.exists(commit_key(shard)):
                folder = checkpoints_folder(shard)
                for name in store.names(folder):
                    store.delete(f"{folder}/{name}")
                store.delete_folder(folder)
        if time.monotonic() - self._looked_at_s < _LEFTOVERS_EVERY_S:
            return
        self._looked_at_s = time.monotonic()
        removed = store.sweep(older_than_s=_TEMPORARIES_AGE_S) if isinstance(store, LocalStore) else 0
        if removed:
            _log.info("%s: removed %d files that killed processes left half-written", self._dataset.url, removed)
        swept = sweep_erased(self._dataset)
        if swept:
            _log.info("%s: removed what was stored again of erased shards %s", self._dataset.url, swept)
