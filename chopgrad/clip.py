"""The first frames of a video file, as a VAE takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def read_clip(path: str | Path, frames: int, height: int, width: int) -> Tensor:
    """The first ``frames`` frames, shrunk to fill ``height`` x ``width`` and cut in the middle.

    A clip that a phone turned is turned back. Memory is that of one frame of the file beside the result.

    Returns:
        [1, 3, frames, height, width] in [-1, 1], float32.

    Raises:
        ValueError: it cannot be read, has no video, is too short or too small; or PyAV is not there.
    """
    try:
        import av
    except ImportError:
        raise ValueError("reading a clip needs PyAV: pip install av.") from None
    if min(frames, height, width) < 1:
        raise ValueError(f"a clip needs at least one frame and one pixel, got {frames} of {height}x{width}.")
    found: list[Tensor] = []
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError(f"'{Path(path).name}' has no video stream.")
            for frame in file.decode(video=0):
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                picture = np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()
                found.append(_fitted(torch.from_numpy(picture), height, width, Path(path).name))
                if len(found) == frames:
                    break
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"'{Path(path).name}' cannot be read as a video: {error}") from error
    if len(found) < frames:
        raise ValueError(f"'{Path(path).name}' has {len(found)} frames, fewer than {frames}.")
    return torch.stack(found, dim=1)[None].float() / 127.5 - 1


def _fitted(picture: Tensor, height: int, width: int, name: str) -> Tensor:
    """[H, W, 3] in 8 bits -> [3, height, width] in 8 bits."""
    x = picture.permute(2, 0, 1)[None].float()
    scale = max(height / x.shape[2], width / x.shape[3])
    if scale > 1:
        raise ValueError(f"'{name}' is {x.shape[2]}x{x.shape[3]}, smaller than {height}x{width}.")
    size = [max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))]
    x = F.interpolate(x, size=size, mode="area")[0].round().clamp(0, 255).to(torch.uint8)
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]
