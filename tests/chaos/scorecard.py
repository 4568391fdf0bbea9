"""The result of a trial, as JSON and as the page `docs/chaos.md`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .judgement import DoneTwice, Verdict
from .trial import Report, Size

_ABOUT = """\
# Chaos

Real processes over one dataset: workers, schedulers, a loader into Milvus Lite, `embedmill push`, programs with
`embedmill.Producer`, and a Redis server with an append-only file. While they work they are killed, stopped for longer than a
lease and started again, and Redis is killed and emptied. Then the fleet is left in peace until nothing is owed, and what it
left is held against a run in which nothing happened. One passage kills every worker that sends it.

The documents are paragraphs of what Python carries: the language reference, docstrings, comments. Only the embedder is not
real: its vectors come from the text's hash, after a wait, so that sets that are equal are equal bit for bit.

    make chaos SEED={seed}

runs this trial again and writes this page. Its short form, `tests/chaos/test_fleet.py`, runs with the other tests. The seed
draws the faults, and when they are due as shares of the work; what each of them meets is up to the processes.
"""
_COUNTED = """\
Work done twice is counted at the embedder: every passage that it was sent beyond the first time, whether the answer was
kept, lost or never came. A provider may have billed all of them. It includes what the bisecting of the poison cost.
"""


@dataclass(frozen=True, slots=True)
class Scorecard:
    """One trial and its verdicts."""

    seed: int
    documents: int
    size: Size
    report: Report
    done: DoneTwice
    verdicts: list[Verdict]
    wall_s: float
    at: str

    @property
    def passed(self) -> bool:
        return all(verdict.held for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        report = self.report
        return {
            "seed": self.seed,
            "at": self.at,
            "documents": self.documents,
            "size": asdict(self.size),
            "faults": {f"{action} {kind}": count for (action, kind), count in sorted(report.faults.items())},
            "faults_missed": report.missed,
            "restarts": dict(sorted(report.restarts.items())),
            "messages_pushed_again": report.pushed_again,
            "done_twice": {**asdict(self.done), "share": round(self.done.share, 4)},
            "wall_s": round(self.wall_s, 1),
            "done_s": report.done_s and round(report.done_s, 1),
            "passed": self.passed,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def as_markdown(self) -> str:
        return "\n".join((_ABOUT.format(seed=self.seed), *self._figures(), "", _COUNTED, *self._verdicts(), ""))

    def _figures(self) -> Iterator[str]:
        report, size, done = self.report, self.size, self.done
        yield "## The last scorecard"
        yield ""
        yield "| | |"
        yield "|---|---|"
        yield f"| run | {self.at}, seed {self.seed}, Python {platform.python_version()} |"
        yield f"| verdict | {'everything held' if self.passed else '**not everything held**'} |"
        yield f"| documents | {self.documents:,}, in shards of {size.shard_rows} |"
        yield f"| passages to embed | {done.to_embed:,}, {size.inputs} to a request of {size.delay_s:g} s |"
        yield f"| fleet | {size.workers} workers, {size.schedulers} schedulers, 1 loader; leases of {size.lease_s:g} s |"
        for action, word in (("kill", "killed"), ("stop", "stopped for longer than a lease")):
            hit = ", ".join(f"{kind} {count}" for (a, kind), count in sorted(report.faults.items()) if a == action)
            yield f"| {word} | {hit or 'none'} |"
        yield f"| Redis emptied | {report.faults['flush', 'redis']} |"
        yield f"| workers killed by the poison | {sum(status == -9 for _, status in report.deaths)} |"
        yield f"| faults that met nothing | {report.missed} |"
        yield f"| started again | {', '.join(f'{kind} {n}' for kind, n in sorted(report.restarts.items()) if n)} |"
        yield f"| messages pushed again | {report.pushed_again} |"
        yield f"| passages sent twice | {done.again:,}, {done.share:.1%} of the passages to embed |"
        yield f"| of all sent, unanswered | {done.unanswered:,}, of which {done.poisoned:,} in requests with the poison |"
        yield f"| time | {self.wall_s:.0f} s, with the calm run and the checks |"

    def _verdicts(self) -> Iterator[str]:
        yield "| what must hold | | seen |"
        yield "|---|---|---|"
        for verdict in self.verdicts:
            detail = verdict.detail.replace("\n", " ").replace("|", "/")[:300]
            yield f"| {verdict.name} | {'yes' if verdict.held else '**no**'} | {detail} |"
