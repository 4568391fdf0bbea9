"""What a producer hands in: documents with an id, a text and metadata, and the places in a source where they stood.

Metadata is canonical JSON, so that equal metadata has equal bytes and an equal hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

MAX_ID_BYTES = 512
# Keys of batches that came through the inbox without a key of their own begin with this.
KEYLESS_PREFIX = "inbox/"
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place in a source, after a record: where reading goes on.

    file: which file of the source (0 for a single file); record: records read of that file; offset: bytes read of it where
    the file can be sought, else 0; line: lines read of it, for messages; part: passages read of the record that comes next,
    where records are split into passages (0: none of them).
    """

    file: int = 0
    record: int = 0
    offset: int = 0
    line: int = 0
    part: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document as read, or one passage of a document that was split.

    metadata: canonical JSON; cursor: points behind it; deleted: the document is to go, and has no text; group: id of the
    document that this passage is a part of (None: not split); last: the last passage of its document.
    """

    id: str
    text: str
    metadata: str
    cursor: Cursor
    place: str
    deleted: bool = False
    group: str | None = None
    last: bool = True

    @property
    def text_hash(self) -> bytes:
        return hash16(self.text)

    @property
    def metadata_hash(self) -> bytes:
        return hash16(self.metadata)


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that cannot become a document: where it stands (`FILE:LINE`), and why, in one sentence."""

    place: str
    reason: str
    cursor: Cursor
    id: str | None = None


def canonical_json(value: Mapping[str, object]) -> str:
    """Compact JSON with sorted keys, non-ASCII kept. Raises ValueError for NaN, TypeError for bytes, dates and the like."""
    return _CANONICAL.encode(value)


def hash16(text: str) -> bytes:
    """BLAKE2b-128 of the UTF-8 bytes. Raises UnicodeEncodeError for lone surrogates."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
