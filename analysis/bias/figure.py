"""Figure and table of the gradient's bias (Fig. 5), from the records of ``analysis/gradient_bias.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from suite.bootstrap import mean_interval
from suite.records import Record
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = {
    "absolute_error": "absolute error $\\|g_D - g\\|$",
    "relative_error": "relative error $\\|g_D - g\\| / \\|g\\|$",
    "cosine": "cosine of $g_D$ and $g$",
}


def table(record: Record) -> str:
    """Markdown table of the summary at distances 0, 1, 2, 4, ... and the largest."""
    summary = record.metrics["summary"]
    shown = {0, 1, 2, 4, 8, 16, 32, max(row["distance"] for row in summary)}
    rows = [
        [row["loss"], row["block"], row["distance"], f"{row['absolute_error'][0]:.2e}"]
        + [with_interval(row[k]) for k in ("relative_error", "cosine", "best_scaled_error")]
        for row in summary
        if row["distance"] in shown and (row["block"] == 1 or row["distance"] <= 1)
    ]
    header = ["loss", "block", "distance", "absolute error", "relative error", "cosine", "best-scaled error"]
    return markdown_table(header, rows)


def figure(record: Record, path: Path) -> None:
    """The four measures against distance per loss, and the relative error per block size."""
    summary = record.metrics["summary"]
    losses, blocks = record.settings["losses"], record.settings["blocks"]
    fig, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=False):
        for color, loss in enumerate(losses):
            rows = [r for r in summary if r["loss"] == loss and r["block"] == blocks[0]]
            _line(axis, rows, name, f"C{color}", "-", loss.upper())
            if name == "relative_error":
                _line(axis, rows, "best_scaled_error", f"C{color}", "--", f"{loss.upper()}, best-scaled")
        axis.set_ylabel(title)
    if any(r["relative_error"][0] > 1e-4 for r in summary):  # an axis without a line cannot be logarithmic
        axes[0, 0].set_yscale("log")
    for color, block in enumerate(blocks):
        rows = [r for r in summary if r["loss"] == losses[0] and r["block"] == block]
        _line(axes[1, 1], rows, "relative_error", f"C{color}", "-", f"block {block}")
    axes[1, 1].set_ylabel(f"relative error, {losses[0].upper()}")
    for axis in axes.flat:
        axis.set_xlabel("truncation distance $D$ (frame groups)")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right" if axis is axes[1, 0] else "upper right")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_yscale() == "linear":
            axis.set_ylim(0, 1.02)
    s = record.settings
    psnr = mean_interval([x["psnr_db"] for x in record.metrics["samples"]])[0]
    fig.suptitle(
        f"Gradient at the decoder input, truncated against full back-propagation: {s['vae']}, {s['frames']} frames at "
        f"{s['size'][0]}x{s['size'][1]}\n{len(s['clips'])} clip(s) x {s['crops']} crops, reconstruction {psnr:.1f} dB, "
        "mean and 95 % bootstrap interval"
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _line(axis: Any, rows: list[dict], name: str, color: str, style: str, label: str) -> None:
    # Distances that are exact carry rounding error only; on a logarithmic axis they would set the scale.
    rows = [r for r in rows if name != "absolute_error" or r["relative_error"][0] > 1e-4]
    x = [r["distance"] for r in rows]
    mean, low, high = zip(*(r[name] for r in rows), strict=True) if rows else ((), (), ())
    axis.plot(x, mean, style, color=color, marker="o", markersize=3, label=label)
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
