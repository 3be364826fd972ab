"""Figure of temporal locality (Fig. 3), from the records of ``analysis/temporal_locality.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from analysis.locality.decay import MODELS, Fit
from suite.records import Record, read_record

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def figure(folder: Path, names: list[str], snapshots: list[Path], path: Path) -> None:
    """Influence against distance with the three fits (one panel a decoder), and the course of training."""
    steps = [folder / f"temporal_locality-snapshot-{s.name}.json" for s in snapshots]
    fig, axes = plt.subplots(1, len(names) + bool(steps), figsize=(6 * (len(names) + bool(steps)), 5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        for label, color, suffix in (("trained", "C0", ""), ("random weights", "C7", "-untrained")):
            record = read_record(folder / f"temporal_locality-{name}{suffix}.json")
            d, mean, low, high = _curve_of(record)
            axis.plot(d, mean, "o-", color=color, markersize=3.5, label=label)
            axis.fill_between(d, low, high, color=color, alpha=0.2, linewidth=0)
            if not suffix:
                floor = mean[-1] / 30
                for k, model in enumerate(MODELS):
                    f = record.metrics["fits"]["models"][model]
                    y = _model(model, f)(d)
                    axis.plot(d[y > floor], y[y > floor], "--", color=f"C{k + 1}", linewidth=1.2, label=f"{model} fit")
                for i, j, value in (p for s in record.metrics["samples"] for p in s["operator"]):
                    first = record.metrics["samples"][0]["operator"][0][:2] == [i, j]
                    axis.plot(i - j, value, "k+", label="operator norm" if first else None)
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), loc="lower left", fontsize=8)
        axis.set_yscale("log")
        axis.set_xlabel("temporal distance $D(i,j)$ (frame groups)")
        axis.set_ylabel("influence $\\|\\partial x_i / \\partial z_j\\|$ (Frobenius)")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    if steps:
        axis = axes[0, -1]
        for k, step in enumerate(steps):
            d, mean, _, _ = _curve_of(read_record(step))
            shade = plt.get_cmap("viridis")(k / max(1, len(steps) - 1))
            axis.plot(d, mean / mean[0], "o-", markersize=3, color=shade, label=f"step {int(step.stem.split('-')[-1])}")
        axis.set_yscale("log")
        axis.set_xlabel("temporal distance $D(i,j)$ (frame groups)")
        axis.set_ylabel("influence relative to distance 0")
        axis.set_title("in the course of a short training run")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    title = "Influence of a latent on the frames of later groups,\nmean over real crops and 95 % interval"
    fig.suptitle(title if len(axes[0]) == 1 else title.replace("\n", " "))
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _curve_of(record: Record) -> tuple[np.ndarray, ...]:
    rows = record.metrics["fits"]["mean_curve"]
    return np.array([int(d) for d in rows], dtype=float), *np.array(list(rows.values())).T


def _model(model: str, f: dict[str, Any]) -> Fit:
    return Fit(model, f["C"], f["rate"], f["support_groups"], 0.0)
