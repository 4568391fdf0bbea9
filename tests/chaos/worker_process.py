"""`embedmill worker`, the real command, with the one embedder that dies.

python -m tests.chaos.worker_process SETTINGS worker OPTION..., SETTINGS being JSON for `MortalEmbedder`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from embedmill.commands import main, services

from .embedder import MortalEmbedder


def run() -> None:
    settings = json.loads(sys.argv.pop(1))
    log = Path(settings.pop("log"))
    embedder = MortalEmbedder(log=log, **settings)
    services.make_embedder = lambda _choice: embedder
    main.run()


if __name__ == "__main__":
    run()
