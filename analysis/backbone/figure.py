"""Figure and table of the backbone's gradient, from the records of ``analysis/backbone_gradient.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from suite.records import Record
from suite.tables import markdown_table, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def table(record: Record) -> str:
    """Markdown table of the mean gradient's measures."""
    names = ("normalised_mae", "cosine", "relative_error", "best_scaled_error", "adam_own_normalised_mae")
    rows = [
        [r["block"], r["distance"], *(with_interval(r[n], 2) for n in names), with_interval(r["adam_own_cosine"], 2)]
        + ["undefined" if r["limit_relative_error"] is None else with_interval(r["limit_relative_error"], 2)]
        for r in record.metrics["rows"]
    ]
    header = ["block", "distance", "normalised MAE", "cosine", "relative error", "best-scaled error"]
    return markdown_table([*header, "MAE of Adam's update", "cosine of Adam's update", "limit of many clips"], rows)


def figure(records: list[Record], path: Path) -> None:
    """Per case: MAE and cosine of gradient and update against distance, and the error against the number of clips."""
    fig, axes = plt.subplots(len(records), 3, figsize=(14, 4.1 * len(records)), layout="constrained", squeeze=False)
    for (left, middle, right), record in zip(axes, records, strict=True):
        rows = record.metrics["rows"]
        for k, block in enumerate(record.settings["blocks"]):
            _line(left, rows, block, "normalised_mae", f"C{k}", "-", f"gradient, block {block}")
            _line(middle, rows, block, "cosine", f"C{k}", "-", f"gradient, block {block}")
        _line(left, rows, 1, "adam_own_normalised_mae", "C3", "--", "Adam's update, block 1")
        _line(left, rows, 1, "best_scaled_error", "C4", ":", "best-scaled error, block 1")
        _line(middle, rows, 1, "adam_own_cosine", "C3", "--", "Adam's update, block 1")
        left.set_ylabel("normalised MAE, error")
        middle.set_ylabel("cosine")
        by_clips = record.metrics["by_clips"]
        for k, distance in enumerate((0, 1, 2, 4)):
            if f"1/{distance}" in by_clips[0]:
                errors = [r[f"1/{distance}"]["relative_error"] for r in by_clips]
                right.plot(
                    [r["clips"] for r in by_clips], errors, "-o", color=f"C{k}", markersize=3, label=f"D = {distance}"
                )
        noise = [(r["clips"], r["noise"]) for r in by_clips if "noise" in r]
        right.plot(*zip(*noise), "k--", label="noise of the full gradient")
        right.set_xscale("log", base=2)
        right.set_xticks([r["clips"] for r in by_clips], [str(r["clips"]) for r in by_clips])
        right.set_xlabel("clips averaged over")
        right.set_ylabel("relative error of the mean")
        for axis in (left, middle):
            axis.set_xlabel("truncation distance $D$ (frame groups)")
            axis.xaxis.get_major_locator().set_params(integer=True)
        middle.set_ylim(min(0.5, middle.get_ylim()[0]), 1.02)
        for axis in (left, right):
            axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)
            axis.legend(
                fontsize=8, ncols=1 if axis is middle else 2, loc="lower left" if axis is middle else "upper right"
            )
        s = record.settings
        middle.set_title(
            f"{s['case']}: {s['clips']} clips, {s['task']['frames']} frames at {s['task']['size']}x{s['task']['size']}"
        )
    fig.suptitle(f"Gradient of {_whose(records[0])}, truncated against full back-propagation; 95 % intervals")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _line(axis: Any, rows: list[dict], block: int, name: str, color: str, style: str, label: str) -> None:
    rows = [r for r in rows if r["block"] == block]
    if rows:
        x = [r["distance"] for r in rows]
        mean, low, high = zip(*(r[name] for r in rows), strict=True)
        axis.plot(x, mean, style, color=color, marker="o", markersize=3, label=label)
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _whose(record: Record) -> str:
    published = record.settings["task"].get("published")
    if published is None:
        return "the backbone's parameters"
    kept, total = published["coordinates"], published["parameters_in_all"]
    what = f"LoRA layers (rank {published['lora_rank']}) of" if published["lora_rank"] else "parameters of"
    sample = f" ({kept:,} of {total:,} coordinates)" if kept < total else ""
    return f"{what} {published['pretrained']}{sample}"
