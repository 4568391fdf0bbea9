"""Embedmill: corpora to vectors, queued, budgeted, stored in sharded Zarr, loaded into Milvus, and proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .producer import Producer

__version__ = "0.1.0"
__all__ = ["Producer", "__version__"]


def __getattr__(name: str) -> object:
    """`Producer` is imported when it is asked for: the command line starts without it."""
    if name == "Producer":
        from .producer import Producer

        return Producer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
