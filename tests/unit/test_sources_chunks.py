"""Texts split into passages: what they are, what they are called, and that reading goes on between any two of them."""

import json
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmill.dataset.dataset import Dataset
from embedmill.documents import Cursor, Reject, SourceDocument
from embedmill.errors import ConfigurationError
from embedmill.sources import Chunking, FieldRules, RejectFile, Source, open_source
from embedmill.sources.chunks import BLOCK_CHARS, cut_blocks
from embedmill.token_estimates import TokenEstimator
from scheduler.admission import Admitter
from tests.datasets import small_dataset

RULES = FieldRules()
LONG = topics["assignment"]


def open_jsonl(folder: Path, texts: dict[str, str], chunking: Chunking | None, **fields: object) -> Source:
    lines = [json.dumps({"id": id_, "text": text, **fields}) for id_, text in texts.items()]
    (folder / "d.jsonl").write_text("\n".join(lines))
    return open_source(str(folder / "d.jsonl"), rules=RULES, chunking=chunking)


def read_documents(source: Source, *, after: Cursor | None = None) -> list[SourceDocument]:
    return [record for record in source.read(after=after) if isinstance(record, SourceDocument)]


def assert_in_order(pieces: list[str], text: str) -> None:
    start = 0
    for piece in pieces:
        start = text.index(piece, start) + 1


def test_a_long_document_becomes_numbered_passages_of_its_group_and_a_short_one_becomes_one(tmp_path: Path) -> None:
    passages = read_documents(open_jsonl(tmp_path, {"short": " As it is. ", "long": LONG}, Chunking(500), lang="en"))
    short, *rest = passages
    assert (short.id, short.text, short.group, short.last) == ("short#0", " As it is. ", "short", True)
    assert len(rest) > 5
    assert [passage.id for passage in rest] == [f"long#{number}" for number in range(len(rest))]
    assert {passage.group for passage in rest} == {"long"}
    assert [passage.last for passage in rest] == [False] * (len(rest) - 1) + [True]
    assert {passage.metadata for passage in passages} == {'{"lang":"en"}'}
    assert {passage.place for passage in rest} == {"d.jsonl:2"}
    assert_in_order([passage.text for passage in rest], LONG)
    assert max(len(passage.text) for passage in rest) <= 500
    kept = "".join("".join(passage.text.split()) for passage in rest)
    assert kept == "".join(LONG.split())


def test_passages_may_repeat_the_end_of_the_one_before(tmp_path: Path) -> None:
    plain = [p.text for p in read_documents(open_jsonl(tmp_path, {"long": LONG}, Chunking(500)))]
    overlapping = [p.text for p in read_documents(open_jsonl(tmp_path, {"long": LONG}, Chunking(500, 200)))]
    assert sum(map(len, overlapping)) > sum(map(len, plain))
    assert any(later[:30] in earlier for earlier, later in pairwise(overlapping))
    assert max(map(len, overlapping)) <= 500
    assert_in_order(overlapping, LONG)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("ab. \n\r\t#`*é漢\u0301\u200b\x1c\0"), min_size=1, max_size=200),
    characters=st.integers(1, 30),
    overlap=st.integers(0, 29),
    markdown=st.booleans(),
)
def test_passages_are_verbatim_not_blank_short_enough_and_alike_every_time(
    text: str, characters: int, overlap: int, markdown: bool
) -> None:
    chunking = Chunking(characters, min(overlap, characters - 1))
    pieces = chunking.split(text, markdown=markdown)
    assert pieces == Chunking(characters, min(overlap, characters - 1)).split(text, markdown=markdown)
    assert_in_order(pieces, text)
    if len(text) > characters:
        assert all(0 < len(piece) <= characters and not piece.isspace() for piece in pieces)
    if not text.isspace():
        assert pieces
    if chunking.overlap == 0 and not markdown:
        assert sum(len("".join(piece.split())) for piece in pieces) == len("".join(text.split()))


def test_markdown_files_are_split_at_their_headings_and_other_files_at_their_lines(tmp_path: Path) -> None:
    text = f"# One\n\n{'word ' * 30}\n\n## Two\n\n{'word ' * 30}\n"
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    passages = read_documents(open_source(str(tmp_path), rules=RULES, chunking=Chunking(170)))
    by_group: dict[str | None, list[str]] = {}
    for passage in passages:
        by_group.setdefault(passage.group, []).append(passage.text)
    assert [piece.partition("\n")[0] for piece in by_group["a.md"]] == ["# One", "## Two"]
    assert by_group["a.md"] != by_group["b.txt"]


