"""The picture of `embedmill info --plot`: norms, lengths and a projection of a sample, side by side. Needs matplotlib."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from ..dataset.contents import Sample
from ..errors import StorageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 61
_MOST_JOBS = 8
_SUBSPACE, _ITERATIONS = 16, 20
_LEAST_SPAN = 0.05
_BLUE, _GREY, _RED = "#3b6ea8", "#9a9a9a", "#b03a2e"


def draw(file: Path, sample: Sample, *, title: str, rows: int) -> None:
    """Write the picture, whole or not at all, over an earlier one. Raises StorageError."""
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "embedmill"}
    with mpl.rc_context(style), warnings.catch_warnings():
        # Of a name in letters that its font does not have.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=11, parse_math=False)
        norms, lengths, projection = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
        of = (
            f"all {count_words(rows)}" if len(sample) == rows else f"a sample of {len(sample):,} of {count_words(rows)}"
        )
        if len(sample):
            _draw_norms(norms, sample.norms)
            _draw_lengths(lengths, sample)
            _draw_projection(figure, projection, sample)
            figure.supxlabel(of, fontsize=8, color=_GREY)
        else:
            for axes, what in ((norms, "norms"), (lengths, "lengths"), (projection, "projection")):
                _say(axes, what.capitalize(), "no row counts yet")
        _save(figure, file)


def count_words(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _draw_norms(axes: Axes, norms: NDArray[np.float32]) -> None:
    least, greatest = float(norms.min()), float(norms.max())
    # Of normalized vectors the last bits differ, which would fill the whole width.
    middle, half = (least + greatest) / 2, max((greatest - least) / 2, _LEAST_SPAN * greatest, 1e-6)
    axes.hist(norms, bins=np.linspace(middle - half, middle + half, _edges(len(norms))).tolist(), color=_BLUE)
    axes.set_title(f"Norms: {least:.4g} to {greatest:.4g}" if greatest - least > 1e-3 else f"Norms: all {middle:.3f}")
    axes.set_xlabel("L2 norm of a vector")
    _count_rows(axes)
    axes.margins(x=0)


def _draw_lengths(axes: Axes, sample: Sample) -> None:
    values, what = sample.characters.astype(np.float64), "characters"
    axes.set_xlabel("characters of a text")
    if sample.tokens is not None:
        values, what = sample.tokens.values, "tokens"
        axes.set_xlabel(f"tokens of a text, estimated ({sample.tokens.basis})")
    p50, p99 = np.percentile(values, (50, 99), method="inverted_cdf")
    least, greatest = max(1.0, float(values.min())), max(1.0, float(values.max()))
    if greatest / least > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        bins = np.geomspace(least, greatest, _edges(len(values)))
    else:
        middle, half = (least + greatest) / 2, max((greatest - least) / 2, _LEAST_SPAN * greatest, 0.5)
        bins = np.linspace(middle - half, middle + half, _edges(len(values)))
    axes.hist(np.maximum(values, 1.0), bins=bins.tolist(), color=_BLUE)
    for value in {p50, p99}:
        axes.axvline(value, color=_GREY, linestyle="--", linewidth=1)
    if what == "tokens" and 0 < sample.max_input_tokens < greatest:
        axes.axvline(sample.max_input_tokens, color=_RED, linewidth=1)
        axes.text(sample.max_input_tokens, 0.98, " limit", color=_RED, va="top", transform=axes.get_xaxis_transform())
    axes.set_title(f"Lengths: p50 {p50:,.0f}, p99 {p99:,.0f} {what}")
    _count_rows(axes)


def _draw_projection(figure: Figure, axes: Axes, sample: Sample) -> None:
    points, shares = project(sample.vectors)
    if points is None:
        _say(axes, "Projection", "too few different vectors to project")
        return
    size = float(np.clip(4_000 / len(points), 3, 40))
    jobs = sorted(set(sample.jobs.tolist()))
    if 1 < len(jobs) <= _MOST_JOBS:
        _scatter_jobs(axes, points, sample.jobs, jobs, size)
        coloured = "job"
    else:
        lengths = np.maximum(sample.characters[sample.places], 1)
        shown = axes.scatter(
            points[:, 0], points[:, 1], c=np.log10(lengths), s=size, cmap="viridis", alpha=0.7, linewidths=0
        )
        bar = figure.colorbar(shown, ax=axes, label="characters of the text")
        ticks = _length_ticks(lengths)
        bar.set_ticks(np.log10(ticks).tolist(), labels=[f"{tick:,}" for tick in ticks])
        coloured = "length"
    axes.set_title(f"Principal components of {len(points):,} rows, by {coloured}")
    axes.set_xlabel(f"first, {shares[0]:.1%} of the variance")
    axes.set_ylabel(f"second, {shares[1]:.1%}")


def _scatter_jobs(
    axes: Axes, points: NDArray[np.float64], of: NDArray[np.str_], jobs: Sequence[str], size: float
) -> None:
    for number, job in enumerate(jobs):
        mine = points[of == job]
        axes.scatter(mine[:, 0], mine[:, 1], s=size, color=f"C{number}", alpha=0.7, linewidths=0, label=job)
    axes.legend(fontsize=8, markerscale=2, framealpha=0.8)


def _length_ticks(lengths: NDArray[np.int64]) -> list[int]:
    least, greatest = int(lengths.min()), int(lengths.max())
    steps = [digit * 10**power for power in range(8) for digit in (1, 3)]
    inside = [step for step in steps if least <= step <= greatest]
    return inside if len(inside) > 1 else sorted({least, greatest})


def project(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """(n, 2): the first two principal components, and each one's share of the variance. None for fewer than two different
    rows, or two dimensions. The largest part of a component is positive, so that it points the same way everywhere.

    By subspace iteration, which takes seconds where all components of 4,096 dimensions take a minute.
    """
    rows, dimensions = vectors.shape
    if rows < 2 or dimensions < 2:
        return None, np.zeros(2)
    centred = vectors - vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    variance = float(np.square(centred, dtype=np.float64).sum())
    if variance <= 1e-10 * float(np.square(vectors, dtype=np.float64).sum()):
        return None, np.zeros(2)
    basis = np.random.default_rng(0).standard_normal((dimensions, min(dimensions, _SUBSPACE)), dtype=np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    shadow = (centred @ basis).astype(np.float64)
    spread, turn = np.linalg.eigh(shadow.T @ shadow)
    turn = turn[:, [-1, -2]]
    components = basis @ turn
    largest = np.abs(components).argmax(axis=0)
    return shadow @ turn * np.sign(components[largest, [0, 1]]), np.maximum(spread[[-1, -2]], 0.0) / variance


def _edges(values: int) -> int:
    """Of the bars for so many values: an odd number of bars, so that equal values share the one in the middle."""
    return (int(np.clip(2 * np.sqrt(values), 9, _MOST_BARS)) | 1) + 1


def _count_rows(axes: Axes) -> None:
    axes.set_ylabel("rows")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _say(axes: Axes, title: str, text: str) -> None:
    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_GREY, transform=axes.transAxes)


def _save(figure: Figure, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    # Without its date, so that the same dataset gives the same bytes.
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else {}
    try:
        try:
            figure.savefig(temporary, format=file.suffix.lower()[1:], metadata=metadata)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"cannot write {file}: {reason}; name another file with --plot") from error
