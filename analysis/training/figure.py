"""Figure and table of the bias in training, from the records of ``analysis/training_bias.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from analysis.training.gaps import label
from suite.records import Record
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def figure(toys: list[Record], end: Record, path: Path) -> None:
    """Toy curves with their closed-form gaps, and the end task's curves and gaps."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    fitted = [r for r in toys if r.settings["noise"] == 0] or toys[:1]
    noisy = [r for r in toys if r.settings["noise"] > 0] or toys[-1:]
    for axis, record in ((axes[0, 0], fitted[len(fitted) // 2]), (axes[0, 1], noisy[len(noisy) // 2])):
        for k, row in enumerate(record.metrics["rows"]):
            axis.loglog(
                row["curve_steps"], [max(x, 1e-16) for x in row["curve"]], color=f"C{k}", label=label(row["distance"])
            )
            if record.settings["noise"] and row["distance"] is not None:
                axis.axhline(row["relative_gap"][0], color=f"C{k}", linestyle=":", linewidth=1)
        axis.set_title(f"linear recurrence, decay {record.settings['decay']}, noise {record.settings['noise']:g}")
        axis.set_xlabel("steps of gradient descent")
        axis.set_ylabel("loss above the optimum, relative to the start")
    axes[0, 1].set_ylim(bottom=1e-8)
    for k, row in enumerate(end.metrics["rows"]):
        steps = [int(s) for s in row["fresh_curve"]]
        axes[1, 0].plot(
            steps, list(row["fresh_curve"].values()), "-o", markersize=3, color=f"C{k}", label=label(row["distance"])
        )
        if row["distance"] is not None:
            mean, low, high = row["final_fresh_gap"]
            axes[1, 1].errorbar(
                [label(row["distance"])], [mean], [[mean - low], [high - mean]], fmt="o", capsize=4, color=f"C{k}"
            )
    s = end.settings
    axes[1, 0].set_title(f"restoration, {s['task']['frames']} frames of {s['task']['size']} pixels, {s['seeds']} seeds")
    axes[1, 0].set_xlabel("steps of Adam")
    axes[1, 0].set_ylabel("MSE on fresh clips")
    axes[1, 1].axhline(0, color="k", linewidth=1)
    axes[1, 1].set_title("final gap, paired by seed, 95 % interval")
    axes[1, 1].set_ylabel("MSE on fresh clips minus that of the exact run")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        axis.legend(fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(record: Record) -> str:
    """Markdown table of the end task."""
    text = lambda x, digits=2: "undefined" if x is None else with_interval(x, digits)  # noqa: E731
    rows = [
        [label(r["distance"]), text(r["final_fresh_mse"], 5), text(r["final_fresh_gap"], 6), text(r["progress_share"])]
        + [text(r["squared_relative_bias"]) if r["distance"] is not None else "0"]
        for r in record.metrics["rows"]
    ]
    return markdown_table(
        ["strategy", "final MSE", "gap to exact", "share of exact's progress", "m at the start"], rows
    )
