"""Benchmarks, outside the test run: each is a module of its own, `python -m benchmarks.NAME`, see README.md."""
