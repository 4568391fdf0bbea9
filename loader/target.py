"""The one place that speaks to Milvus: a server, or Milvus Lite inside this process.

Every call waits in a thread, one after another: Milvus Lite takes one writer, and one call in flight per key is what keeps
versions in order. Upserts and deletes are idempotent, so whatever may have been lost is sent again, within `retry_for_s`;
what pymilvus prints, logs and raises ends here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
from anyio import to_thread
from numpy.typing import NDArray
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from embedmill.errors import ConfigurationError, EmbedmillError, Overloaded, StorageError, TransientError
from embedmill.failpoints import afailpoint

from .address import Address, check_folder, parse_address
from .description import PROPERTY, CollectionDescription, check_collection_name

TOKEN_VARIABLE = "MILVUS_TOKEN"
MAX_ID_BYTES = 512
MAX_TEXT_LENGTH = 65_535
MAX_HITS = 16_384
_BATCH_ROWS = 1000
_BATCH_BYTES = 16 * 2**20
_CONNECT_S = 10.0
# Milvus Lite stalls up to 14 s while it writes a segment.
_CALL_S = 120.0
_READ_ROWS = 200
_RANGES = 50
_VECTOR = "vector"
_STRONG = "Strong"
_INSTALL = "Milvus needs its client: pip install 'embedmill[milvus]'"
# 2: not ready; 8 and 49: rate limit; 9 and 48: memory; 101: not loaded, for seconds after a server's restart.
_TRANSIENT_CODES = {2, 8, 9, 48, 49, 101}
_TRANSIENT_WORDS = ("unavailable", "deadline_exceeded", "deadline exceeded", "no available", "fail connecting")
_FULL_WORDS = ("disk quota", "deactivated", "no space left")
_REFUSED_WORDS = ("unauthenticated", "auth check failure", "permission deny", "permission_denied")

_log = logging.getLogger("embedmill.loader")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CollectionState:
    """A collection as it is. description: None where embedmill did not make it; identity: of this creation."""

    name: str
    dimensions: int | None
    description: CollectionDescription | None
    identity: str


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a search. score: cosine similarity, 1 is the same direction."""

    id: str
    score: float
    text: str
    metadata: Mapping[str, Any]


@asynccontextmanager
async def open_target(
    uri: str, *, collection: str | None = None, must_exist: bool = False, retry_for_s: float = 120.0
) -> AsyncIterator[MilvusTarget]:
    """Connect, and let go of the database in the end, so that another process can open it.

    uri: `http(s)://HOST:PORT[/DATABASE]`, with a token from MILVUS_TOKEN, or the path of a Milvus Lite database (`X.db`).
    Raises ConfigurationError in one line for everything that keeps it from opening.
    """
    target = MilvusTarget(uri, collection=collection, retry_for_s=retry_for_s)
    await target.connect(must_exist=must_exist)
    try:
        yield target
    finally:
        with anyio.CancelScope(shield=True):
            await target.aclose()


