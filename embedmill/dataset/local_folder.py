"""The files that a dataset has on this machine: its index, locks and lists of rejects.

Of a dataset in a folder they are in it. Of one in an object store they are in a cache folder, named after the dataset and
its address, so that a copy of it has files of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import StorageError
from .local_store import LocalStore
from .store import Store

VARIABLE = "EMBEDMILL_CACHE"


def local_folder(store: Store, dataset_id: str) -> Path:
    """Made where it is not there. Raises StorageError when it cannot be made."""
    if isinstance(store, LocalStore):
        return store.root
    folder = _cache() / f"{dataset_id}-{hashlib.blake2b(store.url.encode(), digest_size=4).hexdigest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; name another place in {VARIABLE}"
        ) from error
    return folder


def _cache() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "embedmill"
