"""Who writes and reads shards, one in each process: the same vectors, 4,096 rows a shard, two writes in flight.

Each answers how many rows and bytes it moved, in how many wall and CPU seconds, and by how many shards its memory grew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .processes import options_of_child, say_result, wait_for_go

SHARD_ROWS, CHUNK_ROWS = 4096, 256
_Write = Callable[[int], int]
"""Writes shard k; bytes."""
_Read = Callable[[int], int]


def make_vectors(dimensions: int) -> list[NDArray[np.float32]]:
    """Two shards of random unit vectors, as an embedder hands them on."""
    chance = np.random.default_rng(7)
    made = chance.standard_normal((2, SHARD_ROWS, dimensions), dtype=np.float32)
    return list(made / np.linalg.norm(made, axis=2, keepdims=True))


class Ours:
    """The commit of a worker: vectors, then the marker; its documents are in the log already."""

    def __init__(self, folder: Path, dtype: str, shards: int, dimensions: int) -> None:
        from embedmill.dataset.dataset import Dataset
        from embedmill.embedder import EmbedderSpec

        spec = EmbedderSpec(model=f"null/{dimensions}", dimensions=dimensions, revision="1")
        self.dataset = Dataset.open_or_create(str(folder / "ours"), embedder=spec, dtype=dtype)
        self.shards, self.dimensions = shards, dimensions

    def prepare_write(self) -> None:
        from embedmill.dataset.passages import Passage, ShardOrigin
        from embedmill.documents import hash16

        empty = hash16("{}")
        for shard in range(self.shards):
            texts = [f"passage {shard}-{row}" for row in range(SHARD_ROWS)]
            rows = [Passage(text, text, "{}", 1, hash16(text), empty) for text in texts]
            self.dataset.append_passages(shard, rows, origin=ShardOrigin(shard, "main"))

    def writer(self, vectors: list[NDArray[np.float32]]) -> _Write:
        from embedmill.dataset.layout import EMBEDDED, commit_key, vectors_key
        from embedmill.dataset.passages import ShardOrigin
        from worker.commit import commit_shard
        from worker.results import ShardResults

        def write(shard: int) -> int:
            results = ShardResults.__new__(ShardResults)
            ShardResults.__init__(results, 0, self.dimensions)
            results.rows, results.vectors = SHARD_ROWS, vectors[shard % 2]
            results.statuses = np.full(SHARD_ROWS, EMBEDDED, np.uint8)
            marker = commit_shard(
                self.dataset, shard, results,
                origin=ShardOrigin(shard, "main"), passages=[], attempt="benchmark", worker="benchmark",
            )  # fmt: skip
            return marker.objects[vectors_key(shard)].bytes + len(self.dataset.store.read(commit_key(shard)))

        return write

    def reader(self) -> _Read:
        return lambda shard: self.dataset.vectors(shard).nbytes

    def files(self) -> Iterator[Path]:
        return (self.dataset_folder / "vectors.zarr").rglob("0")

    @property
    def dataset_folder(self) -> Path:
        return Path(self.dataset.url)


def shard_bytes(dtype: str, dimensions: int) -> int:
    """Of one full shard as it is stored."""
    chunks = SHARD_ROWS // CHUNK_ROWS
    return SHARD_ROWS * dimensions * np.dtype(dtype).itemsize + chunks * 20 + 4


def writer(who: str, folder: Path, dtype: str, shards: int, dimensions: int) -> _Write:
    vectors = make_vectors(dimensions)
    if who == "ours":
        ours = Ours(folder, dtype, shards, dimensions)
        ours.prepare_write()
        return ours.writer(vectors)
    place = folder / who
    if who == "raw":
        place.mkdir()
        payload = np.random.default_rng(1).bytes(shard_bytes(dtype, dimensions))

        def write_raw(shard: int) -> int:
            with (place / str(shard)).open("xb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            return len(payload)

        return write_raw
    if who == "npy":
        place.mkdir()

        def write_npy(shard: int) -> int:
            with (place / f"{shard}.npy").open("xb") as file:
                np.save(file, vectors[shard % 2].astype(dtype, copy=False))
                file.flush()
                os.fsync(file.fileno())
                return file.tell()

        return write_npy
    array = _array(who, place, dtype, shards, dimensions, create=True)
    nbytes = SHARD_ROWS * dimensions * np.dtype(dtype).itemsize

    def write_array(shard: int) -> int:
        rows = slice(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        values = vectors[shard % 2].astype(dtype, copy=False)
        if who == "tensorstore":
            array[rows].write(values).result()
        else:
            array[rows] = values
        return nbytes

    return write_array


def reader(who: str, folder: Path, dtype: str, shards: int, dimensions: int) -> _Read:
    if who == "ours":
        return Ours(folder, dtype, shards, dimensions).reader()
    if who == "reader":
        import embedmill

        blocks = iter(embedmill.open_dataset(str(folder / "ours")).blocks(columns=("text",)))
        return lambda _shard: next(blocks).vectors.nbytes
    place = folder / who
    if who == "raw":
        return lambda shard: len((folder / "ours" / f"vectors.zarr/vectors/c/{shard}/0").read_bytes())
    if who == "npy":
        return lambda shard: np.load(place / f"{shard}.npy").nbytes
    array = _array(who, place, dtype, shards, dimensions, create=False)

    def read_array(shard: int) -> int:
        rows = array[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        return int(np.asarray(rows.read().result() if who == "tensorstore" else rows).nbytes)

    return read_array


def _array(who: str, place: Path, dtype: str, shards: int, dimensions: int, *, create: bool) -> Any:
    import zarr
    import zarr.codecs

    if create:
        layout: dict[str, Any] = (
            {}
            if who == "zarr-default"
            else {
                "shards": (SHARD_ROWS, dimensions), "chunks": (CHUNK_ROWS, dimensions),
                "compressors": zarr.codecs.Crc32cCodec(), "fill_value": float("nan"),
            }
        )  # fmt: skip
        made = zarr.create_array(str(place), shape=(shards * SHARD_ROWS, dimensions), dtype=dtype, **layout)
        if who != "tensorstore":
            return made
    if who != "tensorstore":
        return zarr.open_array(str(place), mode="r")
    import tensorstore

    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(place)}}, open=True).result()


def _forget_cached(folder: Path) -> None:
    """Have the kernel drop what it keeps of these files; they are written back already."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    options = options_of_child()
    what, who, dtype = options["what"], options["who"], options["dtype"]
    folder, shards, dimensions = Path(options["folder"]), options["shards"], options["dimensions"]
    make = writer if what == "write" else reader
    move = make(who, folder, dtype, shards, dimensions)
    in_flight = 2 if what == "write" else 1
    os.sync()
    if what == "cold":
        _forget_cached(folder)
    elif what == "warm" and who != "reader":
        for shard in range(shards):
            move(shard)
    with ThreadPoolExecutor(in_flight) as pool:
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _memory_bytes("VmRSS")
        wait_for_go()
        begun, cpu = time.monotonic(), time.process_time()
        moved = sum(pool.map(move, range(shards)))
        wall_s, cpu_s = time.monotonic() - begun, time.process_time() - cpu
    grown = max(0, _memory_bytes("VmHWM") - before)
    say_result(
        {
            "rows": shards * SHARD_ROWS, "bytes": moved, "wall_s": wall_s, "work_cpu_s": cpu_s,
            "memory_shards": grown / shard_bytes(dtype, dimensions),
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