class MilvusTarget:
    """A database, and the collection that is loaded into or searched (`collection`, until then None)."""

    def __init__(self, uri: str, *, collection: str | None = None, retry_for_s: float = 120.0) -> None:
        self.address = parse_address(uri)
        self.collection = None if collection is None else check_collection_name(collection)
        self._retry_for_s = retry_for_s
        self._limiter = anyio.CapacityLimiter(1)
        self._client: Any = None

    @property
    def lite(self) -> bool:
        return self.address.lite

    async def connect(self, *, must_exist: bool = False) -> None:
        """Does nothing when connected."""
        if self._client is not None:
            return
        if self.lite:
            check_folder(Path(self.address.uri), must_exist=must_exist)
        self._client = await to_thread.run_sync(_connect, self.address, limiter=self._limiter)

    async def aclose(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await to_thread.run_sync(_disconnect, client, self.address, limiter=self._limiter)

    async def collections(self) -> list[CollectionState]:
        """The collections that embedmill made, by name."""
        names: list[str] = await self._call("list collections", self._client.list_collections)
        states = [await self.describe(name) for name in sorted(names)]
        return [state for state in states if state is not None and state.description is not None]

    async def describe(self, name: str) -> CollectionState | None:
        """None when there is no such collection."""
        if not await self._call("look for the collection", self._client.has_collection, name, timeout=_CALL_S):
            return None
        record = await self._call("describe the collection", self._client.describe_collection, name, timeout=_CALL_S)
        return _state(name, record)

    async def create(self, description: CollectionDescription) -> None:
        """Create `collection`, without an index: it is faster to build one after a backfill."""
        await self._call("create the collection", _create, self._client, self._name, description, lite=self.lite)

    async def upsert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of `id, vector, text, metadata, version`, each id at most once."""
        for batch in _batches(rows):
            await self._call("upsert", self._client.upsert, self._name, list(batch), timeout=_CALL_S)
            await afailpoint("loader.after_batch")

    async def delete(self, ids: Sequence[str]) -> None:
        """Ids that are not there are no error."""
        for start in range(0, len(ids), _BATCH_ROWS):
            chosen = _one_of(ids[start : start + _BATCH_ROWS])
            await self._call("delete", self._client.delete, self._name, filter=chosen, timeout=_CALL_S)

    async def flush(self) -> None:
        """Make everything acknowledged durable."""
        await self._call("flush", self._client.flush, self._name, timeout=_CALL_S)

    async def compact(self) -> None:
        """Have a server rewrite its segments without what was deleted, when it gets to it."""
        if not self.lite:
            await self._call("compact", self._client.compact, self._name, timeout=_CALL_S)

    async def make_searchable(self) -> None:
        """Build the index where there is none, or a damaged one, and load.

        Milvus Lite gets FLAT: exact, built in no time, 12 ms a search over 13,000 rows of 384 dimensions, where its HNSW
        takes minutes to build over 50,000 rows. A server gets its own AUTOINDEX. Metric COSINE.
        """
        await self._call("build the index", _index, self._client, self._name, lite=self.lite)

    async def count(self) -> int:
        """Rows that are there, read with strong consistency."""
        count = partial(self._client.query, filter="", output_fields=["count(*)"], consistency_level=_STRONG)
        reply = await self._call("count the rows", count, self._name, timeout=_CALL_S)
        return int(reply[0]["count(*)"])

    async def versions(self) -> dict[str, int]:
        """The version of every id that is there, read with strong consistency."""
        return await self._call("read the ids", _read_versions, self._client, self._name)

    async def vectors(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The stored vectors, each (dimensions,) float32, of those ids that are there."""
        found: dict[str, NDArray[np.float32]] = {}
        for start in range(0, len(ids), _READ_ROWS):
            chosen = _one_of(ids[start : start + _READ_ROWS])
            get = partial(self._client.query, output_fields=[_VECTOR], consistency_level=_STRONG, timeout=_CALL_S)
            for row in await self._call("read vectors", get, self._name, filter=chosen):
                found[str(row["id"])] = np.asarray(row[_VECTOR], dtype=np.float32)
        return found

    async def parts_of(self, ids: Sequence[str]) -> set[str]:
        """Ids that are there and are one of these with a `#` and more behind it, read with strong consistency."""
        found: set[str] = set()
        for start in range(0, len(ids), _RANGES):
            chosen = " or ".join(map(_begins_with, ids[start : start + _RANGES]))
            query = partial(self._client.query, output_fields=["id"], consistency_level=_STRONG, timeout=_CALL_S)
            found.update(str(row["id"]) for row in await self._call("look for ids", query, self._name, filter=chosen))
        return found

    async def search(self, vector: NDArray[np.float32], *, limit: int, expression: str = "") -> list[Hit]:
        """The nearest rows, best first. Raises ConfigurationError for an expression that Milvus does not understand."""
        search = partial(
            self._client.search,
            data=[vector],
            limit=limit,
            filter=expression,
            output_fields=["text", "metadata"],
            search_params={"metric_type": "COSINE"},
            consistency_level=_STRONG,
            timeout=_CALL_S,
        )
        try:
            reply = await self._call("search", search, self._name)
        except StorageError as error:
            if not expression:
                raise
            reason = _reason(error.__cause__ or error)
            raise ConfigurationError(
                f'--filter {expression!r} is not understood: {reason}; it looks like metadata["lang"] == "en"'
            ) from error
        return [_hit(row) for row in reply[0]]

    @property
    def _name(self) -> str:
        if self.collection is None:
            raise ConfigurationError("no collection was chosen: say --collection NAME")
        return self.collection

    async def _call(self, action: str, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        attempts = AsyncRetrying(
            sleep=anyio.sleep,
            retry=retry_if_exception_type(TransientError),
            wait=wait_random_exponential(multiplier=0.2, max=10.0),
            stop=stop_after_delay(self._retry_for_s),
            reraise=True,
        )
        return await attempts(self._call_once, action, partial(function, *args, **kwargs))

    async def _call_once(self, action: str, call: Callable[[], Result]) -> Result:
        if self._client is None:
            raise RuntimeError("the target is not connected")
        try:
            return await to_thread.run_sync(call, limiter=self._limiter)
        except EmbedmillError:
            raise
        except Exception as error:
            if not _is_milvus(error):
                raise
            raise _translated(error, action=action, shown=self.address.shown) from error


def _connect(address: Address) -> Any:
    client_class = _client_class(lite=address.lite)
    token = os.environ.get(TOKEN_VARIABLE, "")
    with _logged_errors() as logged:
        try:
            if address.lite:
                with _lite_users_lock:
                    client = client_class(address.uri, timeout=_CONNECT_S)
                    _lite_users[address.uri] = _lite_users.get(address.uri, 0) + 1
                return client
            return client_class(address.uri, token=token, timeout=_CONNECT_S)
        except Exception as error:
            if not _is_milvus(error):
                raise
            raise _connection_error(error, address=address, logged=logged) from error


def _disconnect(client: Any, address: Address) -> None:
    with suppress(Exception):
        client.close()
    if not address.lite:
        return
    from milvus_lite.server_manager import server_manager_instance

    with _lite_users_lock:
        _lite_users[address.uri] -= 1
        if not _lite_users[address.uri]:
            server_manager_instance.release_server(address.uri)


# pymilvus shares one Lite server among all clients of a path, and stops it only when the process ends.
_lite_users: dict[str, int] = {}
_lite_users_lock = threading.Lock()


def _client_class(*, lite: bool) -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pymilvus

            if lite:
                import milvus_lite.server_manager  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(_INSTALL) from error
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(("pymilvus", "milvus_lite"))]:
        _silence(logging.getLogger(name), propagate="." in name and not name.startswith("pymilvus"))
    _silence(logging.getLogger("milvus_lite"), propagate=False)
    return pymilvus.MilvusClient


def _one_of(ids: Sequence[str]) -> str:
    """A filter for these ids. pymilvus' own, for `ids=`, quotes as Python does, which Milvus reads otherwise."""
    return f"id in {json.dumps(list(ids), ensure_ascii=False)}"


def _begins_with(id_: str) -> str:
    """A filter for this id with a `#` behind it. A range, since there is no telling what `like` makes of `_` and `%`."""
    first, behind = (json.dumps(id_ + mark, ensure_ascii=False) for mark in "#$")
    return f"(id >= {first} and id < {behind})"


def _silence(logger: logging.Logger, *, propagate: bool) -> None:
    logger.handlers = [logging.NullHandler()]
    logger.propagate = propagate


@contextmanager
def _logged_errors() -> Iterator[list[BaseException]]:
    """Milvus Lite logs why it cannot open, and pymilvus then says only that it could not: keep what is logged."""
    seen: list[BaseException] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                seen.append(record.exc_info[1])

    logger, handler = logging.getLogger("milvus_lite"), Keep()
    logger.addHandler(handler)
    try:
        yield seen
    finally:
        logger.removeHandler(handler)


def _connection_error(error: Exception, *, address: Address, logged: Sequence[BaseException]) -> ConfigurationError:
    cause = logged[-1] if logged else error
    if type(cause).__name__ == "DataDirLockedError":
        return ConfigurationError(
            f"another process has {address.shown} open, and a Milvus Lite database takes one at a time: "
            "stop that one, or use a Milvus server"
        )
    if address.lite:
        return ConfigurationError(
            f"cannot open the Milvus Lite database {address.shown}: {_reason(cause)}; another process may have it open"
        )
    if any(word in str(error).lower() for word in _REFUSED_WORDS):
        return ConfigurationError(
            f"Milvus at {address.shown} refuses the token: set {TOKEN_VARIABLE} (USER:PASSWORD or a key)"
        )
    return ConfigurationError(f"cannot reach Milvus at {address.shown}: is it running, and is the URL right?")


def _is_milvus(error: BaseException) -> bool:
    import grpc
    from pymilvus.exceptions import MilvusException

    return isinstance(error, (MilvusException, grpc.RpcError))


def _translated(error: Exception, *, action: str, shown: str) -> EmbedmillError:
    """Which of our errors it is: try again, or not."""
    text = f"{error} {_status(error)}".lower()
    codes = {getattr(error, "code", None), getattr(error, "compatible_code", None)}
    line = f"Milvus at {shown} cannot {action}: {_reason(error)}"
    if any(word in text for word in _FULL_WORDS):
        return StorageError(f"{line}; free some space and run the same command again")
    if any(word in text for word in _REFUSED_WORDS):
        return ConfigurationError(
            f"Milvus at {shown} refuses to {action}: set {TOKEN_VARIABLE} (USER:PASSWORD or a key)"
        )
    integers = {code for code in codes if isinstance(code, int)}
    if integers & _TRANSIENT_CODES or any(word in text for word in _TRANSIENT_WORDS):
        return Overloaded(f"{line}; run the same command again later")
    return StorageError(line)


def _status(error: BaseException) -> str:
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    return str(getattr(code, "name", ""))


def _reason(error: BaseException) -> str:
    """Its message in one line."""
    details = getattr(error, "details", None)
    text = getattr(error, "message", None) or (details() if callable(details) else None) or str(error)
    return " ".join(str(text).split())[:300]


def _state(name: str, record: Mapping[str, Any]) -> CollectionState:
    dimensions = next((field["params"].get("dim") for field in record["fields"] if field["name"] == _VECTOR), None)
    text = record.get("description") or (record.get("properties") or {}).get(PROPERTY) or ""
    description = CollectionDescription.from_json(text)
    creation = description.creation if description else ""
    identity = f"{record.get('collection_id', 0)}:{creation}"
    return CollectionState(name, None if dimensions is None else int(dimensions), description, identity)


def _create(client: Any, name: str, description: CollectionDescription, *, lite: bool) -> None:
    from pymilvus import DataType

    text = description.to_json()
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=text)
    schema.add_field("id", DataType.VARCHAR, max_length=MAX_ID_BYTES, is_primary=True)
    schema.add_field(_VECTOR, DataType.FLOAT_VECTOR, dim=description.dimensions)
    schema.add_field("text", DataType.VARCHAR, max_length=MAX_TEXT_LENGTH)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("version", DataType.INT64)
    extra = {"properties": {PROPERTY: text}} if lite else {}
    client.create_collection(name, schema=schema, timeout=_CALL_S, **extra)


