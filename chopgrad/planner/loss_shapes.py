"""Losses by the memory that their graphs take, without weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from chopgrad.loss import framewise


def loss_shapes(name: str, size: tuple[int, int], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """``mse``, or ``lpips``: frame by frame with recomputation.

    Args:
        size: height and width of a frame in pixels.

    Raises:
        ValueError: unknown loss, or frames that are too small for it.
    """
    if name == "mse":
        return nn.functional.mse_loss
    if name == "lpips":
        if min(size) < 16:
            raise ValueError(f"LPIPS needs frames of at least 16x16 pixels, got {size[0]}x{size[1]}.")
        return framewise(_VGGFeatures(dtype))
    raise ValueError(f"The loss must be mse or lpips, got '{name}'.")


class _VGGFeatures(nn.Module):
    """The shapes of LPIPS with VGG-16 (Zhang et al. 2018): what its graph keeps, without its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(m for a, b in pairwise(w) for m in (nn.Conv2d(a, b, 3, padding=1, dtype=dtype), nn.ReLU())))
            for w in widths
        )
        self.requires_grad_(False)

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        x, y = (v.transpose(1, 2).flatten(0, 1) for v in (frames, target))
        total = x.new_zeros(())
        for k, stage in enumerate(self.stages):
            if k:
                x, y = (nn.functional.max_pool2d(v, 2) for v in (x, y))
            x, y = stage(x), stage(y)
            difference = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
            total = total + difference.square().sum(1).mean()
        return total
