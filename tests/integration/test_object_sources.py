"""Sources in an object store: a real S3 protocol on loopback, every format, resumed reading, and what goes wrong."""

import gzip
import http.server
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedmill import objects
from embedmill.documents import Reject, SourceDocument
from embedmill.errors import ConfigurationError, StorageError
from embedmill.objects import parse_object_url
from embedmill.sources import FieldRules, Source, open_source
from embedmill.sources import objects as source_objects
from tests.conftest import Command
from tests.invariants import final_set

pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

RULES = FieldRules()
TEXTS = {name: topics[name] for name in sorted(topics)[:20]}
JSONL = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items()).encode()


class Bucket:
    """A bucket named `texts` on an S3 server; `environment` is what a client needs."""

    def __init__(self, endpoint: str) -> None:
        from obstore.store import S3Store

        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            # Nobody is to ask the machine's cloud for credentials.
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",
        }
        self._store = S3Store(
            "texts", endpoint=endpoint, access_key_id="test", secret_access_key="test", region="us-east-1",
            client_options={"allow_http": True},
        )  # fmt: skip

    def put(self, key: str, data: bytes) -> str:
        import obstore

        obstore.put(self._store, key, data)
        return f"s3://texts/{key}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket="texts")
    client.close()
    yield endpoint
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    found = Bucket(server)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(source_objects, "OPENING_RETRIES", 1)
    return found


def read_parts(source: Source) -> tuple[list[SourceDocument], list[Reject]]:
    items = list(source.read())
    documents = [item for item in items if isinstance(item, SourceDocument)]
    return documents, [item for item in items if isinstance(item, Reject)]


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(TEXTS), "text": list(TEXTS.values())}), sink, row_group_size=6)
    return sink.getvalue().to_pybytes()


def as_csv() -> bytes:
    import csv
    import io

    out = io.StringIO()
    csv.writer(out).writerows([("id", "text"), *TEXTS.items()])
    return out.getvalue().encode()


