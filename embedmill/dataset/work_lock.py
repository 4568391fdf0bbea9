"""Who works on a dataset: one `run` alone, or any number of workers, so that nothing is paid for twice by oversight.

A lock of this machine and of file systems that share locks: of a dataset in an object store, of this machine alone. It dies
with its process. What is stored is right without it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import ConfigurationError, StorageError
from .dataset import Dataset
from .local_folder import local_folder

_NAME = ".work.lock"


@contextmanager
def work_alone(dataset: Dataset) -> Iterator[None]:
    """Hold a dataset for one `run`. Raises ConfigurationError when somebody is at work on it."""
    with open_lock(dataset, _NAME) as file:
        _lock(file, fcntl.LOCK_EX, dataset)
        yield


def work_together(dataset: Dataset) -> IO[str]:
    """Hold it beside other workers, until the returned file is closed. Raises ConfigurationError beside a `run`."""
    file = open_lock(dataset, _NAME)
    try:
        _lock(file, fcntl.LOCK_SH, dataset)
    except BaseException:
        file.close()
        raise
    return file


def dataset_folder(dataset: Dataset) -> Path:
    """Where the files go that a dataset has on this machine: locks and rejects."""
    return local_folder(dataset.store, dataset.info.id)


def open_lock(dataset: Dataset, name: str) -> IO[str]:
    """A lock file of a dataset on this machine. Raises StorageError."""
    path = dataset_folder(dataset) / name
    try:
        return path.open("a+")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; see to the path and its permissions") from error


def _lock(file: IO[str], how: int, dataset: Dataset) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = "another run or a worker" if how == fcntl.LOCK_EX else "a run"
        raise ConfigurationError(f"{other} is at work on {dataset.url}: wait for it, or stop it first") from error
