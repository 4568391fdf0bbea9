"""Embedders, one module per provider family."""
