"""The picture of ``analysis/residuals.py``: error and cosine against distance, a line for each residual."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from suite.records import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TITLES = {"relative_error": "relative error $\\|g_D - g\\| / \\|g\\|$", "cosine": "cosine of $g_D$ and $g$"}
EXACT = 1e-4
"""Below it there is rounding only."""


def figure(records: list[Record], path: Path) -> None:
    """A row of panels for each decoder: the two measures for each loss; the random adjoint has none and is in each."""
    losses = records[0].settings["losses"]
    fig, axes = plt.subplots(
        len(records), 2 * len(losses), figsize=(5.2 * 2 * len(losses), 3.9 * len(records)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for row, record in zip(axes, records, strict=True):
        panels = [(loss, measure) for loss in losses for measure in TITLES]
        for axis, (loss, measure) in zip(row, panels, strict=True):
            for color, (kind, of_kind) in enumerate(record.metrics["summary"].items()):
                rows = of_kind["errors"].get(loss, of_kind["errors"].get("adjoint"))
                rows = [r for r in rows if measure == "cosine" or r["relative_error"][0] > EXACT]
                mean, low, high = zip(*(r[measure] for r in rows), strict=True) if rows else ((), (), ())
                label = kind + (f" ({of_kind['psnr_db'][0]:.1f} dB)" if "psnr_db" in of_kind else " adjoint")
                style = {"color": f"C{color}", "marker": "o", "markersize": 3, "label": label}
                axis.plot(range(len(mean)), mean, "--" if kind == "random" else "-", **style)
                axis.fill_between(range(len(mean)), low, high, color=f"C{color}", alpha=0.15, linewidth=0)
            if measure == "relative_error":
                axis.set_yscale("log")
                axis.set_ylim(1e-3, 1.3)
            axis.set(title=f"{record.settings['vae']}, {loss.upper()}", ylabel=TITLES[measure])
            axis.set_xlabel("truncation distance $D$ (frame groups)")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    s = records[0].settings
    fig.suptitle(
        f"Truncated against full gradient at the decoder's input, by what the loss sees: {s['frames']} frames at "
        f"{s['size'][0]}x{s['size'][1]}, {s['crops']} crops a clip; 95 % intervals"
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)
