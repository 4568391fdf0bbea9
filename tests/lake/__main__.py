"""The long form: python -m tests.lake [--items N] [--seed N]. Status 1 when something did not hold."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from .trial import run_trial


@click.command()
@click.option("--items", default=500, show_default=True, help="Shards of each of the four writers.")
@click.option("--seed", default=1, show_default=True, help="Draws who is killed and when.")
def lake(items: int, seed: int) -> None:
    """Write, read, follow and compact one dataset from many processes, under kills, and judge what is left."""
    with tempfile.TemporaryDirectory(prefix="embedmill-lake-") as folder:
        click.echo(json.dumps(run_trial(Path(folder), items=items, seed=seed).as_dict(), indent=2))


if __name__ == "__main__":
    lake()
