"""Sources in object stores: one object, or the text files below a prefix.

A URL with a slash at its end, or one that names no object but a prefix of some, is a folder: one document per text file,
as in `embedmill.sources.folder`. Objects are listed once, when the source is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..objects import OPENING_RETRIES, ObjectUrl, explained, open_objects
from .files import ObjectFile, stamp_object
from .folder import MAX_FILE_BYTES, TEXT_EXTENSIONS, TextFile, is_text_name

if TYPE_CHECKING:
    from obstore import ObjectMeta


class ObjectFolder:
    """The objects below a prefix, by their paths from there. Reads each as it was when it was listed."""

    def __init__(self, found: dict[str, ObjectFile]) -> None:
        self._found = found

    def read(self, file: TextFile) -> bytes:
        with self._found[file.path].open() as opened:
            return opened.read(MAX_FILE_BYTES + 1)


def find_object(url: ObjectUrl) -> ObjectFile | None:
    """The object that a URL names, or None when there is none and it may be a folder. Raises what `explained` raises."""
    store = open_objects(url, retries=OPENING_RETRIES)
    import obstore

    with explained(url):
        try:
            meta = obstore.head(store, url.key)
        except FileNotFoundError:
            if url.scheme.startswith("http"):
                raise
            return None
    return ObjectFile(open_objects(url), meta, url=url)


def list_object(file: ObjectFile) -> tuple[ObjectFolder, list[TextFile], int]:
    """One text file as a folder of its own."""
    name = file.path.name
    return ObjectFolder({name: file}), [TextFile(name, file.size_bytes, str(file.stamp[-1]))], 0


def list_objects(url: ObjectUrl) -> tuple[ObjectFolder, list[TextFile], int]:
    """The text files below a prefix, by path, and how many other objects there are.

    Raises ConfigurationError when there are none, and what `explained` raises.
    """
    if url.scheme.startswith("http"):
        raise ConfigurationError(f"{url.url}: a web server does not list its files; name one of them")
    prefix = url.key.rstrip("/")
    metas: list[ObjectMeta] = []
    opening = open_objects(url, retries=OPENING_RETRIES)
    import obstore

    with explained(url):
        for block in obstore.list(opening, prefix=prefix or None):
            metas.extend(block)
    if not metas:
        raise ConfigurationError(f"{url.url}: no such bucket or object, and no folder of that name")
    store, found, files, others = open_objects(url), {}, [], 0
    for meta in metas:
        path = meta["path"].removeprefix(prefix).lstrip("/")
        if any(part.startswith(".") for part in Path(path).parts):
            continue
        if not is_text_name(path):
            others += 1
            continue
        found[path] = ObjectFile(store, meta, url=url)
        files.append(TextFile(path, meta["size"], str(stamp_object(meta, url=url)[-1])))
    if not files:
        raise ConfigurationError(
            f"{url.url}: no text files ({' '.join(TEXT_EXTENSIONS)}) below this prefix; name other objects one by one"
        )
    return ObjectFolder(found), sorted(files, key=lambda file: file.path), others
