"""A program that produces: python -m tests.chaos.producer_process SCRIPT DONE REDIS NAMESPACE INBOX PACE_S.

It notes in DONE which messages it began to push and which have their receipts. Started again after a death, it pushes again,
under the same keys, what it began and what has no receipt.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import anyio

from embedmill.inbox import Receipt
from embedmill.producer import Producer


class Notes:
    """What is pushed and confirmed, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self.begun = {key for word, key in (line.split() for line in lines) if word == "begun"}
        self.confirmed = {key for word, key in (line.split() for line in lines) if word == "confirmed"}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def begin(self, key: str) -> None:
        os.write(self._file, f"begun {key}\n".encode())

    def confirm(self, receipt: Receipt) -> None:
        os.write(self._file, f"confirmed {receipt.key}\n".encode())


def read_script(path: Path) -> list[dict[str, Any]]:
    """The messages, each under a key that is the same in every process."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"key": f"{path.stem}/{number}", **json.loads(line)} for number, line in enumerate(lines)]


async def produce(
    messages: list[dict[str, Any]], notes: Notes, redis: str, namespace: str, inbox: str, pace_s: float
) -> None:
    print(f"again {len(notes.begun - notes.confirmed)}", flush=True)
    async with Producer(redis, inbox=inbox, namespace=namespace, on_receipt=notes.confirm) as producer:
        for _, phase in groupby(messages, key=lambda message: message["phase"]):
            for message in phase:
                if message["key"] not in notes.confirmed:
                    notes.begin(message["key"])
                    await producer.add_batch(message["documents"], key=message["key"])
                    await anyio.sleep(pace_s)
            await producer.flush()
    print(producer.receipts)


if __name__ == "__main__":
    script, done, redis, namespace, inbox, pace_s = sys.argv[1:]
    anyio.run(produce, read_script(Path(script)), Notes(Path(done)), redis, namespace, inbox, float(pace_s))
