"""What is pushed in one trial, and what must have become of it in the end, known without running anything.

Two kinds of producers: `embedmill push` of files, one after another, and programs with an `embedmill.Producer` that push new
documents, then a second version of some, then the deletion of others. An id belongs to one producer, so its versions
come in one order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpus import Document, real_documents

POISON_ID = "poison"
POISON = "The process that embeds this passage dies of it."
_PUSHED_SHARE = 0.6
_REVISED_SHARE = 0.05
_DELETED_SHARE = 0.02

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one (id, version) must be."""

    text: str | None
    status: str


@dataclass(frozen=True, slots=True)
class Workload:
    """files: for `embedmill push`, in this order. scripts: for the programs, one each: see `_script`."""

    files: list[Path]
    scripts: list[Path]
    expected: Mapping[tuple[str, int], Outcome]

    @property
    def to_embed(self) -> int:
        """Passages that need one embedding each, the poison too."""
        return sum(outcome.status in {"embedded", "failed"} for outcome in self.expected.values())

    @property
    def newest(self) -> dict[tuple[str, int], Outcome]:
        highest: dict[str, int] = {}
        for id_, version in self.expected:
            highest[id_] = max(version, highest.get(id_, 0))
        return {key: self.expected[key] for key in highest.items()}


def make_workload(folder: Path, *, documents: int, files: int, programs: int, batch: int, seed: int) -> Workload:
    """Write what the producers read. `documents` counts ids; `batch` documents go into one message."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    corpus = real_documents(documents)
    # In the file that is pushed first: to find it takes many deaths, one after the other.
    number = files * chance.randrange(documents // (5 * files))
    corpus[number] = Document(POISON_ID, POISON)
    pushed = corpus[: int(documents * _PUSHED_SHARE)] if programs else corpus
    produced = corpus[len(pushed) :]
    expected = {(document.id, 1): _embedded(document) for document in corpus}
    return Workload(
        [_write(folder / f"push-{n}.jsonl", map(_record, pushed[n::files])) for n in range(files)],
        [
            _write(folder / f"produce-{n}.jsonl", _script(produced[n::programs], expected, batch=batch, chance=chance))
            for n in range(programs)
        ],
        expected,
    )


def _script(
    documents: list[Document], expected: dict[tuple[str, int], Outcome], *, batch: int, chance: random.Random
) -> Iterator[Record]:
    """The messages of one program, {"phase", "documents"}: a phase begins when the one before has its receipts."""
    changed = chance.sample(documents, int(len(documents) * (_REVISED_SHARE + _DELETED_SHARE)))
    revised = changed[: int(len(documents) * _REVISED_SHARE)]
    deleted = changed[len(revised) :]
    second = [Document(document.id, f"{document.text}\n\nSecond version.") for document in revised]
    expected.update({(document.id, 2): _embedded(document) for document in second})
    expected.update({(document.id, 2): Outcome(None, "deleted") for document in deleted})
    phases = (
        ("new", [_record(document) for document in documents]),
        ("revised", [_record(document) for document in second]),
        ("deleted", [{"id": document.id, "deleted": True} for document in deleted]),
    )
    for phase, records in phases:
        for start in range(0, len(records), batch):
            yield {"phase": phase, "documents": records[start : start + batch]}


def _embedded(document: Document) -> Outcome:
    return Outcome(document.text, "failed" if document.id == POISON_ID else "embedded")


def _record(document: Document) -> Record:
    return {"id": document.id, "text": document.text}


def _write(path: Path, records: Iterator[Record]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
