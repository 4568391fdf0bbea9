"""Committed shards into Milvus: ledger, upsert, verification, search."""
