"""The page of a run of the whole matrix, in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime

from .parts import LEASE_S, PRODUCED, PUSHED, STALL_S
from .points import POINTS, Action, Outcome, Point

Results = Mapping[tuple[Point, Action], Outcome | str]
"""A text instead of an outcome where a promise was broken."""

_COLUMNS: Mapping[Action, str] = {"crash": "killed", "stall": "stalled", "lost": "reply lost", "raise": "error"}
_PARTS = {
    "producer": "Whoever pushes through the inbox with `embedmill.Producer`.",
    "scheduler": "It admits the inbox: documents into the log; then, in one script, a task into the queue, the messages "
    "out of the inbox, and receipts.",
    "pusher": "`embedmill push`: it reads a source and admits by itself.",
    "worker": "It leases a task, embeds its shard, and commits it. One more worker runs beside the one that is hit.",
    "batch worker": "Its jobs go through a batch endpoint, which is a folder here. Every text must be in one batch and no "
    "other. Of the first one that a process fetches, a text is sent in an ordinary request, too. One more such worker "
    "comes when the first one is hit.",
    "loader": "It has loaded two shards, and is hit at the third, which has new documents, an update and two deletions. "
    "While it is down or stands still, a shard is committed that overrules some of them; and while it stands still, a "
    "second loader must be refused.",
    "compactor": "`embedmill compact` on shards with updates, deletions and failures. While it is down or stands still, "
    "shards are committed that overrule some of their rows; and while it stands still, a second one must be refused.",
}


def page(results: Results, *, seconds: float, at_once: int, server: str) -> str:
    """server: name and version of the Redis that all cases shared."""
    failed = sum(isinstance(outcome, str) for outcome in results.values())
    lines = [
        "# Killed anywhere",
        "",
        "What happens when a process dies, stands still or errs between two steps? Each step of the parts that follow has",
        "a [failpoint](architecture.md#failpoints). Each case starts real processes with the real code, lets one thing",
        "happen to one of them at one failpoint, starts a clean process in place of one that ended, and waits for rest.",
        "",
        f"**{len(results)} cases, {failed} failed**, in {seconds:.0f} s, {at_once} at a time. Run of"
        f" {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}.",
        "",
        "```",
        "python -m tests.failpoints --write docs/kill-anywhere.md   # all of it, and this page",
        "python -m tests.failpoints --only worker.after_vectors     # failpoints with this in their name",
        "```",
        "",
        "| column | what happens there |",
        "|---|---|",
        "| killed | the process ends at once (`os._exit`): no handler runs, nothing is flushed, as after SIGKILL |",
        f"| stalled | the step stands still for {STALL_S} s, and then goes on; a lease is {LEASE_S:.0f} s here |",
        "| reply lost | Redis executes the script, and the connection breaks before the reply |",
        "| error | an exception that nobody foresaw (`RuntimeError`) |",
        "",
        "A cell says how long after the fault everything was stored and nothing waited any more. What was killed was",
        "started again at once. Where a step stood still for longer than that, the others had not waited for it.",
        "",
        "- *restarted*: the process ended with the error, and a clean one was started. Without it, it went on by itself.",
        f"- *N again*: so many of the {len(PUSHED) + len(PRODUCED)} passages were sent to the embedder a second time,",
        "  batches aside. A worker holds up to two shards, and what it has received since its last checkpoint dies with it.",
        "",
        f"Redis is {server} on a socket of this machine, the same one for all cases. It is not killed here, and processes",
        "are not stopped as a whole: [chaos.md](chaos.md) has both. The embedder is `null/3`, whose vectors follow from the",
        "text. The machine goes on: loss of power is not tested.",
        "",
        f"Each case of all parts but the loader has {len(PUSHED)} documents from a source and",
        f"{len(PRODUCED)} through the inbox. At rest nothing may be owed or waiting, every document must be stored once and",
        "none be a dead letter, every vector must be that of its text, checksums and markers must agree, and no checkpoint",
        "may be left. The loader's cases load into Milvus Lite, a database for each. At rest it must hold the newest",
        "version of every living id and nothing else, text, metadata and vector bit for bit as in the dataset; the ledger",
        "must have every shard, and no intent.",
    ]
    for part, about in _PARTS.items():
        points = [point for point in POINTS if point.part == part]
        columns = [action for action in _COLUMNS if any((point, action) in results for point in points)]
        if not columns:
            continue
        titles = ["done", "not done yet", *(_COLUMNS[action] for action in columns), "failpoint"]
        lines += ["", f"## {part.capitalize()}", "", about, "", _row(titles), "|---" * len(titles) + "|"]
        for point in points:
            cells = [_cell(results.get((point, action))) for action in columns]
            lines.append(_row([point.done, point.next, *cells, f"`{point.name}`"]))
    return "\n".join([*lines, ""])


def _cell(outcome: Outcome | str | None) -> str:
    if outcome is None:
        return "-"
    if isinstance(outcome, str):
        return f"**{outcome}**"
    restarted = ", restarted" if outcome.ended == "gave up" else ""
    again = f", {outcome.again} again" if outcome.again else ""
    return f"{outcome.seconds:.1f} s{restarted}{again}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
