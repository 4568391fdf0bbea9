"""The trial: processes under SIGKILL, then the judgement of what is left, beside a calm run of the same items."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from embedmill.dataset.compaction import compact
from embedmill.dataset.local_store import LocalStore
from embedmill.dataset.summary import summarize
from embedmill.dataset.verification import verify_dataset
from tests.datasets import small_dataset
from tests.invariants import check_dataset, newest

from .parts import WRITERS, write

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Card:
    """What happened, all of it having held."""

    shards: int
    rows: int
    kills: int
    passes: int
    rows_read: int
    outdated: int
    rows_followed: int
    followed_anew: int
    switches: int
    retired: int
    shards_left: int
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def run_trial(folder: Path, *, items: int, seed: int, kill_every_s: float = 1.5) -> Card:
    """Four writers of `items` shards each. Raises AssertionError when anything does not hold."""
    chance = random.Random(seed)
    dataset = small_dataset(folder / "lake", shard_rows=64, chunk_rows=16)
    over = folder / "over"
    parts = _Parts(dataset.url, folder, over, items)
    begun = time.monotonic()
    kills = parts.run_until_written(chance, kill_every_s)
    over.touch()
    reports = parts.end()
    compact(dataset, grace_s=0)
    dataset.publish_shape()
    # As a scheduler does an hour later.
    LocalStore(folder / "lake").sweep(older_than_s=0)
    found = newest(dataset.url)
    calm = small_dataset(folder / "calm", shard_rows=64, chunk_rows=16)
    for writer in range(WRITERS):
        write(calm, writer, items)
    assert found == newest(calm.url), "the final content is not that of a calm run"
    check_dataset(dataset.url)
    report = verify_dataset(dataset)
    assert report.passed, report.problems
    assert summarize(dataset).admitted == summarize(calm).admitted
    return Card(
        shards=items * WRITERS,
        rows=summarize(calm).admitted,
        kills=kills,
        passes=reports["reader"]["passes"],
        rows_read=reports["reader"]["rows"],
        outdated=reports["reader"]["outdated"],
        rows_followed=reports["follower"]["given"],
        followed_anew=reports["follower"]["anew"],
        switches=reports["compactor"].get("switches", 0),
        retired=len(dataset.retired()),
        shards_left=len(dataset.committed()),
        seconds=round(time.monotonic() - begun, 1),
    )


class _Parts:
    def __init__(self, url: str, folder: Path, over: Path, items: int) -> None:
        self._url, self._folder, self._over, self._items = url, folder, over, items
        self._writers = {writer: self._start("writer", str(writer), str(items)) for writer in range(WRITERS)}
        self._others = {name: self._start(name, *self._places(name)) for name in ("reader", "follower", "compactor")}

    def run_until_written(self, chance: random.Random, kill_every_s: float) -> int:
        """Kill a writer, or the compactor, again and again, and start it anew; how often."""
        kills = 0
        while self._writers:
            time.sleep(kill_every_s * chance.uniform(0.5, 1.5))
            for writer, process in list(self._writers.items()):
                if process.poll() is not None:
                    self._require_well("writer", process)
                    del self._writers[writer]
            self._check_others()
            if not self._writers:
                break
            victim = chance.choice([*self._writers, None])
            if victim is None:
                self._others["compactor"] = self._again(
                    self._others["compactor"], "compactor", *self._places("compactor")
                )
            else:
                self._writers[victim] = self._again(self._writers[victim], "writer", str(victim), str(self._items))
            kills += 1
        return kills

    def end(self) -> dict[str, dict[str, int]]:
        reports = {}
        for name, process in self._others.items():
            process.wait(timeout=120)
            self._require_well(name, process)
            path = Path(self._places(name)[0])
            reports[name] = json.loads(path.read_text()) if path.exists() else {}
        return reports

    def _check_others(self) -> None:
        for name, process in self._others.items():
            if process.poll() is not None:
                self._require_well(name, process)
                raise AssertionError(f"{name} ended before the others")

    def _places(self, name: str) -> tuple[str, str]:
        return str(self._folder / f"{name}.json"), str(self._over)

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        part, *rest = arguments
        return subprocess.Popen(
            [sys.executable, "-m", "tests.lake.parts", part, self._url, *rest],
            cwd=_ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _again(self, process: subprocess.Popen[str], *arguments: str) -> subprocess.Popen[str]:
        process.kill()
        process.communicate()
        return self._start(*arguments)

    def _require_well(self, name: str, process: subprocess.Popen[str]) -> None:
        """Of a process that has ended; else the others end, too."""
        said = process.communicate()[1]
        if process.returncode != 0:
            for other in [*self._writers.values(), *self._others.values()]:
                if other is not process:
                    other.kill()
                    other.communicate()
        assert process.returncode == 0, f"{name} ended with {process.returncode}: {said[-2000:]}"
