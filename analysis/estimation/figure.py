"""Figure and table of the estimators, from the records of ``analysis/estimators.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from analysis.estimation.randomised import AVERAGED
from suite.records import Record
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def figure(records: dict[str, Record], path: Path) -> None:
    """One panel per case."""
    fig, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    panels = dict(zip(PANELS, axes.flat, strict=True))
    for case, record in records.items():
        PANELS[case](panels[case], record)
    for case, axis in panels.items():
        axis.grid(alpha=0.3)
        if case in records:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        else:
            axis.set_axis_off()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _draw_look_ahead(axis: Any, record: Record) -> None:
    rows = record.metrics["rows"]
    for k, memory in enumerate((2, 3, 4, 6)):
        part = [r for r in rows if r["memory_groups"] == memory]
        x, y = [r["relative_compute"] for r in part], [r["relative_error"][0] for r in part]
        axis.plot(x, y, "-o", color=f"C{k}", markersize=4, label=f"W + D = {memory} groups")
    paper = [r for r in rows if r["block"] == 1 and r["memory_groups"] <= 6]
    axis.plot(
        [r["relative_compute"] for r in paper],
        [r["relative_error"][0] for r in paper],
        "k*",
        ms=9,
        label="W = 1 (paper)",
    )
    axis.set_xlabel("compute relative to full back-propagation")
    axis.set_ylabel("relative error at the decoder input")
    axis.set_title("look-ahead blocks at equal memory")


def _draw_randomised(axis: Any, record: Record) -> None:
    n = [2**k for k in range(13)]
    for k, row in enumerate(record.metrics["rows"]):
        parts = row["backbone"]["mean_of_n_tuned"]["relative"]
        if parts is None:
            continue
        color, d = f"C{k}", row["distance"]
        axis.plot(
            n,
            [(parts["bias"] + parts["data_truncated"] / m) ** 0.5 for m in n],
            color=color,
            label=f"truncated, D = {d}",
        )
        draws = [((parts["data_full"] + parts["draws"]) / m) ** 0.5 for m in n]
        axis.plot(n, draws, "--", color=color, label=f"randomised, mean distance {d}")
    axis.axvline(AVERAGED, color="k", linewidth=1, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("clips averaged over (dotted: what an update sees)")
    axis.set_ylabel("relative error of the backbone's mean gradient")
    axis.set_title("biased against unbiased truncation")


def _draw_sampled(axis: Any, record: Record) -> None:
    for k, name in enumerate(("Chop(1)", "Exact(offload=False)")):
        rows = [r for r in record.metrics["rows"] if r["strategy"] == name]
        x = [r["count"] for r in rows]
        axis.plot(x, [r["time_ratio"][0] for r in rows], "-o", color=f"C{k}", markersize=4, label=f"time, {name}")
        if rows[0]["added_variance"] is not None:
            variance = [1 + r["added_variance"][0] for r in rows]
            axis.plot(x, variance, "--o", color=f"C{k}", markersize=4, label=f"variance, {name}")
            product = [r["variance_times_time"][0] for r in rows]
            axis.plot(x, product, ":o", color=f"C{k}", markersize=4, label=f"variance x time, {name}")
    axis.axhline(1, color="k", linewidth=1)
    axis.set_xlabel(f"losses drawn of {record.settings['groups']}")
    axis.set_ylabel("relative to all losses")
    axis.set_ylim(bottom=0)
    axis.set_title("sampled losses, gradient of the backbone")


def _draw_adaptive(axis: Any, record: Record) -> None:
    for k, row in enumerate(record.metrics["rows"]):
        errors = [c["realised_error"] for c in row["calls"]]
        label = f"tolerance {row['tolerance']}, mean D {row['distance'][0]:.1f}, compute {row['relative_compute']:.2f}"
        axis.plot(range(len(errors)), errors, "o", color=f"C{k}", markersize=4, label=label)
        axis.axhline(row["tolerance"], color=f"C{k}", linestyle="--", linewidth=1)
    axis.set_xlabel("call")
    axis.set_ylabel("realised relative error")
    axis.set_ylim(0, 1.4 * axis.get_ylim()[1])
    axis.set_title("adaptive distance (dashed: tolerance)")


PANELS = {
    "look_ahead": _draw_look_ahead,
    "randomised": _draw_randomised,
    "sampled": _draw_sampled,
    "adaptive": _draw_adaptive,
}


def table(record: Record) -> str:
    """Markdown table of the look-ahead blocks at equal memory."""
    rows = [
        [r["memory_groups"], r["block"], r["distance"], r["relative_compute"], with_interval(r["relative_error"])]
        for r in record.metrics["rows"]
        if r["memory_groups"] <= 4
    ]
    return markdown_table(["memory (groups)", "block", "distance", "compute", "relative error"], rows)
