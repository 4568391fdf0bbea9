"""Embedmill: corpora to vectors, queued, budgeted, stored in sharded Zarr, loaded into Milvus, and proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.encoder import AsyncJinaEmbedding, JinaEmbedding

    from .dataset.reader import open_dataset
    from .producer import Producer
    from .sparse import SparseRows

__version__ = "0.1.0"
__all__ = ["AsyncJinaEmbedding", "JinaEmbedding", "Producer", "SparseRows", "__version__", "open_dataset"]


def __getattr__(name: str) -> object:
    """Imported when they are asked for: the command line starts without them."""
    if name == "Producer":
        from .producer import Producer

        return Producer
    if name == "open_dataset":
        from .dataset.reader import open_dataset

        return open_dataset
    if name == "SparseRows":
        from .sparse import SparseRows

        return SparseRows
    if name in ("AsyncJinaEmbedding", "JinaEmbedding"):
        from worker import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
