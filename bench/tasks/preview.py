"""A contact sheet of a task, to see at a glance what it asks for."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from bench.tasks.task import Pair, Task
from suite.progress import track

matplotlib.use("Agg")


def contact_sheet(
    task: Task, path: Path, seeds: tuple[int, ...], frames: int, height: int, width: int, shown: int = 4
) -> Path:
    """Write a PNG: one row for each seed; on the left frames of the condition, on the right the same of the target.

    Beside each row stands its seed, below it the PSNR of the condition against the target (all frames).
    """
    from matplotlib import pyplot

    bar = track(seeds, description=task.name)
    pairs = [task.clip(seed, frames, height, width) for seed in bar]
    columns = np.unique(np.linspace(0, frames - 1, min(shown, frames)).round().astype(int))
    n = len(columns)
    cell = 1.5
    figure, axes = pyplot.subplots(
        len(seeds),
        2 * n + 1,
        figsize=(cell * (2 * n + 0.12), cell * height / width * len(seeds) + 0.32 * len(seeds) + 0.75),
        gridspec_kw={"width_ratios": [1] * n + [0.12] + [1] * n},
        squeeze=False,
        layout="constrained",
    )
    for row, (seed, pair) in enumerate(zip(seeds, pairs)):
        axes[row][n].axis("off")
        for side, video in enumerate((pair.condition, pair.target)):
            for k, frame in enumerate(columns):
                axis = axes[row][side * (n + 1) + k]
                axis.imshow(_picture(video, frame), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                label = f"frame {frame}" if row else f"{('condition', 'target')[side]}, frame {frame}"
                if side == 0 and k == 0:
                    axis.set_ylabel(f"seed {seed}", fontsize=8)
                axis.set_title(label, fontsize=8)
        axes[row][0].set_xlabel(_psnr(pair), fontsize=8, loc="left")
    losses = " + ".join(f"{term.weight:g} {term.loss} ({term.space})" for term in task.losses)
    trained = "; the decoder trains too" if task.trains_decoder else ""
    figure.suptitle(f"{task.name}: {frames} frames of {height}x{width}; loss {losses}{trained}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _psnr(pair: Pair) -> str:
    value = peak_signal_noise_ratio(pair.target.numpy(), pair.condition.numpy(), data_range=2)
    return f"PSNR {value:.1f} dB"


def _picture(video: Tensor, frame: int) -> np.ndarray:
    return ((video[:, frame] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
