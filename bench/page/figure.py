"""Memory against frames, and memory and time against the truncation distance (cf. Fig. 6 of arXiv 2603.17812)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from bench.cases import Case, label
from bench.page.results import Peak, Results, frames_of, groups_of_videos, methods_of
from chopgrad import Chop, Full

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

MARKERS = "osD^v<>PX*"


def curves(folder: Path, cases: Sequence[Case], path: Path) -> None:
    """A row per VAE, at the size of which most lengths are known. Hollow markers and dashed lines: predicted only."""
    results = Results(folder, cases)
    every = dict.fromkeys(c.vae for c in cases)
    vaes = [vae for vae in every if any(results.knows(v) for v in groups_of_videos(cases) if v.vae == vae)] or [*every]
    fig, axes = plt.subplots(len(vaes), 3, figsize=(17, 4.8 * len(vaes)), layout="constrained", squeeze=False)
    for row, vae in zip(axes, vaes, strict=True):
        known = [c for c in cases if c.vae == vae and results.peak(c)]
        video = max((v for v in groups_of_videos(cases) if v.vae == vae), key=lambda v: len(frames_of(known, v)))
        unit, name = (2**30, "GiB") if vae.startswith("full:") else (2**20, "MiB")
        _against_frames(row[0], results, video, unit, name)
        _against_distance(row[1], results, video, unit, name)
        _time_against_distance(row[2], results, vae)
    p = next(iter(results.records.values())).provenance if results.records else {"device": "nothing measured"}
    fig.suptitle(f"Gradient strategies on {p['device']}. Hollow and dashed: predicted, not measured")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _against_frames(axis: Any, results: Results, video: Case, unit: int, name: str) -> None:
    frames = frames_of(results.cases, video)
    for k, method in enumerate(methods_of(results.cases, video)):
        peaks = [results.peak(replace(video, frames=n, strategy=method)) for n in frames]
        if not any(peaks):
            continue
        color = plt.get_cmap("tab20")(k % 20)
        style = {"color": color, "marker": MARKERS[k % 10], "markersize": 5, "label": label(method)}
        _line(axis, frames, peaks, unit, "-", style)
    # Through the origin: what a memory in proportion to the video would be.
    if full := results.peak(replace(video, frames=frames[-1], strategy=Full())):
        x = [frames[0] / 2, frames[-1]]
        axis.plot(x, [full.bytes / unit * n / frames[-1] for n in x], ":", color="0.5", label="in proportion to frames")
    axis.set(xscale="log", xlabel="frames", title=_title(video))
    axis.set_xticks(frames, [str(n) for n in frames])
    axis.xaxis.set_minor_locator(NullLocator())
    if axis.lines:
        axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _memory_axis(axis, name)


def _against_distance(axis: Any, results: Results, video: Case, unit: int, name: str) -> None:
    distances = [m.distance for m in _paper(results.cases, video)]
    for k, n in enumerate(frames_of(results.cases, video)):
        peaks = [results.peak(replace(video, frames=n, strategy=Chop(d))) for d in distances]
        if any(peaks):
            style = {"color": f"C{k}", "marker": MARKERS[k], "label": f"{n} frames"}
            _line(axis, distances, peaks, unit, (0, (4, k)) if k else "-", style)
    axis.set(xlabel="truncation distance $D$ (frame groups)", title=f"Chop(D), {video.height}x{video.width}")
    axis.set(ylim=(0, None), ylabel=f"peak memory ({name})")
    axis.set_xticks(distances)
    _legend(axis)
    axis.grid(alpha=0.3)


def _line(
    axis: Any, x: Sequence[int], peaks: Sequence[Peak | None], unit: int, solid: Any, style: dict[str, Any]
) -> None:
    """Through all that is known; what is only predicted is hollow, and a line with none else dashed."""
    known = [(at, p.bytes / unit, p.kind) for at, p in zip(x, peaks, strict=True) if p]
    measured = [point[:2] for point in known if point[2] == "measured"]
    hollow = {} if len(measured) == len(known) else {"markerfacecolor": "none"}
    axis.plot(*zip(*(p[:2] for p in known), strict=True), linestyle=solid if measured else "--", **style, **hollow)
    if hollow and measured:
        axis.plot(*zip(*measured, strict=True), linestyle="", **style | {"label": None})


def _time_against_distance(axis: Any, results: Results, vae: str) -> None:
    k = 0
    for video in groups_of_videos(results.cases):
        if video.vae != vae:
            continue
        distances = [m.distance for m in _paper(results.cases, video)]
        for n in frames_of(results.cases, video):
            reference = results.reference(replace(video, frames=n))
            ratios = [results.time(replace(video, frames=n, strategy=Chop(d)), reference) for d in distances]
            found = [(d, r) for d, r in zip(distances, ratios, strict=True) if r]
            if found:
                x, y = [d for d, _ in found], [r[0] for _, r in found]
                errors = [[r[0] - r[1] for _, r in found], [r[2] - r[0] for _, r in found]]
                name = f"{n} frames, {video.height}x{video.width}, {video.loss.upper()}"
                name += "" if reference == "Full()" else f" (of {reference})"
                axis.errorbar(x, y, errors, color=f"C{k}", marker=MARKERS[k % 10], capsize=3, label=name)
                axis.set_xticks(distances)
                k += 1
    axis.set(xlabel="truncation distance $D$ (frame groups)", ylabel="time / time of full", title="Chop(D), time")
    if not k:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not timed yet", ha="center", va="center", color="0.4", transform=axis.transAxes)
    axis.set_ylim(0, None)
    _legend(axis)
    axis.grid(alpha=0.3)


def _paper(cases: Sequence[Case], video: Case) -> list[Chop]:
    """The paper's scheme at every distance that was asked for."""
    found = [m for m in methods_of(cases, video) if isinstance(m, Chop) and m == Chop(m.distance)]
    return sorted(found, key=lambda m: m.distance)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def _memory_axis(axis: Any, name: str) -> None:
    axis.set(yscale="log", ylabel=f"peak memory ({name})")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)


def _title(video: Case) -> str:
    return f"{video.vae}, {video.height}x{video.width}, {video.loss.upper()}, {video.dtype}"
