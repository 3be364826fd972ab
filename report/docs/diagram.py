"""The diagram of ``docs/concepts.md``: ``python -m report.docs.diagram`` writes ``docs/concepts.png``."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from suite.command_line import run_main
from suite.records import ROOT

PATH = ROOT / "docs" / "concepts.png"
FORWARD, BACKWARD, CUT = "0.35", "C3", "0.8"
GROUPS = 4
ROWS = {"latent": 0.0, "step": 1.5, "frames": 3.0, "loss": 4.2}
SPACING = 3.2


def box(axis: Axes, x: float, y: float, text: str, color: str, width: float = 1.5) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.05", facecolor=color, edgecolor="0.3"
    )
    axis.add_patch(patch)
    axis.text(x, y, text, ha="center", va="center", fontsize=12)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, color=color, linewidth=width))


def recurrence(axis: Axes) -> None:
    """Latents, steps, frames and losses of every group, with the arrows of the forward pass."""
    for i in range(GROUPS):
        x = i * SPACING
        box(axis, x, ROWS["latent"], f"latent $z_{i}$", "#d7e8f7")
        box(axis, x, ROWS["step"], "step", "#eeeeee")
        box(axis, x, ROWS["frames"], f"frames $x_{i}$", "#dff0d8")
        box(axis, x, ROWS["loss"], f"$L_{i}$", "#fbe3d6", width=0.8)
        for below, above in (("latent", "step"), ("step", "frames"), ("frames", "loss")):
            arrow(axis, (x - 0.2, ROWS[below] + 0.36), (x - 0.2, ROWS[above] - 0.36), FORWARD)
        if i < GROUPS - 1:
            y = ROWS["step"] + 0.15
            arrow(axis, (x + 0.82, y), (x + SPACING - 0.82, y), FORWARD)
            axis.text(x + SPACING / 2, y + 0.12, f"cache $c_{i}$", ha="center", fontsize=11, color=FORWARD)


def gradient_of_the_last_loss(axis: Axes, distance: int) -> None:
    """Where the gradient of L_3 goes, and where it is cut."""
    last = GROUPS - 1
    x = last * SPACING + 0.2
    for above, below in (("loss", "frames"), ("frames", "step")):
        arrow(axis, (x, ROWS[above] - 0.36), (x, ROWS[below] + 0.36), BACKWARD, 2.2)
    for i in range(GROUPS):
        reached = last - i <= distance
        color, width = (BACKWARD, 2.2) if reached else (CUT, 1.4)
        x = i * SPACING + 0.2
        arrow(axis, (x, ROWS["step"] - 0.36), (x, ROWS["latent"] + 0.36), color, width)
        if i < last:
            y, left = ROWS["step"] - 0.15, i * SPACING
            crossed = last - i <= distance
            arrow(
                axis,
                (left + SPACING - 0.82, y),
                (left + 0.82, y),
                BACKWARD if crossed else CUT,
                2.2 if crossed else 1.4,
            )
            if last - i == distance + 1:
                axis.text(left + SPACING / 2, y - 0.02, "✂", ha="center", va="center", fontsize=20, color="black")
                axis.text(left + SPACING / 2, y - 0.45, "cut", ha="center", va="center", fontsize=11)


@dataclass
class Config:
    """Settings of the diagram: there are none."""


def main(config: Config) -> None:
    fig, axis = plt.subplots(figsize=(11, 5.2), layout="constrained")
    recurrence(axis)
    gradient_of_the_last_loss(axis, distance=1)
    axis.plot([], [], color=FORWARD, label="forward pass: complete under every strategy")
    axis.plot([], [], color=BACKWARD, linewidth=2.2, label="gradient of $L_3$ with Chop(distance=1)")
    axis.plot([], [], color=CUT, linewidth=1.4, label="gradient that is cut (Full and Exact keep it)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncol=3, frameon=False, fontsize=10.5)
    axis.set(xlim=(-1.1, (GROUPS - 1) * SPACING + 1.1), ylim=(-0.6, 4.9))
    axis.set_axis_off()
    fig.savefig(PATH, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    run_main(main, Config, __doc__)
