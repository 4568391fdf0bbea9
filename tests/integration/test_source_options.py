"""`--strict`, `--chunk`, `--limit` and what the summary says of the sources, with the real command."""

import gzip
import json
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from embedmill.documents import SourceDocument
from embedmill.errors import ConfigurationError
from embedmill.messages import Task
from embedmill.sources import Chunking, FieldRules, open_source
from scheduler.admission import Admitter
from scheduler.intake import Intake
from tests.conftest import Command, write_jsonl
from tests.datasets import small_dataset
from tests.invariants import check_dataset, final_set

NULL = ("--model", "null/8", "--no-milvus", "--to", "out")
WORDS = topics["assignment"].split()


class Enqueued:
    """A queue that notes what it is given."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    async def enqueue(self, tasks: list[Task]) -> int:
        self.tasks.extend(tasks)
        return len(tasks)


BAD = {
    "no JSON": ("{", "in.jsonl:11: not valid JSON"),
    "no text": ('{"id": "x", "body": "b"}', "in.jsonl:11: no text: field 'text' is missing"),
    "no id": ('{"text": "t"}', "in.jsonl:11: no id: field 'id' is missing or null"),
    "an id twice": ('{"id": "3", "text": "again"}', "in.jsonl:11: this id stands twice in this source"),
    "not UTF-8": ('{"id": "x", "text": "\udcff"}', "in.jsonl:11: not UTF-8: byte 0xff"),
}


@pytest.mark.parametrize("case", BAD)
async def test_strict_names_the_line_admits_nothing_of_the_open_shard_and_goes_on_when_it_is_mended(
    case: str, tmp_path: Path
) -> None:
    line, says = BAD[case]
    good = [json.dumps({"id": str(number), "text": word}) for number, word in enumerate(WORDS[:30])]
    path = tmp_path / "in.jsonl"
    path.write_bytes("\n".join([*good[:10], line, *good[10:]]).encode(errors="surrogateescape"))
    dataset = small_dataset(tmp_path / "out", shard_rows=8)

    async def take() -> Intake:
        source = open_source(str(path), rules=FieldRules(id_field="id"))
        admitter = Admitter(dataset, dataset.open_index(), job="main")
        intake = Intake(admitter, Enqueued(), rejects=tmp_path / "rejects", strict=True)  # type: ignore[arg-type]
        await intake.run([source])
        return intake

    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            await take()
        assert str(caught.value).startswith(says)
        assert "--strict stops here" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert dataset.admitted() == [0]
    assert not (tmp_path / "rejects").exists()
    path.write_text("\n".join(good))
    assert (await take()).finished
    rows = [row["id"] for shard in dataset.admitted() for row in dataset.documents(shard)[0].to_pylist()]
    assert rows == [str(number) for number in range(30)]


async def test_the_message_of_strict_counts_what_was_admitted(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(number), "text": word}) for number, word in enumerate(WORDS[:20])]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{"]))
    dataset = small_dataset(tmp_path / "out", shard_rows=8)
    admitter = Admitter(dataset, dataset.open_index(), job="main")
    intake = Intake(admitter, Enqueued(), rejects=tmp_path / "rejects", strict=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="16 passages of this run were admitted before it and stay"):
        await intake.run([open_source(str(tmp_path / "in.jsonl"), rules=FieldRules())])


async def test_a_limit_counts_documents_and_takes_their_last_one_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"id": str(n), "text": "one two six"} for n in range(5)])
    dataset = small_dataset(tmp_path / "out", shard_rows=4)
    source = open_source(str(tmp_path / "in.jsonl"), rules=FieldRules(), chunking=Chunking(3))
    queue = Enqueued()
    admitter = Admitter(dataset, dataset.open_index(), job="main")
    await Intake(admitter, queue, rejects=tmp_path / "rejects", limit=2).run([source])  # type: ignore[arg-type]
    rows = [row["id"] for shard in dataset.admitted() for row in dataset.documents(shard)[0].to_pylist()]
    assert rows == ["0#0", "0#1", "0#2", "1#0", "1#1", "1#2"]
    assert sum(task.rows for task in queue.tasks) == 6


@pytest.mark.parametrize("chunking", [None, Chunking(3)], ids=["whole", "in passages"])
async def test_a_limit_passes_over_what_is_there_already(tmp_path: Path, chunking: Chunking | None) -> None:
    """Another push has written since, so the first source is read from its beginning each time."""
    write_jsonl(tmp_path / "a.jsonl", [{"id": f"a{n}", "text": "one two six"} for n in range(30)])
    write_jsonl(tmp_path / "b.jsonl", [{"id": f"a{n}", "text": "old"} for n in (3, 4)])
    dataset = small_dataset(tmp_path / "out", shard_rows=8)
    passages = 1 if chunking is None else 3

    async def take(name: str, limit: int | None) -> tuple[int, int]:
        source = open_source(str(tmp_path / name), rules=FieldRules(), chunking=chunking)
        with closing(dataset.open_index()) as index:
            admitter = Admitter(dataset, index, job="main")
            intake = Intake(admitter, Enqueued(), rejects=tmp_path / "rejects", limit=limit)  # type: ignore[arg-type]
            await intake.run([source])
        return admitter.counts.new, admitter.counts.updated

    assert await take("a.jsonl", 5) == (5 * passages, 0)
    await take("b.jsonl", None)
    new, updated = await take("a.jsonl", 5)
    assert updated >= 2
    assert new == 3 * passages
    await take("b.jsonl", None)
    assert (await take("a.jsonl", 100))[0] == 22 * passages


async def test_a_reading_that_ended_inside_of_a_document_neither_loses_nor_doubles_a_passage(tmp_path: Path) -> None:
    texts = {name: topics[name] for name in sorted(topics)[:12]}
    write_jsonl(tmp_path / "in.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    source = open_source(str(tmp_path / "in.jsonl"), rules=FieldRules(), chunking=Chunking(300))
    whole = [(record.id, record.text) for record in source.read() if isinstance(record, SourceDocument)]
    dataset = small_dataset(tmp_path / "out", shard_rows=4)
    inside = 0
    for _ in range(len(whole)):
        admitter = Admitter(dataset, dataset.open_index(), job="main")
        key, after = admitter.reading(source.push_key)
        inside += bool(after and after.part)
        records = [record for record, _ in zip(source.read(after=after), range(7), strict=False)]
        if not records:
            break
        # Killed here: the open shard is forgotten.
        admitter.admit(key, source.name, records)
        if len(records) < 7:
            admitter.close_shard()
    rows = [row for shard in dataset.admitted() for row in dataset.documents(shard)[0].to_pylist()]
    assert [(row["id"], row["text"]) for row in rows] == whole
    assert {row["group"] for row in rows} == set(texts)
    assert inside > 3


def test_run_with_strict_ends_with_2_and_the_mended_source_goes_on(embedmill: Command) -> None:
    path = embedmill.folder / "in.jsonl"
    path.write_text('{"id":"a","text":"One."}\n{"id":"b"}\n')
    ended = embedmill("run", "in.jsonl", *NULL, "--strict")
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == (
        "embedmill: in.jsonl:2: no text: field 'text' is missing; fields here: none (choose with --text-field); --strict "
        "stops here. 0 passages of this run were admitted before it and stay: mend the record and run the same command "
        "again\n"
    )
    path.write_text('{"id":"a","text":"One."}\n{"id":"b","text":"Two."}\n')
    assert embedmill("run", "in.jsonl", *NULL, "--strict").status == 0
    check_dataset(embedmill.folder / "out", source={"a": "One.", "b": "Two."})


def test_default_ids_and_skipped_files_are_named_once_on_stderr(embedmill: Command) -> None:
    (embedmill.folder / "in.jsonl").write_text('{"text":"One."}\n{"text":"Two."}\n')
    folder = embedmill.folder / "notes"
    folder.mkdir()
    for name in ("a.md", "b.png", "c.pdf", ".hidden.png"):
        (folder / name).write_text("Three.")
    ended = embedmill("run", "in.jsonl", "notes", *NULL)
    assert ended.status == 0
    assert ended.stderr.splitlines() == [
        "embedmill: in.jsonl: ids are FILE:LINE: inserting lines changes them; name --id-field",
        "embedmill: notes: skipped 2 files that are not text or Markdown",
    ]
    as_json = embedmill("run", "in.jsonl", "notes", *NULL, "--json")
    assert as_json.record["remarks"] == ["notes: skipped 2 files that are not text or Markdown"]


def test_compressed_standard_input_is_read(embedmill: Command) -> None:
    data = gzip.compress(b'{"id":"a","text":"One."}\n{"id":"b","text":"Two."}\n')
    ended = embedmill("run", "-", *NULL, stdin=data)
    assert ended.status == 0, ended.output
    assert {id_ for id_, _ in final_set(embedmill.folder / "out")} == {"a", "b"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--chunk-overlap", "5"), "--chunk-overlap needs --chunk N"),
        (("--chunk", "5", "--chunk-overlap", "5"), "the overlap must be smaller than the passage"),
        (("--chunk", "0"), "Invalid value for '--chunk'"),
    ],
)
def test_sizes_that_cannot_be_end_with_2(options: tuple[str, ...], says: str, embedmill: Command) -> None:
    write_jsonl(embedmill.folder / "in.jsonl", [{"id": "a", "text": "One."}])
    ended = embedmill("run", "in.jsonl", *NULL, *options)
    assert ended.status == 2
    assert says in ended.stderr
