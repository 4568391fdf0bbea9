"""What a corpus holds, counted whole and from a part of it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedmill.sources import Chunking, FieldRules, Source, open_source
from embedmill.survey import Survey, survey
from tests.datasets import admit_texts, small_dataset

TEXTS = [text[start : start + 300] for text in topics.values() for start in range(0, len(text), 300)]


def words(texts: Sequence[str]) -> list[float]:
    return [float(len(text.split())) for text in texts]


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def source(path: Path, **options: object) -> Source:
    return open_source(str(path), rules=FieldRules(), **options)  # type: ignore[arg-type]


def look(*paths: Path, **options: object) -> Survey:
    return survey([source(path) for path in paths], count_tokens=words, max_input_tokens=0, **options)  # type: ignore[arg-type]


def test_everything_is_counted_when_everything_is_read(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a.jsonl", TEXTS), write(tmp_path / "b.jsonl", TEXTS[:100]))
    assert found.whole
    assert found.read == found.total
    assert found.spread == 0
    assert found.total.documents == found.total.passages == len(TEXTS) + 100
    assert found.total.tokens == sum(words(TEXTS)) + sum(words(TEXTS[:100]))
    assert found.total.text_bytes == sum(len(text.encode()) for text in [*TEXTS, *TEXTS[:100]])


def test_a_part_tells_of_the_whole_within_its_own_error(tmp_path: Path) -> None:
    texts = random.Random(1).choices(TEXTS, k=20_000)
    found = look(write(tmp_path / "a.jsonl", texts), sample=4000)
    assert not found.whole
    assert 4000 <= found.read.documents < 5000
    assert 0 < found.spread < 0.05
    assert found.total.tokens == pytest.approx(sum(words(texts)), rel=2 * found.spread)
    assert found.total.documents == pytest.approx(20_000, rel=2 * found.spread)


def test_a_sample_that_is_larger_than_the_source_is_the_whole(tmp_path: Path) -> None:
    assert look(write(tmp_path / "a.jsonl", TEXTS[:50]), sample=50).whole
    assert look(write(tmp_path / "a.jsonl", []), sample=50).total.documents == 0


def test_parquet_is_sampled_or_read_whole_but_never_underestimated(tmp_path: Path) -> None:
    texts = random.Random(2).choices(TEXTS, k=5000)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [f"d{n}" for n in range(5000)], "text": texts}), path, row_group_size=1000)
    found = look(path, sample=600)
    assert found.total.tokens == pytest.approx(sum(words(texts)), rel=0.1)


def test_what_the_dataset_has_already_costs_nothing(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d", shard_rows=8)
    admit_texts(dataset, 0, TEXTS[:8])
    path = tmp_path / "a.jsonl"
    rows = [{"id": f"0-{n}", "text": TEXTS[n] if n < 6 else "changed"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(dataset.open_index()) as index:
        found = look(path, index=index)
    assert (found.total.passages, found.total.unchanged, found.total.tokens) == (10, 6, 4)


def test_long_passages_count_up_to_the_limit_and_rejects_count_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a b c", "a b c d e f"])
    with path.open("a") as file:
        file.write('{"id": "x"}\nnot JSON\n')
    found = survey([source(path)], count_tokens=words, max_input_tokens=4)  # type: ignore[arg-type]
    assert (found.total.documents, found.total.rejected, found.total.cut, found.total.tokens) == (2, 2, 1, 7)
    assert found.texts == ["a b c", "a b c d e f"]


def test_passages_of_a_split_document_are_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one two three. " * 20])
    found = survey([source(path, chunking=Chunking(60))], count_tokens=words, max_input_tokens=0)
    assert found.total.documents == 1
    assert found.total.passages > 4


def test_the_size_of_documents_is_that_of_a_real_shard(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "d", shard_rows=4096)
    admit_texts(dataset, 0, TEXTS[:1000])
    stored = (tmp_path / "d" / "documents" / "00000000.parquet").stat().st_size / 1000
    assert look(write(tmp_path / "a.jsonl", TEXTS[:1000])).document_bytes == pytest.approx(stored, rel=0.05)
