"""How the benchmarks say what they found: a table for people, and a JSON file below `benchmarks/results/`."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """What figures depend on; the load shows whether the machine was quiet."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "pyarrow": version("pyarrow"),
    }


def write_result(name: str, record: Mapping[str, Any]) -> Path:
    """Write a result beside its earlier ones; its path."""
    now = datetime.now(tz=UTC)
    path = FOLDER / f"{name}-{now:%Y%m%dT%H%M%S.%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": name, "at": now.isoformat(timespec="seconds"), "machine": describe_machine(), **record}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The first column to the left, the others to the right; floats with three significant digits."""
    cells = [list(header), *([_shown(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        first, *others = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *others]).rstrip())


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
