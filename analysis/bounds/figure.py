"""Figure of the error bounds, from the records of ``analysis/error_bound.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from analysis.bounds.summary import RULES, TOLERANCES, cases_of
from analysis.bounds.truncation import (
    full_sum,
    geometric_tail,
    triangle,
)
from analysis.locality.decay import Floats
from suite.records import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def figure(records: list[Record], path: Path) -> None:
    """Per decoder: error and bounds against distance; chosen distance against tolerance."""
    fig, axes = plt.subplots(len(records), 2, figsize=(12, 4.6 * len(records)), squeeze=False)
    for (left, right), record in zip(axes, records, strict=True):
        samples, summary = record.metrics["samples"], record.metrics["summary_of_bounds"]
        constants = summary["constants"]
        lines: dict[str, list[Floats]] = {}
        for sample, k in zip(samples, constants, strict=True):
            case = cases_of(sample)[0][0]
            d = np.arange(len(case.error) - 1, dtype=float)
            curves = {"measured error": case.error[:-1], "sizes of the cut terms": triangle(case)[:-1]}
            curves["(a) full sum"] = full_sum(case)[:-1]
            if k["alpha_per_group"] > 0:
                tail = geometric_tail(k["C"], k["alpha_per_group"], float(case.adjoint.max()), d)
                curves["(b) geometric tail"] = tail
            for label, y in curves.items():
                lines.setdefault(label, []).append(y / case.gradient)
        for label, ys in lines.items():
            left.plot(d, np.exp(np.log(np.maximum(ys, 1e-12)).mean(0)), "o-", markersize=3.5, label=label)
        left.set_yscale("log")
        left.set_xlabel("truncation distance $D$ (frame groups)")
        left.set_ylabel(f"relative to $\\|g_{{j=1}}\\|$, {record.settings['losses'][0].upper()}")
        left.set_title(f"{record.settings['vae']}: error of $g_j$ of group $j = 1$ and its bounds")
        rows = summary["distance_by_tolerance"]
        for k, rule in enumerate(("truly enough", *RULES) if rows else ()):
            mean, low, high = np.array([r[rule] for r in rows]).T
            eps = [r["relative_tolerance"] for r in rows]
            style = "k" if k == 0 else f"C{k}"
            right.plot(eps, mean, "o-", color=style, markersize=3.5, label=rule)
            right.fill_between(eps, low, high, color=style, alpha=0.12, linewidth=0)
        if rows:
            right.set_xscale("log")
            right.invert_xaxis()
            right.set_xticks(TOLERANCES, [f"{t:g}" for t in TOLERANCES])
            right.minorticks_off()
            right.set_ylim(top=1.35 * right.get_ylim()[1])
        right.set_xlabel("tolerance $\\epsilon$ relative to $\\|g_j\\|$")
        right.set_ylabel("distance chosen (frame groups)")
        right.set_title(f"{record.settings['vae']}: which distance each rule chooses")
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(**({"integer": True} if axis is left else {}))
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8, **({"ncol": 2, "loc": "upper left"} if axis is right else {}))
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