def _index(client: Any, name: str, *, lite: bool) -> None:
    try:
        _load(client, name, index_type="FLAT" if lite else "AUTOINDEX")
    except Exception as error:
        if not lite or not _is_milvus(error):
            raise
        # Milvus Lite writes the files of its index in the background, in place: whoever is killed meanwhile leaves one
        # that it refuses to read, for good. The rows are elsewhere, and whole.
        _log.warning("%s: its index cannot be read and is built anew: %s", name, _reason(error))
        client.drop_index(name, _VECTOR)
        _load(client, name, index_type="FLAT")


def _load(client: Any, name: str, *, index_type: str) -> None:
    if not client.list_indexes(name):
        parameters = client.prepare_index_params()
        parameters.add_index(_VECTOR, index_type=index_type, metric_type="COSINE", index_name=_VECTOR)
        client.create_index(name, parameters)
    client.load_collection(name)


def _read_versions(client: Any, name: str) -> dict[str, int]:
    iterator = client.query_iterator(
        name,
        batch_size=_BATCH_ROWS,
        filter="",
        output_fields=["id", "version"],
        consistency_level=_STRONG,
        timeout=_CALL_S,
    )
    found: dict[str, int] = {}
    try:
        while block := iterator.next():
            found.update((str(row["id"]), int(row["version"])) for row in block)
    finally:
        iterator.close()
    return found


def _batches(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    start = size = 0
    for number, row in enumerate(rows):
        # A character takes up to four bytes, and gRPC refuses messages over 64 MiB.
        row_bytes = row[_VECTOR].nbytes + 4 * len(row["text"]) + 512
        if number > start and (number - start == _BATCH_ROWS or size + row_bytes > _BATCH_BYTES):
            yield rows[start:number]
            start, size = number, 0
        size += row_bytes
    if start < len(rows):
        yield rows[start:]


def _hit(row: Mapping[str, Any]) -> Hit:
    entity = row["entity"]
    return Hit(str(row["id"]), float(row["distance"]), str(entity.get("text") or ""), entity.get("metadata") or {})
