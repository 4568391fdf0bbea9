"""Who works on a dataset: one `run` alone, or any number of workers, so that nothing is paid for twice by oversight.

A lock of this machine and of file systems that share locks. It dies with its process. What is stored is right without it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import ConfigurationError
from .dataset import Dataset
from .store import LocalStore

_NAME = ".work.lock"


@contextmanager
def work_alone(root: Path) -> Iterator[None]:
    """Hold a dataset's folder for one `run`. Raises ConfigurationError when somebody is at work on it."""
    with _open(root) as file:
        _lock(file, fcntl.LOCK_EX, root)
        yield


def work_together(root: Path) -> IO[str]:
    """Hold it beside other workers, until the returned file is closed. Raises ConfigurationError beside a `run`."""
    file = _open(root)
    try:
        _lock(file, fcntl.LOCK_SH, root)
    except BaseException:
        file.close()
        raise
    return file


def _open(root: Path) -> IO[str]:
    return (root / _NAME).open("a+")


def _lock(file: IO[str], how: int, root: Path) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = "another run or a worker" if how == fcntl.LOCK_EX else "a run"
        raise ConfigurationError(f"{other} is at work on {root}: wait for it, or stop it first") from error


def dataset_folder(dataset: Dataset) -> Path:
    """Where the files beside a dataset go: locks and rejects."""
    if not isinstance(dataset.store, LocalStore):
        raise ConfigurationError(f"{dataset.url}: this needs a dataset in a folder")
    return dataset.store.root