def test_a_text_without_borders_is_split_in_time_that_grows_with_its_length() -> None:
    text = "漢字" * 100_000
    assert "".join(Chunking(1000).split(text)) == text
    blocks = cut_blocks("line of words\n\n" * 20_000, size=BLOCK_CHARS)
    assert "".join(blocks) == "line of words\n\n" * 20_000
    assert all(len(block) <= BLOCK_CHARS and block.endswith("\n\n") for block in blocks)


def test_another_chunk_is_another_reading(tmp_path: Path) -> None:
    plain = open_jsonl(tmp_path, {"a": "A."}, None)
    chunkings = [Chunking(500), Chunking(501), Chunking(500, 10)]
    chunked = [open_source(plain.name, rules=RULES, chunking=chunking) for chunking in chunkings]
    assert len({source.push_key for source in (plain, *chunked)}) == 4


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=8),
    format_=st.sampled_from(["d.jsonl", "d.csv", "folder"]),
    split=st.integers(0, 60),
)
def test_reading_goes_on_between_any_two_passages(lengths: list[int], format_: str, split: int) -> None:
    texts = [topics["with"][:length] for length in lengths]
    with TemporaryDirectory() as name:
        path = Path(name, format_)
        if format_ == "folder":
            path.mkdir()
            for number, text in enumerate(["always", *texts]):
                (path / f"{number}.md").write_text(text)
        elif format_ == "d.csv":
            path.write_text("text\n" + "".join(f'"{text.replace(chr(34), "")}"\n' for text in texts))
        else:
            path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
        source = open_source(str(path), rules=RULES, chunking=Chunking(7, 2))
        whole = list(source.read())
        split = min(split, len(whole))
        after = whole[split - 1].cursor if split else None
        assert list(source.read(after=after)) == whole[split:]
        cursors = [record.cursor for record in whole]
        assert all(earlier < later for earlier, later in pairwise(cursors))
        positions = [source.position_bytes(cursor) for cursor in cursors]
        assert positions == sorted(positions)


def test_an_id_that_leaves_no_room_for_the_number_is_a_reject(tmp_path: Path) -> None:
    [reject] = open_jsonl(tmp_path, {"x" * 511: LONG}, Chunking(100)).read()
    assert isinstance(reject, Reject)
    assert reject.reason == "the id is longer than 512 bytes with the number of a passage behind it"


@pytest.mark.parametrize(("characters", "overlap"), [(0, 0), (-1, 0), (10, 10), (10, 11), (10, -1)])
def test_sizes_that_cannot_be_are_refused(characters: int, overlap: int) -> None:
    with pytest.raises(ConfigurationError, match="--chunk"):
        Chunking(characters, overlap)


def test_without_the_splitter_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigurationError, match=r"--chunk needs a text splitter: pip install 'embedmill\[chunk\]'"):
        Chunking(10)


def test_the_reject_file_keeps_rejects_inside_of_documents_and_reads_those_of_earlier_releases(tmp_path: Path) -> None:
    rejects = RejectFile(tmp_path / "r.jsonl")
    for part in (1, 2, 3):
        rejects.add(Reject("d.jsonl:2", "twice", Cursor(0, 1, 30, 1, part)))
    rejects.close()
    assert rejects.resume(Cursor(0, 1, 30, 1, 2)) == 2
    old = {"place": "d:1", "reason": "r", "id": None, "cursor": {"file": 0, "record": 1, "offset": 9, "line": 1}}
    (tmp_path / "r.jsonl").write_text(json.dumps(old) + "\n")
    assert rejects.resume(Cursor(record=2)) == 1


def admit(dataset: Dataset, source: Source) -> tuple[Admitter, list[Reject]]:
    with_index = dataset.open_index()
    admitter = Admitter(dataset, with_index, job="main")
    key, after = admitter.reading(source.push_key)
    result = admitter.admit(key, source.name, list(source.read(after=after)))
    admitter.close_shard()
    with_index.close()
    return admitter, result.rejects


