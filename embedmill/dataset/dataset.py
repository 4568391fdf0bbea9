"""One dataset, opened: its objects read, checked and created. Nothing here waits on a queue or knows a provider.

What counts is decided here and nowhere else: a shard is committed when its marker exists, and it is live when no retirement
has retired it and, if it was written as a replacement, when a retirement has put it in place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..embedder import EmbedderSpec
from ..errors import ConfigurationError, CorruptStore, ObjectChanged, ObjectExists, StorageError
from . import layout
from .index import INDEXED_COLUMNS, DatasetIndex
from .layout import DatasetInfo, Job, Marker, Retirement, StoredObject
from .local_folder import local_folder
from .local_store import LocalStore
from .passages import (
    Passage,
    PassagesFooter,
    ShardOrigin,
    decode_passages,
    encode_passages,
    passages_table,
    read_footer,
)
from .rowless import decode_rowless, encode_rowless
from .shard import DecodedShard, EncodedShard, crc32c, decode_shard, encode_shard
from .store import Store, open_store
from .zarr_metadata import check_array, create_metadata, raise_shape, shape_of

DAMAGED_FOLDER = "damaged"


def now_iso() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Admission:
    """What is asked again and again of an admitted shard. text_bytes: about; retries: row -> (shard, row) of the failure
    tried again; replaces: the shards that it was written to replace; max_version: None where it is not known."""

    job: str
    rows: int
    text_bytes: int
    retries: Mapping[int, tuple[int, int]]
    replaces: tuple[int, ...] = ()
    max_version: int | None = None


class Dataset:
    """A dataset at a URL. Cheap to hold; every method reads what is stored now."""

    def __init__(self, store: Store, info: DatasetInfo) -> None:
        self.store = store
        self.info = info
        if isinstance(store, LocalStore):
            store.anchor = layout.DATASET_KEY
        self._markers: dict[int, Marker] = {}
        self._admissions: dict[int, Admission] = {}
        self._put_aside: dict[str, frozenset[int]] = {}
        self._retirements: dict[int, Retirement] = {}
        self._switches: tuple[int, frozenset[int], frozenset[int]] = 0, frozenset(), frozenset()

    @classmethod
    def open(cls, url: str) -> Dataset:
        """Raises ConfigurationError where there is no dataset, CorruptStore where there is a broken one."""
        store = open_store(url)
        data = store.read_or_none(layout.DATASET_KEY)
        if data is None:
            raise ConfigurationError(f"{url} is not a dataset: it has no {layout.DATASET_KEY}")
        return cls(store, DatasetInfo.from_bytes(data, name=f"{store.url}/{layout.DATASET_KEY}"))

    @classmethod
    def open_or_create(cls, url: str, *, embedder: EmbedderSpec, dtype: str = "float32") -> Dataset:
        """Open for writing vectors of this embedder, creating the dataset first where there is none.

        Raises ConfigurationError when the dataset holds vectors of another embedder, or the place holds something else, or
        the vectors are no floats.
        """
        embedder.require_floats()
        store = open_store(url)
        if not store.exists(layout.DATASET_KEY):
            _refuse_foreign_folder(store)
            info = DatasetInfo(id=uuid.uuid4().hex, created_at=now_iso(), embedder=embedder, dtype=dtype)
            _create_once(store, layout.DATASET_KEY, info.to_bytes())
        dataset = cls.open(url)
        dataset.require(embedder)
        group, array = create_metadata(dataset.info)
        _create_once(store, layout.ZARR_GROUP_KEY, group)
        _create_once(store, layout.ZARR_ARRAY_KEY, array)
        check_array(store.read(layout.ZARR_ARRAY_KEY), dataset.info, url=dataset.url)
        return dataset

    @property
    def url(self) -> str:
        return self.store.url

    def require_there(self) -> None:
        """Raises StorageError when the dataset is gone from its place, where everything else would look empty."""
        if not self.store.exists(layout.DATASET_KEY):
            raise StorageError(
                f"{self._name(layout.DATASET_KEY)} is gone: was its disk unmounted, or the folder moved away?"
            )

    def require(self, embedder: EmbedderSpec) -> None:
        """Raises ConfigurationError when this embedder's vectors do not belong into this dataset."""
        mine = self.info.embedder
        if embedder.fingerprint == mine.fingerprint:
            return
        differences = [
            f"{name} {ours!r} here, {theirs!r} asked for"
            for (name, ours), theirs in zip(mine.as_dict().items(), embedder.as_dict().values(), strict=True)
            if ours != theirs
        ]
        raise ConfigurationError(
            f"{self.url} holds vectors of another embedder ({'; '.join(differences)}): "
            "use that one, or write to a new dataset"
        )

    def open_index(self) -> DatasetIndex:
        """The index on disk, caught up with the log."""
        index = DatasetIndex(local_folder(self.store, self.info.id) / "index" / "index.sqlite", dataset_id=self.info.id)
        last = index.next_shard - 1
        if last >= 0 and not self.store.exists(layout.documents_key(last)):
            # Somebody has put an older log in its place.
            index.clear()
        self.catch_up(index)
        return index

    def catch_up(self, index: DatasetIndex) -> None:
        """Absorb what the index does not have yet: shards of the log, batches that made no row, retirements."""
        # Looked at first: the log has every shard that they name.
        retirements = self.retirements()
        while (data := self.store.read_or_none(layout.documents_key(shard := index.next_shard))) is not None:
            table, origin = decode_passages(data, name=self._name(layout.documents_key(shard)), columns=INDEXED_COLUMNS)
            index.absorb(shard, table, origin)
        begin = index.rowless_bytes
        batches, size = decode_rowless(self.store.read_from(layout.BATCHES_KEY, begin))
        if size:
            index.absorb_rowless(batches, begin=begin, end=begin + size)
        for number in range(index.retirements, len(retirements)):
            self._absorb_retirement(index, number, retirements[number])

    def keep_rowless(self, batches: Sequence[tuple[str, int]]) -> None:
        """Note, durably, batches of the inbox that made no row, as key and record: the log's shards do not name them."""
        self.store.append(layout.BATCHES_KEY, encode_rowless(batches), durable=True)

    def append_passages(self, shard: int, passages: Sequence[Passage], *, origin: ShardOrigin) -> pa.Table:
        """Admit passages as shard number `shard`, and the table that was stored.

        Raises ObjectExists when another admitter took the number.
        """
        table = passages_table(passages, origin=origin)
        self.store.create(layout.documents_key(shard), encode_passages(table))
        return table

    def admitted(self) -> list[int]:
        """Numbers of all shards in the log, in order. Raises CorruptStore for a gap: the log is dense."""
        shards = layout.numbers(self.store.names(layout.DOCUMENTS_FOLDER), suffix=".parquet")
        last = max(shards, default=-1)
        for missing in sorted(set(range(last + 1)).difference(shards)):
            # A listing that is read while objects are created may have one and not the one before it.
            if not self.store.exists(layout.documents_key(missing)):
                raise CorruptStore(f"{self._name(layout.documents_key(missing))} is missing, and later ones exist")
        return list(range(last + 1))

    def documents(self, shard: int, *, columns: Sequence[str] | None = None) -> tuple[pa.Table, ShardOrigin]:
        """The rows admitted as one shard, and their origin."""
        key = layout.documents_key(shard)
        return decode_passages(self.store.read(key), name=self._name(key), columns=columns)

    def origin(self, shard: int) -> ShardOrigin:
        """Where the rows of a shard came from."""
        return self._footer(shard).origin

    def lineage(self, shard: int) -> set[int]:
        """A shard, and all that it was written to replace, and what those replaced."""
        found: set[int] = set()
        left = [shard]
        while left:
            found.add(one := left.pop())
            left += set(self.admission(one).replaces) - found
        return found

    def admission(self, shard: int) -> Admission:
        """The job of a shard and its size, without reading its rows. Shards of the log never change, so it is read once."""
        if shard not in self._admissions:
            footer = self._footer(shard)
            self._admissions[shard] = Admission(
                footer.origin.job,
                footer.rows,
                footer.text_bytes,
                footer.origin.retries,
                footer.origin.replaces,
                footer.max_version,
            )
        return self._admissions[shard]

    def marker(self, shard: int) -> Marker | None:
        """What was committed as this shard; None while it is owed. Remembered: markers never change where they stand, and
        `forget_put_aside` forgets those that were taken away."""
        if shard not in self._markers:
            key = layout.commit_key(shard)
            data = self.store.read_or_none(key)
            if data is None:
                return None
            self._markers[shard] = Marker.from_bytes(data, name=self._name(key))
        return self._markers[shard]

    def stored_markers(self) -> set[int]:
        """Numbers of the shards that have a marker, whether or not they count."""
        return set(layout.numbers(self.store.names(layout.COMMITS_FOLDER), suffix=".json"))

    def committed(self) -> list[int]:
        """Numbers of the live committed shards, in order."""
        while True:
            switched = retired, placed = self._switched()
            live = [shard for shard in sorted(self.stored_markers()) if shard not in retired]
            self._read_markers(live)
            markers = {shard: marker for shard in live if (marker := self.marker(shard)) is not None}
            # A switch in between would show neither side of it; a marker that is gone was erased, or put aside.
            if len(markers) == len(live) and self._switched() == switched:
                return [shard for shard, marker in markers.items() if shard in placed or not marker.replaces]

    def retirements(self) -> list[Retirement]:
        """What was retired so far, in order. Each object is read once: they never change."""
        known = self._retirements
        while (data := self.store.read_or_none(key := layout.retirement_key(number := len(known)))) is not None:
            known[number] = Retirement.from_bytes(data, name=self._name(key))
        return [known[number] for number in range(len(known))]

    def retired(self) -> frozenset[int]:
        """Shards that do not count any more, whatever is still stored of them."""
        return self._switched()[0]

    def retire(self, retirement: Retirement) -> bool:
        """Switch from the retired shards to their replacements, at once for everybody; False, and nothing has changed, when
        one of them does not count any more: somebody else was faster."""
        while True:
            before = self.retirements()
            if {*retirement.retired, *retirement.replacements} & self._switched()[0]:
                return False
            with suppress(ObjectExists):
                self.store.create(layout.retirement_key(len(before)), retirement.to_bytes())
                return True

    def owed(self) -> list[int]:
        """Numbers of the admitted shards that somebody has to embed, in order: those without a marker, but for retired
        shards, and for replacements that nobody has finished.

        Raises CorruptStore for a marker without documents: its number would be given again.
        """
        markers = self.stored_markers()
        admitted = self.admitted()
        orphans = markers.difference(admitted)
        if orphans:
            raise CorruptStore(f"{self._name(layout.documents_key(min(orphans)))} is missing, and its marker is there")
        retired, placed = self._switched()
        left = [shard for shard in admitted if shard not in markers and shard not in retired]
        # One that was put in place and then put aside is owed like any other.
        return [shard for shard in left if shard in placed or not self.admission(shard).replaces]

    def create_vectors(self, shard: int, vectors: NDArray[np.floating]) -> StoredObject:
        """Store a shard's vectors, (n, dimensions), NaN where a row has none. Raises ObjectExists."""
        encoded = encode_shard(
            vectors.astype(self.info.dtype, copy=False),
            shard_rows=self.info.shard_rows,
            chunk_rows=self.info.chunk_rows,
        )
        self.store.create(layout.vectors_key(shard), encoded.parts)
        return _stored(encoded)

    def stored_vectors(self, shard: int, *, rows: int) -> tuple[NDArray[np.floating], StoredObject] | None:
        """A shard's stored vectors (rows, dimensions), every checksum verified, marker or not; None when there are none."""
        key = layout.vectors_key(shard)
        data = self.store.read_buffer(key)
        if data is None:
            return None
        decoded = decode_shard(
            data,
            rows=rows,
            dimensions=self.info.dimensions,
            dtype=np.dtype(self.info.dtype),
            shard_rows=self.info.shard_rows,
            chunk_rows=self.info.chunk_rows,
            name=self._name(key),
        )
        return decoded.vectors, _stored(decoded)

    def vectors(self, shard: int) -> NDArray[np.floating]:
        """The vectors of a committed shard, (rows, dimensions); NaN where the row is not embedded.

        Raises CorruptStore when the object is not the one that the marker describes.
        """
        marker = self._require_marker(shard)
        key = layout.vectors_key(shard)
        promised = marker.objects.get(key)
        if promised is None:
            return np.full((marker.rows, self.info.dimensions), np.nan, dtype=self.info.dtype)
        stored = self.stored_vectors(shard, rows=marker.rows)
        if stored is None:
            raise CorruptStore(f"{self._name(key)} is missing, and its marker says that it was written")
        values, found = stored
        if not promised.is_met_by(found):
            raise CorruptStore(f"{self._name(key)} is not what was committed: {found} instead of {promised}")
        hidden = marker.statuses != layout.EMBEDDED
        if hidden.any():
            values[hidden] = np.nan
        return values

    def commit(self, marker: Marker) -> Marker:
        """Create the marker; the one that is stored in the end, ours or an earlier one."""
        with suppress(ObjectExists):
            self.store.create(layout.commit_key(marker.shard), marker.to_bytes())
        return self._require_marker(marker.shard)

    def put_aside(self, shard: int) -> None:
        """Take a damaged shard's marker and vectors out of the way, into `damaged/`, so that it is owed again.

        The marker goes first: from then on the shard counts as not embedded, wherever this is interrupted.
        """
        stamp = uuid.uuid4().hex[:8]
        for key in (layout.commit_key(shard), layout.vectors_key(shard)):
            data = self.store.read_or_none(key)
            if data is not None:
                self.store.create(f"{DAMAGED_FOLDER}/{stamp}/{key}", data)
                self.store.delete(key)
        self._markers.pop(shard, None)

    def forget_put_aside(self) -> frozenset[int]:
        """Have markers read anew that any process has ever put aside; the shards. Cheap where nothing was."""
        for stamp in self.store.names(DAMAGED_FOLDER):
            if not self._put_aside.get(stamp):
                names = self.store.names(f"{DAMAGED_FOLDER}/{stamp}/{layout.COMMITS_FOLDER}")
                self._put_aside[stamp] = frozenset(layout.numbers(names, suffix=".json"))
        shards = frozenset[int]().union(*self._put_aside.values())
        for shard in shards:
            self._markers.pop(shard, None)
        return shards

    def forget(self, shard: int) -> None:
        """Have the marker and the admission of a shard read anew: it was erased."""
        self._markers.pop(shard, None)
        self._admissions.pop(shard, None)

    def describe_object(self, key: str) -> StoredObject:
        """Size and checksum of an object as it is stored now."""
        return describe(self.store.read(key))

    def publish_shape(self) -> int:
        """Raise the array's shape to the end of the highest committed shard, for readers; the rows it covers."""
        rows = self._end_of_committed()
        while True:
            current = self.store.read(layout.ZARR_ARRAY_KEY)
            raised = raise_shape(current, rows=rows, name=self._name(layout.ZARR_ARRAY_KEY))
            if raised is None:
                return rows
            with suppress(ObjectChanged):
                self.store.swap(layout.ZARR_ARRAY_KEY, raised, expected=current)

    def mend_array(self) -> None:
        """Write the array's metadata anew: all of it follows from `dataset.json` and the markers."""
        fresh = create_metadata(self.info)[1]
        raised = raise_shape(fresh, rows=self._end_of_committed(), name=self._name(layout.ZARR_ARRAY_KEY))
        current = self.store.read_or_none(layout.ZARR_ARRAY_KEY)
        self.store.swap(layout.ZARR_ARRAY_KEY, raised or fresh, expected=current)

    def unpublished_rows(self) -> int:
        """Rows at the end of the array that its shape does not show yet."""
        current = self.store.read(layout.ZARR_ARRAY_KEY)
        return max(0, self._end_of_committed() - shape_of(current, name=self._name(layout.ZARR_ARRAY_KEY)))

    def job(self, job: str) -> Job | None:
        key = layout.job_key(job)
        data = self.store.read_or_none(key)
        return None if data is None else Job.from_bytes(data, name=self._name(key))

    def jobs(self) -> list[Job]:
        names = layout.job_names(self.store.names(layout.JOBS_FOLDER))
        return [job for job in map(self.job, names) if job is not None]

    def write_job(self, job: Job) -> Job:
        """Write a job's record over whatever it says now."""
        return self.change_job(job.id, lambda _known: job)

    def change_job(self, job: str, change: Callable[[Job], Job]) -> Job:
        """Change a job's record by compare-and-swap. `change` gets it as it stands, a new one where there is none; it is
        called again when somebody else was faster, and what it raises leaves the record as it is."""
        key = layout.job_key(job)
        while True:
            current = self.store.read_or_none(key)
            known = Job(job, created_at=now_iso()) if current is None else Job.from_bytes(current, name=self._name(key))
            changed = change(known)
            data = changed.to_bytes()
            if current == data:
                return changed
            with suppress(ObjectChanged):
                self.store.swap(key, data, expected=current)
                return changed

    def _footer(self, shard: int) -> PassagesFooter:
        key = layout.documents_key(shard)
        with self.store.open(key) as source:
            return read_footer(source, name=self._name(key))

    def _end_of_committed(self) -> int:
        markers = sorted(self.stored_markers())
        if not markers:
            return 0
        return markers[-1] * self.info.shard_rows + self._require_marker(markers[-1]).rows

    def _read_markers(self, shards: Sequence[int]) -> None:
        """Remember those that are not yet, together: it is many where a dataset is opened."""
        unread = [shard for shard in shards if shard not in self._markers]
        if len(unread) > 1:
            keys = [layout.commit_key(shard) for shard in unread]
            for shard, key, data in zip(unread, keys, self.store.read_many(keys), strict=True):
                if data is not None:
                    self._markers[shard] = Marker.from_bytes(data, name=self._name(key))

    def _require_marker(self, shard: int) -> Marker:
        marker = self.marker(shard)
        if marker is None:
            raise CorruptStore(f"{self._name(layout.commit_key(shard))} is missing")
        return marker

    def _switched(self) -> tuple[frozenset[int], frozenset[int]]:
        """Shards that were retired, and shards that were put in their place."""
        retirements = self.retirements()
        count, retired, placed = self._switches
        if count < len(retirements):
            fresh = retirements[count:]
            retired = retired.union(*(one.retired for one in fresh))
            placed = placed.union(*(one.replacements for one in fresh))
            self._switches = len(retirements), retired, placed
        return retired, placed

    def _absorb_retirement(self, index: DatasetIndex, number: int, retirement: Retirement) -> None:
        old = {shard: self.documents(shard, columns=INDEXED_COLUMNS)[0] for shard in retirement.retired}
        new = {shard: self.documents(shard, columns=INDEXED_COLUMNS) for shard in retirement.replacements}
        index.absorb_retirement(number, old=old, new=new)

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"


def _stored(shard: EncodedShard | DecodedShard) -> StoredObject:
    return StoredObject(shard.size, f"{shard.crc32c:08x}", f"{shard.values_crc32c:08x}")


def describe(data: bytes) -> StoredObject:
    return StoredObject(len(data), f"{crc32c(data):08x}")


def _create_once(store: Store, key: str, data: bytes) -> None:
    if not store.exists(key):
        try:
            store.create(key, data)
        except ObjectExists:
            return


def _refuse_foreign_folder(store: Store) -> None:
    if isinstance(store, LocalStore) and store.root.exists() and not store.root.is_dir():
        raise ConfigurationError(f"{store.url} is a file: --to takes a folder, which may be new")
    foreign = [name for name in store.names("") if not name.startswith(".")]
    if foreign:
        raise ConfigurationError(
            f"{store.url} is a folder with other things in it ({foreign[0]}, ...): "
            "--to takes a new or empty folder, or a dataset"
        )
