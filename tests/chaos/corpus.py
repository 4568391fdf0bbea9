"""Real documents that every Python carries: the language reference, the standard library's docstrings and comments.

No two have the same text. The same Python gives the same documents in the same order.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

_MIN_CHARS = 40
_PASSED_OVER = {"site-packages", "dist-packages", "test", "tests"}
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Document:
    """What a producer pushes."""

    id: str
    text: str


def real_documents(count: int) -> list[Document]:
    """The first `count` documents. Raises LookupError where this Python carries fewer."""
    documents = list(islice(_distinct(), count))
    if len(documents) < count:
        raise LookupError(f"this Python carries {len(documents):,} documents, and {count:,} were asked for")
    return documents


def _distinct() -> Iterator[Document]:
    seen: set[str] = set()
    for name, paragraphs in chain(_topics(), _sources()):
        for number, paragraph in enumerate(paragraphs, start=1):
            if len(paragraph) >= _MIN_CHARS and paragraph not in seen:
                seen.add(paragraph)
                yield Document(f"{name}#{number}", paragraph)


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic:{name}", _split(topics[name])


def _sources() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _PASSED_OVER.intersection(relative.parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            yield relative.as_posix(), [*_docstrings(source), *_comments(source)]


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return [paragraph for docstring in found if docstring for paragraph in _split(docstring)]


def _comments(source: str) -> list[str]:
    blocks = _COMMENT_BLOCK.findall(source)
    return ["\n".join(line.strip().lstrip("#").strip() for line in block.splitlines()).strip() for block in blocks]


def _split(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in _BLANK_LINES.split(text)]
