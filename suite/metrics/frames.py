"""What metrics share: means over the frames of each video, a few frames at a time, and ranges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**19  # one activation of the first VGG-16 stage then takes 128 MiB


@torch.no_grad()
def mean_over_frames(distance: Callable[[Tensor, Tensor], Tensor], restored: Tensor, target: Tensor) -> Tensor:
    """``distance`` of each video, [batch].

    Args:
        distance: mean over the frames of two videos [1, 3, n, H, W].
        restored, target: [batch, 3, frames, H, W].
    """
    frames, height, width = restored.shape[2:]
    size = max(1, PIXELS_AT_ONCE // (height * width))
    values = []
    for video, truth in zip(restored, target, strict=True):
        parts = [
            distance(a[None], b[None]).double() * a.shape[1]
            for a, b in zip(video.split(size, 1), truth.split(size, 1), strict=True)
        ]
        values.append(torch.stack(parts).sum() / frames)
    return torch.stack(values).cpu()


def unit_range(video: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (video + 1) / 2


def check_finite(name: str, video: Tensor) -> None:
    """Raises ValueError where ``video`` holds NaN or infinity."""
    if not torch.isfinite(video).all():
        raise ValueError(f"The {name} video holds values that are not finite.")


def check_target_range(target: Tensor) -> None:
    """Raises ValueError for a target outside [-1, 1]; restored videos may overshoot, and are clamped."""
    reach = target.abs().max().item()
    if reach > 1 + 1e-3:
        raise ValueError(f"The target reaches {reach:.4g}: pass videos in [-1, 1].")
