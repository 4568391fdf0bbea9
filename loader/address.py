"""Where a Milvus is: a server's URL, or the folder of a Milvus Lite database on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from embedmill.errors import ConfigurationError

_SERVER_SCHEMES = ("http", "https", "tcp")
_LITE_SUFFIX = ".db"
_LITE_FOLDERS = {"LOCK", "collections"}


@dataclass(frozen=True, slots=True)
class Address:
    """uri: what the client is given; shown: the same without a password; lite: a local database of this process."""

    uri: str
    shown: str
    lite: bool

    @property
    def name(self) -> str:
        """Short, readable, fit for a file name; not unique."""
        stem = Path(self.uri).stem if self.lite else (urlsplit(self.uri).hostname or "milvus")
        return re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:40] or "milvus"

    def fingerprint(self, *parts: str) -> str:
        """8 hex digits over the address and further parts."""
        return hashlib.blake2b("\0".join((self.shown, *parts)).encode(), digest_size=4).hexdigest()


def parse_address(uri: str) -> Address:
    """Raises ConfigurationError for what is neither a server's URL nor a path that ends in `.db`."""
    scheme, separator, _ = uri.partition("://")
    if separator:
        parts = urlsplit(uri)
        if scheme not in _SERVER_SCHEMES or not parts.hostname:
            raise ConfigurationError(
                f"--milvus {uri}: a server looks like http://HOST:19530, a local database like wiki.db"
            )
        port = f":{parts.port}" if parts.port else ""
        return Address(uri, f"{scheme}://{parts.hostname}{port}{parts.path}", lite=False)
    if not uri.endswith(_LITE_SUFFIX) or Path(uri).name == _LITE_SUFFIX:
        advice = (
            f"http://{uri}" if re.fullmatch(r"[\w.-]+:\d+/?", uri) else f"{uri.rstrip('/') or 'wiki'}{_LITE_SUFFIX}"
        )
        raise ConfigurationError(
            f"--milvus {uri}: a local database's name ends in .db and a server's begins with http://; try {advice}"
        )
    path = str(Path(uri).expanduser().absolute())
    return Address(path, path, lite=True)


def check_folder(path: Path, *, must_exist: bool) -> None:
    """See that a Milvus Lite database is here or can be made here; its parent folder is created.

    Raises ConfigurationError that says what stands there instead.
    """
    if path.exists():
        if not path.is_dir():
            raise ConfigurationError(
                f"{path} is a file: a Milvus Lite database is a folder (files are of milvus-lite 2, which is not read)"
            )
        found = {entry.name for entry in path.iterdir()}
        if found and not found >= _LITE_FOLDERS:
            raise ConfigurationError(f"{path} is a folder with other things in it, not a Milvus Lite database")
        _require_writable(path)
        return
    if must_exist:
        raise ConfigurationError(f"there is no Milvus database at {path}: `embedmill load` makes one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot create the folder {path.parent}: {error.strerror}") from error
    _require_writable(path.parent)


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{folder} is not writable for this user, and Milvus Lite needs that even for reading")
