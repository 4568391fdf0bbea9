"""streaq and taskiq-redis: found or not, run with settings of theirs, the best setting of each."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import Child, ChildFailed
from .results import note

REQUIREMENTS = ("streaq>=7.2,<8", "taskiq-redis>=1.2.4,<2", "orjson>=3.10", "uvloop>=0.21")
_MODULES = {"streaq": "benchmarks.peer_streaq", "taskiq-redis": "benchmarks.peer_taskiq"}
_PACKAGES = {"streaq": "streaq", "taskiq-redis": "taskiq_redis", "orjson": "orjson", "uvloop": "uvloop"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a peer. pipeline: jobs that its producer has under way at once; broker: taskiq-redis' stream (with
    acknowledgements) or list (without)."""

    peer: str
    serializer: str = "default"
    concurrency: int = 16
    pipeline: int = 16
    prefetch: int = 0
    broker: str = "stream"
    keep_results: bool = False

    @property
    def name(self) -> str:
        broker = f"{self.broker}, " if self.peer == "taskiq-redis" else ""
        ahead = f", {self.prefetch} fetched ahead" if self.prefetch else ""
        results = ", results kept" if self.keep_results else ""
        return (
            f"{self.peer}: {broker}{self.serializer} serializer, {self.concurrency} at once,"
            f" {self.pipeline} pushed at once{ahead}{results}"
        )


# The first of each is what it does when it is not told otherwise.
SETTINGS = (
    Setting("streaq", concurrency=16, pipeline=1, keep_results=True),
    Setting("streaq", concurrency=64, pipeline=1),
    Setting("streaq", concurrency=64, pipeline=16),
    Setting("streaq", concurrency=256, pipeline=16),
    Setting("streaq", serializer="orjson", concurrency=64, pipeline=16),
    Setting("streaq", serializer="orjson", concurrency=256, pipeline=64),
    Setting("taskiq-redis", concurrency=100, pipeline=1),
    Setting("taskiq-redis", concurrency=100, pipeline=16),
    Setting("taskiq-redis", serializer="orjson", concurrency=100, pipeline=16),
    Setting("taskiq-redis", serializer="orjson", concurrency=400, pipeline=64),
    Setting("taskiq-redis", serializer="orjson", concurrency=100, pipeline=16, prefetch=100),
    Setting("taskiq-redis", serializer="orjson", concurrency=100, pipeline=16, broker="list"),
)


def find_peers(python: str) -> dict[str, str]:
    """Version by package, for the queues and what they may use."""
    return find_packages(python, _PACKAGES)


def find_packages(python: str, packages: Mapping[str, str]) -> dict[str, str]:
    """Version by package, for those whose module this interpreter can find; `packages` are modules by package."""
    look = (
        "import json, importlib.metadata as m, importlib.util as u, sys\n"
        "def there(module):\n"
        "    try: return u.find_spec(module)\n"
        "    except ImportError: return None\n"
        f"print(json.dumps({{n: m.version(n) for n, p in {dict(packages)!r}.items() if there(p)}}))"
    )
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def usable(settings: Iterable[Setting], found: dict[str, str]) -> Iterator[Setting]:
    return (s for s in settings if s.peer in found and (s.serializer == "default" or s.serializer in found))


def move(
    setting: Setting, *, python: str, url: str, documents: Path, count: int, batch: int, uvloop: bool
) -> dict[str, float]:
    """Push all documents and let no-op jobs take them: documents a second, and CPU seconds of both processes.

    From the moment at which the producer, with the documents in memory, begins, to the last acknowledgement.
    """
    options: dict[str, Any] = {
        "url": url, "queue": f"bench-{uuid.uuid4().hex}", "documents": str(documents), "batch": batch, "uvloop": uvloop,
        "jobs": -(-count // batch), "serializer": setting.serializer, "concurrency": setting.concurrency,
        "pipeline": setting.pipeline, "prefetch": setting.prefetch, "broker": setting.broker,
        "keep_results": setting.keep_results,
    }  # fmt: skip
    module = _MODULES[setting.peer]
    with (
        Child(module, {**options, "role": "work"}, python=python) as worker,
        Child(module, {**options, "role": "produce"}, python=python) as producer,
    ):
        worker.wait_until_ready()
        producer.wait_until_ready()
        producer.go()
        pushed, worked = producer.result(), worker.result()
    wall_s = worked["ended_at"] - pushed["started_at"]
    return {
        "documents_per_s": count / wall_s,
        "pushed_per_s": count / (pushed["ended_at"] - pushed["started_at"]),
        "cpu_s": pushed["cpu_s"] + worked["cpu_s"],
    }


def choose(settings: Iterable[Setting], **how: Any) -> dict[str, Setting]:
    """The best setting of each peer, by one run each."""
    best: dict[str, tuple[float, Setting]] = {}
    for setting in settings:
        try:
            speed = move(setting, **how)["documents_per_s"]
        except ChildFailed as error:
            note(f"  {setting.name}: {error}")
            continue
        note(f"  {setting.name}: {speed:,.0f} documents/s")
        if speed > best.get(setting.peer, (0.0, setting))[0]:
            best[setting.peer] = (speed, setting)
    return {peer: setting for peer, (_, setting) in best.items()}
