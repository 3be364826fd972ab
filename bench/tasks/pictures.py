"""What training shows: videos side by side, as a picture and as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")


def side_by_side(path: Path, rows: Sequence[Mapping[str, Tensor]], title: str, shown: int = 3) -> Path:
    """Write a PNG: a row a clip; for each of its videos, named above, a few frames.

    Args:
        rows: per clip: name -> [3, frames, H, W] in [-1, 1], the same names in every row.
        shown: frames of each video, evenly spaced.
    """
    from matplotlib import pyplot

    names = list(rows[0])
    _, frames, height, width = rows[0][names[0]].shape
    columns = np.unique(np.linspace(0, frames - 1, min(shown, frames)).round().astype(int))
    n, cell = len(columns), 1.15
    figure, axes = pyplot.subplots(
        len(rows), len(names) * (n + 1) - 1, squeeze=False, layout="constrained",
        figsize=(cell * (len(names) * (n + 0.1)), cell * height / width * len(rows) + 0.75),
        gridspec_kw={"width_ratios": ([1] * n + [0.1]) * (len(names) - 1) + [1] * n, "wspace": 0.0, "hspace": 0.02},
    )  # fmt: skip
    for row, videos in enumerate(rows):
        for side, name in enumerate(names):
            for k, frame in enumerate(columns):
                axis = axes[row][side * (n + 1) + k]
                axis.imshow(_picture(videos[name], frame), interpolation="nearest")
                axis.axis("off")
                if row == 0:
                    axis.set_title(f"{name if k == 0 else ''}\nframe {frame}", fontsize=7, loc="left")
            if side:
                axes[row][side * (n + 1) - 1].axis("off")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def write_video(path: Path, video: Tensor, rate: int = 16) -> Path:
    """Write [3, frames, H, W] in [-1, 1] as H.264 in an MP4 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (n - n % 2 for n in video.shape[2:])  # chroma has half the resolution
    pixels = ((video[:, :, :height, :width].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(rate), options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in np.ascontiguousarray(pixels.permute(1, 2, 3, 0).cpu().numpy()):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _picture(video: Tensor, frame: int) -> np.ndarray:
    return ((video[:, frame].float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
