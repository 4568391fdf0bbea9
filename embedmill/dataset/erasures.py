"""What is stored of a retired shard although it was erased: whoever erased it died, or a worker wrote late."""

from __future__ import annotations

from contextlib import suppress

from ..errors import CorruptStore
from . import layout
from .dataset import Dataset
from .passages import read_footer
from .rewriting import erase_shard


def is_erased(dataset: Dataset, shard: int) -> bool:
    """Its documents are gone. Reads the end of one object."""
    key = layout.documents_key(shard)
    with dataset.store.open(key) as source:
        return read_footer(source, name=f"{dataset.url}/{key}").origin.erased


def sweep_erased(dataset: Dataset) -> list[int]:
    """Delete it, also where nobody has erased a retired shard that has no marker; the shards. What others may still read of
    retired shards stays. Blocking."""
    markers = dataset.stored_markers()
    stored = markers | with_vectors(dataset) | _numbers(dataset, layout.CHECKPOINTS_FOLDER)
    swept = []
    for shard in sorted(dataset.retired() & stored):
        # A document that cannot be read is for `verify` to name.
        with suppress(CorruptStore):
            if shard not in markers or is_erased(dataset, shard):
                erase_shard(dataset, shard)
                swept.append(shard)
    return swept


def with_vectors(dataset: Dataset, *, under: str = "") -> set[int]:
    """Shards that have vectors there."""
    return _numbers(dataset, f"{under}{layout.vectors_key(0).removesuffix('/0/0')}")


def _numbers(dataset: Dataset, folder: str) -> set[int]:
    return set(layout.numbers(dataset.store.names(folder), suffix=""))
