"""`--chunk`: documents split into passages of at most so many characters, at the best borders there are.

`--too-long split`: passages that a model would have to cut are split likewise.

- The passages of document D are `D#0`, `D#1`, ...; one that fits is `D#0`, as it is. All carry D's metadata, and `group` D.
  Without `--chunk`, what is not too long stays D, of no group.
- Each is a verbatim piece of the text, without blanks at its ends, in the order of the text. Blank pieces are left out.
- The same text is always split alike: the version of the splitter is a part of the push key.
- A reading can be resumed between two passages of a document: `Cursor.part`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from ..documents import MAX_ID_BYTES, Cursor, Reject, SourceDocument
from ..errors import ConfigurationError
from ..token_estimates import TokenEstimator

if TYPE_CHECKING:
    from .opening import Source

# The splitter takes time by the square of a text without sentences; at 64 KiB of Chinese that is a third of a second.
BLOCK_CHARS = 64 * 1024
MARKDOWN_EXTENSIONS = (".md", ".markdown")
_DISTRIBUTION = "semantic-text-splitter"
# Of anything that is estimated: a word of one rare character.
_MOST_TOKENS_PER_CHARACTER = 5.5
_ROOM = 1.1


class Splitter(Protocol):
    def chunk_indices(self, text: str) -> list[tuple[int, str]]: ...


@dataclass(frozen=True)
class Chunking:
    """At most `characters` a passage (None: as long as it likes), of which the first `overlap` may repeat the end of the one
    before; and no more than `most_tokens` (0: any number), as estimated on the high side.

    Raises ConfigurationError for sizes that cannot be, or when the splitter is not installed.
    """

    characters: int | None
    overlap: int = 0
    most_tokens: int = 0

    def __post_init__(self) -> None:
        if self.characters is not None and (self.characters < 1 or not 0 <= self.overlap < self.characters):
            raise ConfigurationError(
                f"--chunk {self.characters} --chunk-overlap {self.overlap}: the overlap must be smaller than the passage"
            )
        try:
            metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            option = "--too-long split" if self.characters is None else "--chunk"
            raise ConfigurationError(f"{option} needs a text splitter: pip install 'embedmill[chunk]'") from None

    @property
    def stamp(self) -> tuple[object, ...]:
        """All that decides where a text is cut."""
        tokens = (self.most_tokens,) if self.most_tokens else ()
        return (self.characters, self.overlap, BLOCK_CHARS, metadata.version(_DISTRIBUTION), *tokens)

    def split(self, text: str, *, markdown: bool = False) -> list[str]:
        """The passages of a text; the text itself when it fits."""
        pieces = [text]
        if self.characters is not None and len(text) > self.characters:
            pieces = _pieces(text, self._markdown_splitter if markdown else self._text_splitter, self.characters)
        if not self.most_tokens:
            return pieces
        return [part for piece in pieces for part in self._split_long(piece, markdown=markdown)]

    def _split_long(self, text: str, *, markdown: bool) -> list[str]:
        if len(text) * _MOST_TOKENS_PER_CHARACTER <= self.most_tokens:
            return [text]
        tokens = float(TokenEstimator().estimate([text])[0])
        if tokens <= self.most_tokens:
            return [text]
        # Even parts, and a little room: what is dense in tokens is split once more.
        parts = math.ceil(_ROOM * tokens / self.most_tokens)
        characters = max(1, math.ceil(len(text) / parts))
        splitter = _make_splitter(characters, overlap=0, markdown=markdown)
        pieces = _pieces(text, splitter, characters)
        return [part for piece in pieces for part in self._split_long(piece, markdown=markdown)]

    @cached_property
    def _text_splitter(self) -> Splitter:
        assert self.characters is not None
        return _make_splitter(self.characters, overlap=self.overlap, markdown=False)

    @cached_property
    def _markdown_splitter(self) -> Splitter:
        assert self.characters is not None
        return _make_splitter(self.characters, overlap=self.overlap, markdown=True)


def _make_splitter(characters: int, *, overlap: int, markdown: bool) -> Splitter:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    return (MarkdownSplitter if markdown else TextSplitter)(characters, overlap=overlap)


def _pieces(text: str, splitter: Splitter, characters: int) -> list[str]:
    blocks = cut_blocks(text, size=max(BLOCK_CHARS, 8 * characters))
    return [piece for block in blocks for _, piece in splitter.chunk_indices(block) if piece and not piece.isspace()]


class ChunkedSource:
    """Another source, its documents split. `markdown`: those with a Markdown file's name are split as Markdown."""

    def __init__(self, source: Source, *, chunking: Chunking, markdown: bool, push_key: str) -> None:
        self.name = source.name
        self.push_key = push_key
        self._source = source
        self._chunking = chunking
        self._markdown = markdown

    def total_bytes(self) -> int | None:
        return self._source.total_bytes()

    def position_bytes(self, cursor: Cursor) -> int:
        return self._source.position_bytes(cursor)

    def remarks(self) -> list[str]:
        return self._source.remarks()

    def read(self, *, after: Cursor | None = None) -> Iterator[SourceDocument | Reject]:
        """Yield passages and rejects in the order of the source, starting right behind `after`."""
        behind = replace(after, part=0) if after else Cursor()
        parts_read = after.part if after else 0
        for record in self._source.read(after=None if behind == Cursor() else behind):
            if isinstance(record, Reject):
                yield record
            else:
                yield from self._split(record, behind=behind, parts_read=parts_read)
            behind, parts_read = record.cursor, 0

    def _split(self, document: SourceDocument, *, behind: Cursor, parts_read: int) -> Iterator[SourceDocument | Reject]:
        markdown = self._markdown and document.id.lower().endswith(MARKDOWN_EXTENSIONS)
        pieces = self._chunking.split(document.text, markdown=markdown)
        if self._chunking.characters is None and pieces == [document.text]:
            yield document
            return
        last = len(pieces) - 1
        if len(f"{document.id}#{last}".encode()) > MAX_ID_BYTES:
            reason = f"the id is longer than {MAX_ID_BYTES} bytes with the number of a passage behind it"
            yield Reject(document.place, reason, document.cursor, document.id)
            return
        for part in range(parts_read, len(pieces)):
            yield replace(
                document,
                id=f"{document.id}#{part}",
                text=pieces[part],
                cursor=document.cursor if part == last else replace(behind, part=part + 1),
                group=document.id,
                last=part == last,
            )


def cut_blocks(text: str, *, size: int) -> list[str]:
    """The text in blocks of at most `size` characters, cut behind the last blank line, line or blank that each has."""
    blocks, start = [], 0
    while len(text) - start > size:
        end = start + size
        for border in ("\n\n", "\n", " "):
            found = text.rfind(border, start, end)
            if found > start:
                end = found + len(border)
                break
        blocks.append(text[start:end])
        start = end
    return [*blocks, text[start:]]
