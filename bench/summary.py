"""Tables and figure of the benchmark, from its records only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from bench.cases import Case, label, strategies
from chopgrad import Chop, Full
from suite.records import Record, read_record
from suite.tables import markdown_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

MIB = 2**20


def report(folder: Path, cases: Sequence[Case]) -> str:
    """Markdown: where it was measured, then peak memory and relative time, one pair of tables per VAE and size."""
    records = _read(folder, cases)
    if not records:
        return "No case was measured.\n"
    p = next(iter(records.values())).provenance
    code = f"commit {(p['commit'] or 'unknown')[:10]}{' with local changes' if p['dirty'] else ''}"
    lines = [
        "# Peak memory and time of gradient strategies",
        "",
        f"Measured on {p['device']} ({p['threads']} threads), torch {p['torch']}, diffusers {p['diffusers']}, "
        f"Python {p['python']}, {code}, {p['date'][:10]}: `{p['command']}`.",
        "",
        "Peak: what the loss and its backward pass add to weights, latents and target. Time: ratio to full "
        "back-propagation timed right before (mean and 95 % bootstrap interval over rounds; to `Exact()` where full "
        "back-propagation does not fit).",
    ]
    for video in _videos(cases):
        frames = _frames(cases, video)
        lines += ["", f"## {video.vae}, {video.height}x{video.width}, {video.loss.upper()}, {video.dtype}", ""]
        header = ["strategy", *(f"{n} frames, peak" for n in frames), *(f"{n} frames, time" for n in frames)]
        rows = []
        for strategy in strategies(video.device):
            at = [replace(video, frames=n, strategy=strategy) for n in frames]
            rows.append(
                [label(strategy)]
                + [_memory_text(records.get(("memory", c.name))) for c in at]
                + [_time_text(records.get(("time", c.name))) for c in at]
            )
        lines.append(markdown_table(header, rows))
    return "\n".join(lines) + "\n"


def figure(folder: Path, cases: Sequence[Case], path: Path) -> None:
    """Per VAE at its largest size: peak memory against frames, and the frontier of time and memory (cf. Fig. 6)."""
    records = _read(folder, cases)
    vaes = list(dict.fromkeys(c.vae for c in cases))
    fig, axes = plt.subplots(len(vaes), 3, figsize=(15, 4.6 * len(vaes)), layout="constrained", squeeze=False)
    for row, vae in zip(axes, vaes, strict=True):
        # The size with most frame counts; the larger one if several have as many.
        video = max((c for c in _videos(cases) if c.vae == vae), key=lambda c: (len(_frames(cases, c)), c.height))
        frames = _frames(cases, video)

        def metric(kind: str, case: Case, get: Callable[[dict[str, Any]], float]) -> float:
            record = records.get((kind, case.name))
            return float("nan") if record is None or record.metrics["out_of_memory"] else get(record.metrics)

        def peak(case: Case) -> float:
            return metric("memory", case, lambda m: m["peak_bytes"] / MIB)

        def ratio(case: Case) -> float:
            return metric("time", case, lambda m: m["ratio_to_reference"][0])

        for k, strategy in enumerate(strategies(video.device)):
            at = [replace(video, frames=n, strategy=strategy) for n in frames]
            style = {"color": f"C{k}", "marker": "osD^v<>PX*"[k % 10], "label": label(strategy)}
            row[0].plot(frames, [peak(c) for c in at], markersize=5, **style)
            row[2].plot(ratio(at[-1]), peak(at[-1]), linestyle="none", markersize=9, **style)
        distances = [s.distance for s in strategies(video.device) if isinstance(s, Chop) and s == Chop(s.distance)]
        for k, n in enumerate(frames):
            at = [replace(video, frames=n, strategy=Chop(d)) for d in distances]
            row[1].plot(distances, [ratio(c) for c in at], marker="o", color=f"C{k}", label=f"{n} frames")
        title = f"{vae}, {video.height}x{video.width}, {video.loss.upper()}, {video.dtype}"
        row[0].set(xlabel="frames", ylabel="peak memory (MiB)", yscale="log", title=title)
        row[1].set(
            xlabel="truncation distance $D$ (frame groups)",
            ylabel="time / time of full",
            title="Chop(D)",
            ylim=(0, None),
        )
        row[2].set(
            xlabel="time / time of full",
            ylabel="peak memory (MiB)",
            yscale="log",
            title=f"{frames[-1]} frames",
            xlim=(0, None),
        )
        row[1].legend()
        row[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        row[0].set_xticks(frames)
        row[1].set_xticks(distances)
        for axis in (row[0], row[2]):
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
        for axis in row:
            axis.grid(alpha=0.3, which="both")
    device = next(iter(records.values())).provenance["device"] if records else "nothing measured"
    fig.suptitle(f"Gradient strategies: memory and time on {device}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _read(folder: Path, cases: Sequence[Case]) -> dict[tuple[str, str], Record]:
    records = {}
    for kind in ("memory", "time"):
        for case in cases:
            try:
                records[kind, case.name] = read_record(folder / kind / f"{case.name}.json")
            except ValueError:
                continue  # not measured; shown as missing
    return records


def _videos(cases: Sequence[Case]) -> list[Case]:
    """One case per VAE and size."""
    return list({replace(c, frames=0, strategy=Full()): c for c in cases}.values())


def _frames(cases: Sequence[Case], video: Case) -> list[int]:
    """The frame counts measured for a VAE and size."""
    return sorted({c.frames for c in cases if replace(c, frames=video.frames, strategy=video.strategy) == video})


def _memory_text(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.metrics["out_of_memory"]:
        return "out of memory"
    return f"{record.metrics['peak_bytes'] / MIB:,.1f} MiB"


def _time_text(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.metrics["out_of_memory"]:
        return "out of memory"
    mean, low, high = record.metrics["ratio_to_reference"]
    against = "" if record.metrics["reference"] == "Full()" else f" of {record.metrics['reference']}"
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]{against}"