FORMATS: dict[str, Callable[[], bytes]] = {
    "d.jsonl": lambda: JSONL,
    "d.jsonl.gz": lambda: gzip.compress(JSONL),
    "d.jsonl.zst": lambda: pa.compress(JSONL, codec="zstd", asbytes=True),
    "d.csv": as_csv,
    "d.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_a_bucket_and_goes_on_behind_any_record(name: str, bucket: Bucket) -> None:
    url = bucket.put(f"corpora/{name}", FORMATS[name]())
    source = open_source(url, rules=RULES)
    documents, rejects = read_parts(source)
    assert {document.id: document.text for document in documents} == TEXTS
    assert rejects == []
    assert source.name == url
    assert source.total_bytes() == len(FORMATS[name]())
    for split in (1, 7, 19):
        head = list(islice(source.read(), split))
        assert list(source.read(after=head[-1].cursor)) == documents[split:]


def test_reading_goes_on_with_the_range_behind_the_cursor_and_holds_one_range(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedmill.sources import files

    asked: list[tuple[int, int]] = []
    get = files.ObjectFile._get

    def note(self: files.ObjectFile, start: int, end: int) -> memoryview:
        asked.append((start, end))
        return get(self, start, end)

    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(files.ObjectFile, "_get", note)
    source = open_source(bucket.put("ranges.jsonl", JSONL), rules=RULES)
    cursor = list(islice(source.read(), 15))[-1].cursor
    asked.clear()
    assert len(list(source.read(after=cursor))) == 5
    assert asked[0][0] == cursor.offset
    assert max(end - start for start, end in asked) <= 10_000


def test_a_prefix_is_a_folder_of_text_files(bucket: Bucket) -> None:
    bucket.put("notes/b/two.md", b"# Two\n\nText.")
    bucket.put("notes/a.txt", b"First.")
    bucket.put("notes/bad.txt", b"caf\xe9")
    bucket.put("notes/.hidden/x.md", b"Hidden.")
    bucket.put("notes/picture.png", b"\x89PNG")
    bucket.put("notes-other/c.md", b"Not below the prefix.")
    for url in ("s3://texts/notes/", "s3://texts/notes"):
        source = open_source(url, rules=RULES)
        documents, [reject] = read_parts(source)
        assert [(document.id, document.text) for document in documents] == [
            ("a.txt", "First."),
            ("b/two.md", "# Two\n\nText."),
        ]
        assert json.loads(documents[1].metadata) == {"path": "b/two.md", "title": "Two"}
        assert (reject.place, reject.reason) == ("bad.txt", "not UTF-8: byte 0xe9 at offset 3")
        assert source.remarks() == [f"{url}: skipped 1 file that is not text or Markdown"]
    [one] = read_parts(open_source("s3://texts/notes/b/two.md", rules=RULES))[0]
    assert one.id == "two.md"


def test_the_push_key_follows_the_content_and_the_address(bucket: Bucket) -> None:
    first = open_source(bucket.put("key.jsonl", b'{"text":"a"}\n'), rules=RULES).push_key
    assert open_source("s3://texts/key.jsonl", rules=RULES).push_key == first
    assert open_source(bucket.put("other.jsonl", b'{"text":"a"}\n'), rules=RULES).push_key != first
    assert open_source(bucket.put("key.jsonl", b'{"text":"b"}\n'), rules=RULES).push_key != first


def test_an_object_that_changes_while_it_is_read_ends_the_reading(bucket: Bucket) -> None:
    source = open_source(bucket.put("moving.jsonl", JSONL), rules=RULES)
    bucket.put("moving.jsonl", JSONL + b'{"text":"more"}\n')
    with pytest.raises(StorageError, match="it was changed while it was read; run the same command again"):
        list(source.read())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://texts/nowhere.jsonl", "no such bucket or object, and no folder of that name"),
        ("s3://no-such-bucket/d.jsonl", "no such bucket"),
        ("s3://texts/nowhere/", "no such bucket or object"),
        ("s3://texts/only-data/", "no text files"),
        ("s3://texts/only-data/d.docx", "unknown kind of file; known are .jsonl"),
        ("s3://", "names no bucket; it should look like s3://BUCKET/KEY"),
        ("https://user:secret@host/d.jsonl", "a query, a fragment or a password"),
        ("https://host/d.jsonl?token=secret", "a query, a fragment or a password"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(url: str, says: str, bucket: Bucket) -> None:
    bucket.put("only-data/d.docx", b"PK")
    with pytest.raises(ConfigurationError) as caught:
        open_source(url, rules=RULES)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_credentials_are_one_line_that_says_what_to_set(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket.put("d.jsonl", JSONL)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as caught:
        open_source(url, rules=RULES)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(ConfigurationError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_source("az://container/d.jsonl", rules=RULES)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://host", "http://", ""])
def test_an_endpoint_that_is_no_address_is_refused(
    endpoint: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigurationError, match="an address looks like https://HOST"):
        open_source("s3://texts/d.jsonl", rules=RULES)


def test_a_server_that_does_not_answer_is_a_storage_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"cannot be reached: HEAD http://127\.0\.0\.1:1/texts/d\.jsonl") as caught:
        open_source("s3://texts/d.jsonl", rules=RULES)
    assert "\n" not in str(caught.value)


class Wire:
    """A relay to the server that can be cut: what is in flight breaks off, and nobody is let in any more."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        for end in (self._listener, *self._open):
            with_reset(end)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=relay, args=(source, sink))
                self._threads.append(thread)
                thread.start()


def relay(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65_536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        with_reset(source)
        with_reset(sink)


def with_reset(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        end.close()


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_a_network_that_goes_while_it_is_read_is_a_storage_error_and_no_reject(
    name: str, bucket: Bucket, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedmill.sources import files

    monkeypatch.setattr(files, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(objects.open_objects, "__kwdefaults__", {"retries": 1, "retry_s": 5, "timeout_s": 30})
    url = bucket.put(f"wire/{name}", FORMATS[name]())
    wire = Wire(server)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", wire.endpoint)
        source = open_source(url, rules=RULES)
        records = source.read()
        first = next(records)
        assert isinstance(first, SourceDocument)
        wire.cut()
        read: list[SourceDocument | Reject] = []
        with pytest.raises(StorageError, match=r"cannot be reached: .*the same command goes on"):
            read.extend(records)
        assert not any(isinstance(record, Reject) for record in read)
    finally:
        wire.cut()
        wire.join()


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """A web server that hands out whole files only, as Python's own does."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path), **options)  # type: ignore[arg-type, misc]

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_web_server_without_ranges_is_named_and_one_without_the_file_too(tmp_path: Path, web_server: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(JSONL)
    with pytest.raises(ConfigurationError, match="hands out no parts of files, only whole ones; download it first"):
        read_parts(open_source(f"{web_server}/d.jsonl", rules=RULES))
    with pytest.raises(ConfigurationError, match="no such bucket or object"):
        open_source(f"{web_server}/nowhere.jsonl", rules=RULES)
    with pytest.raises(ConfigurationError, match="a web server does not list its files"):
        open_source(f"{web_server}/", rules=RULES)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://b/k.jsonl", ("s3://b", "k.jsonl", False)),
        ("gs://b/p/", ("gs://b", "p/", True)),
        ("az://c", ("az://c", "", True)),
        ("https://host:1/a/b.parquet", ("https://host:1", "a/b.parquet", False)),
        ("ftp://host/a", None),
        ("folder/s3:/x", None),
    ],
)
def test_an_address_is_taken_apart(url: str, parts: tuple[str, str, bool] | None) -> None:
    found = parse_object_url(url)
    assert (found and (found.root, found.key, found.is_folder)) == parts


def test_run_reads_from_a_bucket_and_the_same_command_reads_nothing_anew(bucket: Bucket, embedmill: Command) -> None:
    url = bucket.put("corpora/run.jsonl.gz", gzip.compress(JSONL))
    command = ("run", url, "--to", "out", "--model", "null/8", "--no-milvus", "--chunk", "1000", "--json")
    ended = embedmill(*command, environment=bucket.environment)
    assert (ended.status, ended.stderr) == (0, "")
    ids = {id_ for id_, _ in final_set(embedmill.folder / "out")}
    assert {id_.rpartition("#")[0] for id_ in ids} == set(TEXTS)
    again = embedmill(*command, environment=bucket.environment)
    assert (again.status, again.record["now"]["embedded"]) == (0, 0)
    missing = embedmill("run", "s3://texts/none.jsonl", *command[2:], environment=bucket.environment)
    assert missing.status == 2
    assert missing.stderr == (
        "embedmill: s3://texts/none.jsonl: no such bucket or object, and no folder of that name\n"
    )
    gone = embedmill(*command, environment={**bucket.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
    assert gone.status == 3
    assert len(gone.stderr.splitlines()) == 1
