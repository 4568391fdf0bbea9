"""API keys from the environment: one or several of one owner, or a file that may be replaced while we run.

No key is ever shown: what is said of them names the variable or the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread

from embedmill.errors import ConfigurationError

_LARGEST_FILE_BYTES = 2**20
_Signature = tuple[int, int, int]


@dataclass(slots=True)
class KeyFile:
    """A file with a key a line. A mounted secret that is swapped by a link counts as changed, too."""

    path: Path
    _seen: _Signature | None = None
    _keys: tuple[str, ...] = field(default=(), repr=False)

    def read(self) -> tuple[str, ...]:
        """The keys. Blocking. Raises ConfigurationError for a file without usable ones, which is not read again until it
        changes."""
        signature = self._signature()
        self._seen = signature
        try:
            with self.path.open(encoding="utf-8") as file:
                text = file.read(_LARGEST_FILE_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"cannot read {self.path}, which JINA_API_KEY_FILE names: {_what(error)}"
            ) from None
        self._keys = split_keys(text, place=f"{self.path}, which JINA_API_KEY_FILE names,")
        if signature != self._signature():
            # It was written while it was read: what was seen is nobody's.
            self._seen = None
        return self._keys

    async def changed(self) -> Sequence[str] | None:
        """The keys, when they are not those of the last look. Raises ConfigurationError, once for each state of the file."""
        return await to_thread.run_sync(self._read_changed)

    def _read_changed(self) -> tuple[str, ...] | None:
        if self._signature() == self._seen:
            return None
        before = self._keys
        keys = self.read()
        if self._seen is None:
            self._keys = before
        return keys if self._keys != before else None

    def _signature(self) -> _Signature:
        try:
            status = self.path.stat()
        except OSError:
            return (0, 0, -1)
        return status.st_mtime_ns, status.st_ino, status.st_size


@dataclass(frozen=True, slots=True)
class FoundKeys:
    """Keys as they were found. file: where they may change."""

    keys: tuple[str, ...] = field(repr=False)
    file: KeyFile | None = None


def keys_from_environment(environment: Mapping[str, str] | None = None) -> FoundKeys:
    """The keys in `JINA_API_KEY`, or in the file that `JINA_API_KEY_FILE` names. Raises ConfigurationError without one."""
    variables = os.environ if environment is None else environment
    if variables.get("JINA_API_KEY", "").strip():
        return FoundKeys(split_keys(variables["JINA_API_KEY"], place="JINA_API_KEY"))
    named = variables.get("JINA_API_KEY_FILE", "").strip()
    if named:
        file = KeyFile(Path(named))
        return FoundKeys(file.read(), file)
    raise ConfigurationError(
        "no Jina API key: get one at https://jina.ai/api-dashboard/key-manager and set JINA_API_KEY to it"
    )


def split_keys(text: str, *, place: str) -> tuple[str, ...]:
    """Keys between commas, blanks or line ends, each once. Raises ConfigurationError for what no key can be."""
    keys = tuple(dict.fromkeys(part for part in re.split(r"[\s,]+", text) if part))
    if not keys:
        raise ConfigurationError(f"{place} holds no API key")
    for key in keys:
        check_key(key, place=place)
    return keys


def check_key(key: str, *, place: str = "JINA_API_KEY") -> str:
    """The key. Raises ConfigurationError for one that no header can hold."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(f"{place} is empty or has characters that no API key has: set JINA_API_KEY again")
    return key


def _what(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
