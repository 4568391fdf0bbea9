"""A folder of exported files that is there whole or not at all.

It is written beside its place as `.NAME.tmp` and renamed when all of it is on the disk. What a killed export left is
removed by the next one to the same place. A folder is replaced only if every file in it is an export's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, StorageError
from ..failpoints import failpoint

FORMAT = "embedmill-export"
MANIFEST = "_export.json"
"""Whatever reads a folder of Parquet passes over names that begin with an underscore."""
_LOCK = ".lock"


@contextmanager
def whole_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end; after an exception nothing is left of it.

    Raises ConfigurationError when something is at `target` that may not be replaced, or another process writes it;
    StorageError where the disk refuses.
    """
    folder, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old.tmp"))
    try:
        _check_place(target, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, target):
            _clear(folder)
            try:
                yield folder
                _sync(folder)
                _check_place(target, overwrite=overwrite)
                failpoint("export.before_rename")
                _put_in_place(folder, target, old)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (target / _LOCK).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to the path and the disk"
        raise StorageError(f"cannot write {target}: {reason}; {advice} and run the same command again") from error


def write_manifest(folder: Path, record: Mapping[str, Any]) -> dict[str, int]:
    """Say in `folder` what is in it; the bytes of each file, by name, without the manifest's own."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _LOCK}
    listed = [{"name": name, "bytes": size} for name, size in files.items()]
    content = {"format": FORMAT, "format_version": 1, **record, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return files


def _check_place(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{target} is a file: --to takes a folder, which may be new")
    found = {path.name for path in target.iterdir()}
    if not found:
        return
    foreign = sorted(found.difference(_listed(target), {MANIFEST, _LOCK}))
    if foreign:
        raise ConfigurationError(
            f"{target} is a folder with other things in it ({foreign[0]}): --to takes a new or empty folder"
        )
    if not overwrite:
        raise ConfigurationError(f"{target} holds an export: name another folder, or add --overwrite")


def _listed(target: Path) -> set[str]:
    """The files that an export has written there, as its manifest says."""
    try:
        record = json.loads((target / MANIFEST).read_bytes())
        return {str(file["name"]) for file in record["files"]} if record["format"] == FORMAT else set()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """The lock is a file in the folder and moves with it, so that it is looked at again once it is held."""
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ConfigurationError(f"another process is exporting to {target}: wait for it, or name another folder")
        yield


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()


def _put_in_place(folder: Path, target: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    replaced = target.exists()
    if replaced:
        target.rename(old)
        failpoint("export.between_renames")
    try:
        folder.rename(target)
    except OSError:
        if replaced:
            with suppress(OSError):
                old.rename(target)
        raise
    _sync_folder(target.parent)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
