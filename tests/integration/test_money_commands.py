"""Caps, bills and probes as users meet them: the real command in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from embedmill.commands import probing
from embedmill.dataset.dataset import Dataset
from embedmill.embedder import EmbedderSpec
from embedmill.errors import StorageError
from embedmill.sources import FieldRules
from tests.conftest import Command, Corpus, write_jsonl
from tests.datasets import small_dataset
from tests.invariants import check_dataset
from tests.servers import Server, running

V3 = ("--model", "jina/jina-embeddings-v3", "--dimensions", "16")
REHEARSED = (*V3, "--rehearse", "--tier", "premium", "--no-milvus")
KEY = {"JINA_API_KEY": "jina_good"}


@pytest.fixture(scope="module")
def unique(python_docs: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 texts, none of which is there twice."""
    records = [{"id": id_, "text": f"{id_}: {text}"} for id_, text in list(python_docs.texts.items())[:400]]
    return write_jsonl(tmp_path_factory.mktemp("unique") / "unique.jsonl", records)


@contextmanager
def provider(*, dimensions: int, status: int = 200) -> Iterator[str]:
    """The address of one that answers everything with vectors of these dimensions, or with an error."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            vector = base64.b64encode(struct.pack(f"<{dimensions}f", *[0.5] * dimensions)).decode()
            data = [{"index": index, "embedding": vector} for index in range(len(asked["input"]))]
            body = {"data": data, "usage": {"total_tokens": 3}} if status == 200 else {"detail": "no"}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def would_have_billed(stderr: str) -> tuple[int, int]:
    """Tokens in all, and of them for texts that were billed before, as the stand-in of a rehearsal says."""
    found = re.search(r"would have billed ([\d,]+) tokens, ([\d,]+) of them", stderr)
    assert found is not None, stderr
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def test_a_capped_run_stops_says_how_it_goes_on_and_with_a_larger_cap_it_does(embedmill: Command, unique: Path) -> None:
    capped = embedmill("run", unique, "--to", "set", *REHEARSED, "--max-tokens", "8000")
    assert capped.status == 3
    assert "job main has reached its cap" in capped.stderr
    assert "a larger --max-tokens" in capped.stderr
    assert capped.stdout.startswith("Stopped before the end; nothing is lost.")
    billed, again = would_have_billed(capped.stderr)
    assert 0.95 * 8000 < billed <= 8000
    assert again == 0

    same = embedmill("run", unique, "--to", "set", *REHEARSED, "--max-tokens", "8000")
    assert same.status == 3
    assert "of 8,000 tokens were billed" in same.stderr
    assert would_have_billed(same.stderr) == (0, 0)

    status = embedmill("status", "set").stdout
    assert re.search(r"cap +[78],\d\d\d of 8,000 tokens of job main", status)

    larger = embedmill("run", unique, "--to", "set", *REHEARSED, "--max-tokens", "1000000", "--json")
    assert larger.status == 0, larger.output
    rest, again = would_have_billed(larger.stderr)
    assert larger.record["bill"]["tokens"] == rest
    # The probe asks for the same word each time.
    assert again <= 10
    assert embedmill("status", "set", "--json").record["passages"]["billed_tokens"] == billed + rest
    check_dataset(str(embedmill.folder / "set"))


def test_the_bill_stands_beside_what_the_quote_said_of_the_same_passages(embedmill: Command, unique: Path) -> None:
    quoted = embedmill("quote", unique, *V3, "--json").record
    ran = embedmill("run", unique, "--to", "set", *REHEARSED)
    assert ran.status == 0, ran.output
    billed, _ = would_have_billed(ran.stderr)
    assert f"  tokens      {billed:,} billed, 0.00" in ran.stdout
    assert f"  quoted      {quoted['tokens']:,}, 0.00" in ran.stdout
    again = embedmill("run", unique, "--to", "set", *REHEARSED, "--json").record
    assert again["bill"]["quoted_tokens"] == 0
    assert again["bill"]["tokens"] < 10


def test_a_local_model_has_no_bill(embedmill: Command, unique: Path) -> None:
    ran = embedmill("run", unique, "--to", "set", "--model", "null/8", "--no-milvus")
    assert re.search(r"  tokens      [\d,]+, in 1 requests\n", ran.stdout)
    assert "quoted" not in ran.stdout
    assert "USD" not in ran.stdout


def test_a_local_model_can_be_capped_too(embedmill: Command, unique: Path) -> None:
    ran = embedmill("run", unique, "--to", "set", "--model", "null/8", "--no-milvus", "--max-tokens", "3000")
    assert ran.status == 3
    assert "job main has reached its cap" in ran.stderr
    kept = embedmill("status", "set", "--json").record
    assert 2500 < kept["passages"]["billed_tokens"] <= 3000
    assert embedmill("run", unique, "--to", "set", "--model", "null/8", "--no-milvus", "--max-tokens", "0").status == 0
    check_dataset(str(embedmill.folder / "set"))


def test_create_and_resume_set_the_cap_and_it_stays_with_the_job(embedmill: Command) -> None:
    made = embedmill("create", "set", "--model", "null/8", "--max-tokens", "500", "--json")
    assert made.record["max_tokens"] == 500
    assert embedmill("create", "set", "--model", "null/8", "--json").record["max_tokens"] == 500
    assert embedmill("pause", "main", "--to", "set").status == 0
    assert embedmill("resume", "main", "--to", "set", "--max-tokens", "700").status == 0
    dataset = Dataset.open(str(embedmill.folder / "set"))
    dataset.change_job("main", lambda job: type(job)("main", state="paused", caps={"max_tokens": 700, "reached": 700}))
    refused = embedmill("resume", "main", "--to", "set")
    assert refused.status == 3
    assert "a larger --max-tokens" in refused.stderr
    assert embedmill("resume", "main", "--to", "set", "--max-tokens", "0").status == 0
    record = dataset.job("main")
    assert record is not None
    assert (record.state, record.max_tokens) == ("running", 0)


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_a_cap_that_is_no_number_is_refused(embedmill: Command, unique: Path, value: str) -> None:
    assert embedmill("run", unique, "--to", "set", *REHEARSED, "--max-tokens", value).status == 2


def test_vectors_of_other_dimensions_are_found_before_anything_is_admitted(embedmill: Command, unique: Path) -> None:
    with provider(dimensions=8) as api_base:
        ran = embedmill("run", unique, "--to", "set", *V3, "--no-milvus", "--api-base", api_base, environment=KEY)
    assert ran.status == 3
    assert ran.stderr.strip().splitlines()[-1] == (
        "embedmill: the provider was asked for one vector first, in vain: vector 0 has 8 dimensions instead of 16;"
        " nothing was admitted"
    )
    assert Dataset.open(str(embedmill.folder / "set")).admitted() == []


@pytest.mark.server
def test_push_asks_the_provider_first_where_it_has_a_key_and_says_so_where_not(
    embedmill: Command, unique: Path, tmp_path: Path
) -> None:
    with running(Server(tmp_path / "server", on_socket=True, aof=True)) as server:
        pushed = ("push", unique, "--to", "set", "--redis", server.url, "--limit", "20")
        assert embedmill("create", "set", *V3).status == 0, "it sends nothing, and needs no key"
        with provider(dimensions=16, status=401) as api_base:
            refused = embedmill(*pushed, "--api-base", api_base, environment=KEY)
        assert refused.status == 3
        assert "401" in refused.stderr
        dataset = Dataset.open(str(embedmill.folder / "set"))
        assert dataset.admitted() == []
        with provider(dimensions=16) as api_base:
            assert embedmill(*pushed, "--api-base", api_base, environment=KEY).status == 0
        assert sum(dataset.admission(shard).rows for shard in dataset.admitted()) == 20
        for named in ((), V3):
            keyless = embedmill("push", unique, "--to", "set", "--redis", server.url, *named)
            assert keyless.status == 0
            assert keyless.stderr.count("the provider was not asked whether it answers: no Jina API key") == 1


@pytest.mark.server
def test_a_push_to_an_inbox_has_no_cap(embedmill: Command, unique: Path) -> None:
    said = embedmill("push", unique, "--inbox", "box", "--redis", "redis://127.0.0.1:1", "--max-tokens", "5")
    assert said.status == 2
    assert "embedmill create" in said.stderr


def test_a_corpus_that_cannot_fit_is_refused_before_anything_is_admitted(embedmill: Command, unique: Path) -> None:
    huge = embedmill.folder / "huge.jsonl"
    huge.write_bytes(unique.read_bytes() * 3)
    os.truncate(huge, 8 * 10**12)
    ran = embedmill("run", huge, "--to", "set", "--model", "null/1024", "--no-milvus")
    assert ran.status == 3
    assert re.search(r"needs about [\d.,]+ TB and its disk has [\d.,]+ .B free: nothing was admitted", ran.stderr)
    assert Dataset.open(str(embedmill.folder / "set")).admitted() == []


@pytest.mark.parametrize(
    ("free", "limit", "milvus", "said"),
    [
        (10**9, None, False, ""),
        (2_000_000, None, False, ""),
        (1_750_000, None, False, "it may become full"),
        (2_000_000, None, True, "it may become full"),
        (100_000, None, False, None),
        (100_000, 10, False, ""),
    ],
)
def test_disk_room_is_judged_by_what_is_new(
    tmp_path: Path,
    unique: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    limit: int | None,
    milvus: bool,
    said: str | None,
) -> None:
    """400 passages of 1,024 float32 make some 1.6 MB."""
    dataset = small_dataset(tmp_path / "set", embedder=EmbedderSpec(model="null/1024", dimensions=1024, revision="1"))
    usage = type("usage", (), {"free": free})
    monkeypatch.setattr(probing.shutil, "disk_usage", lambda _path: usage)

    def check() -> str:
        with closing(dataset.open_index()) as index:
            return probing.check_disk(
                dataset,
                [str(unique), "-", "pydoc:"],
                rules=FieldRules(),
                chunking=None,
                index=index,
                limit=limit,
                milvus_here=milvus,
            )

    if said is None:
        with pytest.raises(StorageError, match="--limit"):
            check()
    else:
        assert check().endswith(said)
        assert bool(check()) == bool(said)
