"""The frontier: peak memory against time, the gradient's error as colour, and the Pareto sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

from bench.baselines import Baseline
from bench.cases import ARCHITECTURE, EMBEDDED, Case, Method, is_exact, label
from bench.page.results import Results
from bench.page.targets import ON_HOST
from chopgrad import Sampled

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = LogNorm(0.01, 1.0, clip=True)
"""Relative gradient error; what is below or above takes the colour of the end."""


@dataclass(frozen=True)
class Point:
    """One method at one video."""

    method: Method
    time: float
    """Ratio to the reference of the video."""
    memory: float
    error: float | None
    measured: bool
    """False: its memory is predicted and its transfers to the host are not timed."""


def points(results: Results, video: Case) -> list[Point]:
    """What is known of the video; offloading on a CPU takes the time of the same work without transfers."""
    found = []
    reference = results.reference(video)
    for case in results.cases:
        if case.video != video:
            continue
        peak, ratio = results.peak(case), results.time(case, reference)
        stand_in = ON_HOST.get(case.strategy)
        measured = ratio is not None and peak is not None and peak.kind == "measured"
        if ratio is None and stand_in is not None:
            ratio = results.time(replace(case, strategy=stand_in), reference)
        error = results.error(case)
        if peak and ratio:
            found.append(Point(case.strategy, ratio[0], peak.bytes, error[0] if error else None, measured))
    return found


def pareto(candidates: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in time and memory, fastest first."""
    best: list[Point] = []
    for p in sorted(candidates, key=lambda p: (p.time, p.memory)):
        if not best or p.memory < best[-1].memory:
            best.append(p)
    return best


def frontier(folder: Path, cases: Sequence[Case], path: Path) -> None:
    """A panel per VAE, at the video with most points (the largest of those)."""
    results = Results(folder, cases)
    chosen = []
    for vae in dict.fromkeys(c.vae for c in cases):
        at = {c.video: points(results, c.video) for c in cases if c.vae == vae}
        video = max(at, key=lambda v: (len(at[v]), v.frames * v.height * v.width))
        if at[video]:
            chosen.append((video, at[video]))
    fig, axes = plt.subplots(max(1, len(chosen)), 1, figsize=(13, 7 * max(1, len(chosen))), squeeze=False)
    fig.subplots_adjust(
        left=0.07, right=0.62, top=1 - 0.9 / fig.get_figheight(), bottom=1.3 / fig.get_figheight(), hspace=0.32
    )
    for axis, (video, found) in zip(axes[:, 0], chosen, strict=False):
        _panel(axis, video, found, results.reference(video))
    fig.suptitle("Peak memory against time of gradient strategies" if chosen else "Nothing was measured")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _panel(axis: Any, video: Case, found: list[Point], reference: str) -> None:
    unit, name = (2**30, "GiB") if video.vae not in EMBEDDED else (2**20, "MiB")
    palette = plt.get_cmap("viridis_r")
    for p in found:
        if p.error is None:
            color: Any = "black" if is_exact(p.method) else "0.6"
        else:
            color = palette(COLORS(p.error))
        marker = "s" if isinstance(p.method, Baseline) else "^" if isinstance(p.method, Sampled) else "o"
        face = color if p.measured else "none"
        axis.scatter(
            p.time, p.memory / unit, s=90, marker=marker, facecolors=face, edgecolors=color, linewidths=1.8, zorder=3
        )
    measured = [p for p in found if p.measured]
    # Baselines that decode something else, and estimates of one draw, are shown; what they save is not the same work
    # done for less.
    whole = [p for p in measured if is_exact(p.method) or not isinstance(p.method, Baseline | Sampled)]
    for line, width, chosen, what in (
        ("-", 1.8, [p for p in measured if is_exact(p.method)], "Pareto set of exact gradients"),
        ("--", 1.2, whole, "Pareto set with truncation"),
    ):
        best = pareto(chosen)
        axis.plot(
            [p.time for p in best], [p.memory / unit for p in best], line, color="0.3", lw=width, label=what, zorder=2
        )
    against = "full back-propagation" if reference == "Full()" else f"{reference} (full back-propagation does not fit)"
    axis.set(yscale="log", xlabel=f"time / time of {against}", ylabel=f"peak memory ({name})")
    axis.set_title(
        f"{video.vae}, {video.frames} frames of {video.height}x{video.width}, {video.loss.upper()}, {video.dtype}"
    )
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.margins(0.07, 0.08)
    axis.set_xlim(0, None)
    axis.grid(alpha=0.3)
    axis.scatter([], [], marker="o", color="0.4", label="strategy (hollow: memory predicted, transfers not timed)")
    axis.scatter([], [], marker="s", color="0.4", label="baseline")
    axis.scatter([], [], marker="^", color="0.4", label="estimate (error of one call)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.01, -0.09), ncols=2, frameon=False)
    _labels(axis, found, unit)
    if video.vae in ARCHITECTURE and any(p.error is not None for p in found):
        scale = plt.cm.ScalarMappable(COLORS, palette)
        place = axis.inset_axes((1.06, -0.12, 0.4, 0.025))
        bar = axis.figure.colorbar(scale, cax=place, orientation="horizontal", extend="both")
        bar.set_label("relative gradient error", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    else:
        note = "black: exact by construction; grey: truncated, or another decode,\nerror n/a (random weights)"
        axis.text(1.06, -0.09, note, transform=axis.transAxes, ha="left", va="top", fontsize=8)


def _labels(axis: Any, found: list[Point], unit: int) -> None:
    """One column beside the panel, in the order of memory, each with a thin line to its point: nothing overlaps."""
    ordered = sorted(found, key=lambda p: (p.memory, -p.time))
    for k, p in enumerate(ordered):
        error = "  (exact)" if is_exact(p.method) else "" if p.error is None else f"  (error {p.error:.2f})"
        height = (k + 0.5) / len(ordered)
        axis.annotate(
            f"{label(p.method)}{error}",
            (p.time, p.memory / unit),
            xytext=(1.06, height),
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.7, "shrinkA": 0, "shrinkB": 5, "relpos": (0, 0.5)},
            annotation_clip=False,
        )
