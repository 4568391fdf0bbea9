"""Embedmill: corpora to vectors, queued, budgeted, stored in sharded Zarr, loaded into Milvus, and proven."""

__version__ = "0.1.0"
