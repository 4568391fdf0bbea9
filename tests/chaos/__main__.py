"""The long form: python -m tests.chaos [--documents N] [--seed N] [--write PAGE]. Status 1 when something did not hold."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import click

from .faults import MANY
from .fleet import LONG, run_chaos


@click.command()
@click.option("--documents", default=20_000, show_default=True, type=click.IntRange(min=1000))
@click.option("--seed", default=1, show_default=True, help="Draws the faults and the moments when they are due.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the scorecard to this page.")
@click.option("--keep", is_flag=True, help="Keep the folder of the trial, with the logs of all processes.")
def chaos(documents: int, seed: int, write: Path | None, keep: bool) -> None:
    """Kill, stop and empty everything while real documents are embedded, and judge what is left."""
    folder = Path(tempfile.mkdtemp(prefix="embedmill-chaos-"))
    card = run_chaos(folder, documents=documents, seed=seed, size=LONG, counts=MANY)
    click.echo(json.dumps(card.as_dict(), indent=2))
    if write is not None:
        write.write_text(card.as_markdown(), encoding="utf-8")
    if card.passed and not keep:
        shutil.rmtree(folder)
    else:
        click.echo(f"left for looking at: {folder}", err=True)
    sys.exit(0 if card.passed else 1)


if __name__ == "__main__":
    chaos()
