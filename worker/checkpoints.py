"""Checkpoints: results kept beside the dataset as they arrive, so that a killed worker re-pays only what was in flight.

Each flush of each attempt is an object of its own, created whole, so that none can be torn and any store can hold them.
Whoever takes the shard next adopts all of them; they are swept when the marker is there.

Object: `EMC1`, header length (uint32), header (JSON), rows (int32), vectors (float32), crc32c of all before it;
little-endian.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from embedmill.dataset.dataset import Dataset
from embedmill.dataset.layout import FORMAT_VERSION, Failure, check_version, checkpoints_folder, known
from embedmill.dataset.shard import crc32c
from embedmill.errors import CorruptStore

from .results import Increment, ShardResults
from .trials import NOTE_PREFIX

_MAGIC = b"EMC1"
_log = logging.getLogger("embedmill.worker.checkpoints")


def encode_increment(increment: Increment, *, fingerprint: str) -> bytes:
    header = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "rows": len(increment.rows),
            "dimensions": increment.vectors.shape[1],
            "failures": [failure.as_dict() for failure in increment.failures],
            "truncated": list(increment.truncated),
            "billed_tokens": increment.billed_tokens,
            "requests": increment.requests,
            "windows": [list(rows) for rows in increment.windows],
        },
        ensure_ascii=False,
    ).encode()
    body = b"".join(
        [
            _MAGIC,
            struct.pack("<I", len(header)),
            header,
            increment.rows.astype("<i4").tobytes(),
            increment.vectors.astype("<f4").tobytes(),
        ]
    )
    return body + struct.pack("<I", crc32c(body))


def decode_increment(data: bytes, *, fingerprint: str, name: str) -> Increment:
    """Raises CorruptStore for damaged bytes, and for vectors of another embedder."""
    if data[:4] != _MAGIC or len(data) < 12 or struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
        raise CorruptStore(f"{name} is not a whole checkpoint")
    end = 8 + struct.unpack("<I", data[4:8])[0]
    try:
        header = json.loads(data[8:end])
        check_version(header, name=name)
        if header["fingerprint"] != fingerprint:
            raise CorruptStore(f"{name} holds vectors of another embedder")
        count, dimensions = header["rows"], header["dimensions"]
        return Increment(
            rows=np.frombuffer(data, dtype="<i4", count=count, offset=end).astype(np.int32),
            vectors=np.frombuffer(data, dtype="<f4", count=count * dimensions, offset=end + 4 * count)
            .reshape(count, dimensions)
            .astype(np.float32),
            failures=tuple(Failure(**known(Failure, failure)) for failure in header["failures"]),
            truncated=tuple(header["truncated"]),
            billed_tokens=header["billed_tokens"],
            requests=header["requests"],
            windows=tuple(tuple(rows) for rows in header.get("windows", [])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStore(f"{name} is damaged: {error}") from error


class Checkpoint:
    """The checkpoints of one shard, as one attempt sees and extends them. Blocking: run in a thread."""

    def __init__(self, dataset: Dataset, shard: int, *, attempt: str) -> None:
        self._dataset = dataset
        self._shard = shard
        self._folder = checkpoints_folder(shard)
        self._attempt = attempt
        self._flushes = 0

    def adopt(self, results: ShardResults) -> int:
        """Take over what earlier attempts kept; how many rows. A damaged checkpoint is passed over: its rows are owed."""
        adopted = 0
        for name in _increments(self._dataset, self._folder):
            key = f"{self._folder}/{name}"
            data = self._dataset.store.read_or_none(key)
            if data is None:
                continue
            try:
                increment = decode_increment(data, fingerprint=self._fingerprint, name=f"{self._dataset.url}/{key}")
            except CorruptStore as error:
                _log.warning("%s; its passages are embedded again", error)
                continue
            adopted += results.add(increment, kept=True)
        return adopted

    def keep(self, increment: Increment) -> None:
        """Write results durably, as one object. Where the shard was committed or retired meanwhile, nobody needs them, and
        what was erased must not come back."""
        if self._shard in self._dataset.retired():
            return
        self._flushes += 1
        self._dataset.store.create(
            f"{self._folder}/{self._attempt}-{self._flushes:05d}",
            encode_increment(increment, fingerprint=self._fingerprint),
        )
        if self._dataset.marker(self._shard) is not None or self._shard in self._dataset.retired():
            self.sweep()

    def sweep(self) -> None:
        """The marker is there: nobody needs them any more."""
        for name in self._dataset.store.names(self._folder):
            self._dataset.store.delete(f"{self._folder}/{name}")
        self._dataset.store.delete_folder(self._folder)

    @property
    def _fingerprint(self) -> str:
        return self._dataset.info.embedder.fingerprint


def count_kept(dataset: Dataset, shards: Sequence[int]) -> int:
    """Rows that the checkpoints of these shards hold, for showing progress; damaged ones count nothing. Blocking."""
    kept = 0
    fingerprint = dataset.info.embedder.fingerprint
    for shard in shards:
        for name in _increments(dataset, checkpoints_folder(shard)):
            data = dataset.store.read_or_none(f"{checkpoints_folder(shard)}/{name}")
            with suppress(CorruptStore):
                kept += len(decode_increment(data or b"", fingerprint=fingerprint, name=name).rows)
    return kept


def _increments(dataset: Dataset, folder: str) -> list[str]:
    return [name for name in dataset.store.names(folder) if not name.startswith(NOTE_PREFIX)]
