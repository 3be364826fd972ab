"""Peak memory of every strategy on the published architectures, predicted without a GPU:
``python analysis/predicted_memory.py`` (the memory half of Fig. 6 of arXiv 2603.17812, at sizes that no card holds).

Tables at one length, and memory against the number of frames with the limits of common cards. Each case is one record
and is kept, so an interrupted run goes on. All numbers here are predictions; where a GPU has measured the same case,
the measurement is in results/memory/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from bench.cases import KEY_STRATEGIES, Inside, label
from bench.published import CASES, CURVE_FRAMES, CURVES, FOLDER, GIB, TARGETS_GIB, least_exact
from chopgrad import Strategy
from chopgrad.planner import default_strategies, estimator
from suite.command_line import run_main
from suite.progress import track
from suite.records import Record, finished, provenance, read_record, write_record
from suite.tables import markdown_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

CARDS_GIB = (24, 48, 80)


@dataclass
class Config:
    """Settings of the predictions."""

    cases: tuple[str, ...] = (*CASES, *CURVES)
    out: Path = FOLDER
    """Folder of the records, of the table (README.md) and of the figure (curves.png)."""


def predict(name: str, path: Path) -> Record:
    """One case, predicted now or read back from an earlier run of the same code."""
    vae, frames, height, width = (CASES | CURVES)[name]
    settings = {"vae": vae, "frames": frames, "height": height, "width": width, "loss": "mse", "dtype": "bfloat16"}
    strategies: Sequence[Strategy] | None = None if name in CASES else KEY_STRATEGIES
    settings["strategies"] = "default" if strategies is None else [label(s) for s in strategies]
    made_by = provenance()
    if old := finished(path, settings, made_by):
        return old
    found = estimator(vae, frames, height, width)
    rows = [
        {
            "strategy": label(Inside(p.checkpoint, p.strategy) if p.checkpoint else p.strategy),
            "device_bytes": p.device_bytes,
            "host_bytes": p.host_bytes,
            "relative_compute": p.relative_compute,
            "relative_seconds": p.relative_seconds,
            "distance": p.distance,
        }
        for p in found.of(strategies or default_strategies(found.groups()), "best")
    ]
    write_record(path, settings, {"predictions": rows}, made_by)
    return read_record(path)


def report(records: dict[str, Record]) -> str:
    """Markdown: one table per case, and whether the target was reached."""
    lines = [
        "# Predicted peak memory",
        "",
        "Predicted by the planner's formulas, **not measured**: GiB on the device (weights included), on the host, and",
        "time relative to full back-propagation on an H200. Left out: cuDNN workspaces, fragmentation.",
        "",
    ]
    if any(name in CURVES for name in records):
        lines += ["![Predicted memory against frames](curves.png)", ""]
    for name, record in records.items():
        if name not in CASES:
            continue
        s = record.settings
        lines += [f"## {s['vae']}, {s['frames']} frames of {s['height']}x{s['width']}, MSE, {s['dtype']}", ""]
        rows = [
            [
                r["strategy"],
                f"{r['device_bytes'] / GIB:.1f}",
                f"{r['host_bytes'] / GIB:.1f}",
                f"{r['relative_seconds']:.2f}",
            ]
            + ["exact" if r["distance"] is None else f"truncated at {r['distance']}"]
            for r in record.metrics["predictions"]
        ]
        lines += [markdown_table(["strategy", "device GiB", "host GiB", "time", "gradient"], rows), ""]
        if name in TARGETS_GIB:
            least = least_exact({r["strategy"]: r for r in record.metrics["predictions"]})["device_bytes"] / GIB
            reached = "reached" if least <= TARGETS_GIB[name] else "NOT reached"
            lines += [f"Target of {TARGETS_GIB[name]} GiB for an exact gradient: {reached} ({least:.1f} GiB).", ""]
    return "\n".join(lines)


def figure(records: dict[str, Record], path: Path) -> None:
    """Device memory against frames: lines through the origin, flat lines, and what cards hold."""
    curves: dict[tuple[str, int, int], dict[str, dict[int, float]]] = {}
    for name in (n for n in records if n in CURVES):
        vae, frames, height, width = CURVES[name]
        for row in records[name].metrics["predictions"]:
            by_frames = curves.setdefault((vae, height, width), {}).setdefault(row["strategy"], {})
            by_frames[frames] = row["device_bytes"] / GIB
    fig, axes = plt.subplots(
        1, len(curves), figsize=(6.5 * len(curves) + 2, 6), layout="constrained", squeeze=False, sharey=True
    )
    for axis, ((vae, height, width), lines) in zip(axes[0], curves.items(), strict=True):
        for k, (strategy, by_frames) in enumerate(lines.items()):
            x = sorted(by_frames)
            axis.plot(x, [by_frames[n] for n in x], f"C{k}", marker="osD^v<>PX*"[k % 10], markersize=5, label=strategy)
        for card in CARDS_GIB:
            axis.axhline(card, color="0.35", linestyle=":", linewidth=1.2)
            axis.text(1.01, card, f"{card} GiB", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.set(xlabel="frames", xscale="log", yscale="log", title=f"{vae}, {height}x{width}, MSE, bfloat16")
        axis.set_xticks(CURVE_FRAMES, [str(n) for n in CURVE_FRAMES])
        axis.set_xlim(CURVE_FRAMES[0] * 0.9, CURVE_FRAMES[-1] * 1.1)
        axis.minorticks_off()
        axis.set_yticks([5, 10, 20, 50, 100, 200, 500, 1000, 2000])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_tick_params(labelleft=True)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("peak device memory with weights (GiB)")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.1, 0.5))
    fig.suptitle("Predicted by the planner, not measured. Dotted: what common cards hold")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(config: Config) -> None:
    unknown = [name for name in config.cases if name not in CASES | CURVES]
    if unknown:
        raise ValueError(f"Unknown case '{unknown[0]}': pass some of {', '.join(CASES | CURVES)}.")
    bar = track(config.cases, description="predicted memory")
    records = {name: predict(name, config.out / f"{name}.json") for name in bar}
    if any(name in CURVES for name in records):
        figure(records, config.out / "curves.png")
    text = report(records)
    (config.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