def live(dataset: Dataset) -> dict[str, str]:
    newest: dict[str, tuple[int, str, bool]] = {}
    index = dataset.open_index()
    for shard in range(index.next_shard):
        for row in dataset.documents(shard)[0].to_pylist():
            if row["version"] > newest.get(row["id"], (0, "", False))[0]:
                newest[row["id"]] = (row["version"], row["text"], row["deleted"])
    index.close()
    return {id_: text for id_, (_, text, deleted) in newest.items() if not deleted}


def test_a_document_that_comes_shorter_loses_the_passages_that_it_no_longer_has(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "out")
    admit(dataset, open_jsonl(tmp_path, {"a": "one two", "b": "x"}, Chunking(3)))
    assert live(dataset) == {"a#0": "one", "a#1": "two", "b#0": "x"}
    admit(dataset, open_jsonl(tmp_path, {"a": "one", "b": "x"}, Chunking(3)))
    assert live(dataset) == {"a#0": "one", "b#0": "x"}
    admit(dataset, open_jsonl(tmp_path, {"a": "one", "b": "x"}, None))
    assert live(dataset) == {"a": "one", "b": "x"}


def test_a_document_that_stands_twice_is_a_reject_and_the_first_one_keeps_all_its_passages(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "out")
    source = open_jsonl(tmp_path, {"a": "one two"}, Chunking(3))
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('\n{"id": "b", "text": "x"}\n{"id": "a", "text": "new"}\n')
    source = open_source(str(tmp_path / "d.jsonl"), rules=RULES, chunking=Chunking(3))
    _, rejects = admit(dataset, source)
    assert [(reject.place, reject.reason) for reject in rejects] == [
        ("d.jsonl:3", "this id stands twice in this source; the first one is kept")
    ]
    assert live(dataset) == {"a#0": "one", "a#1": "two", "b#0": "x"}


def test_an_own_id_that_looks_like_a_passage_never_takes_the_place_of_one(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "out")
    _, rejects = admit(dataset, open_jsonl(tmp_path, {"a": "one", "a#0": "own"}, Chunking(3)))
    assert rejects == []
    assert live(dataset) == {"a#0": "one", "a#0#0": "own"}
    _, [reject] = admit(dataset, open_jsonl(tmp_path, {"a#0": "other"}, None))
    assert reject.reason == "this id is that of a passage of document 'a'"
    admit(dataset, open_jsonl(tmp_path, {"b#1": "own"}, None))
    _, [reject] = admit(dataset, open_jsonl(tmp_path, {"b": "one two"}, Chunking(3)))
    assert reject.reason == "the id of its passage 'b#1' is another document's"


def test_without_chunking_only_what_is_too_long_for_the_model_is_split(tmp_path: Path) -> None:
    long = "A sentence of seven words stands here. " * 300
    source = open_jsonl(tmp_path, {"a": "short", "b": long}, Chunking(None, most_tokens=1000))
    read = [record for record in source.read() if isinstance(record, SourceDocument)]
    assert (read[0].id, read[0].group, read[0].last) == ("a", None, True)
    pieces = read[1:]
    assert [piece.id for piece in pieces] == [f"b#{part}" for part in range(len(pieces))]
    assert {piece.group for piece in pieces} == {"b"}
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(long.split())
    tokens = TokenEstimator().estimate([piece.text for piece in pieces])
    assert tokens.max() <= 1000
    # No more of them than even parts with some room would make.
    assert len(pieces) <= 1 + 1.3 * TokenEstimator().estimate([long])[0] / 1000
    # Reading goes on between two of them.
    for position, record in enumerate(read):
        assert [one.id for one in source.read(after=record.cursor)] == [one.id for one in read[position + 1 :]]


@pytest.mark.parametrize(
    "text", ["漢字" * 3_000, "x" * 20_000, "\N{GRINNING FACE}" * 4_000, "\n" * 9_000 + "a", "a b " * 9_000]
)
def test_no_piece_is_longer_than_the_model_takes_whatever_the_text(text: str) -> None:
    pieces = Chunking(None, most_tokens=700).split(text)
    assert TokenEstimator().estimate(pieces).max() <= 700
    assert "".join("".join(piece.split()) for piece in pieces) == "".join(text.split())


def test_chunks_that_are_still_too_long_are_split_once_more() -> None:
    pieces = Chunking(5_000, most_tokens=500).split("word " * 4_000)
    assert TokenEstimator().estimate(pieces).max() <= 500
    assert Chunking(5_000, most_tokens=500).stamp != Chunking(5_000).stamp
