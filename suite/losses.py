"""Pixel-wise losses by name. Each is a mean of per-frame terms on [batch, 3, frames, H, W] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from suite.networks.dists import VideoDISTS
from suite.networks.lpips import VideoLPIPS

LOSSES = ("mse", "l1", "lpips", "lpips-alex", "dists")


def loss_by_name(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[..., Tensor]:
    """``mse``, ``l1``, ``lpips`` (VGG-16, the usual training loss), ``lpips-alex`` or ``dists``.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the weights of a perceptual loss are not installed.
    """
    if name == "mse":
        return F.mse_loss
    if name == "l1":
        return F.l1_loss
    if name == "dists":
        return VideoDISTS().to(device, dtype)
    if name in LOSSES:
        return VideoLPIPS("alex" if name == "lpips-alex" else "vgg").to(device, dtype)
    raise ValueError(f"Unknown loss '{name}': pass one of {', '.join(LOSSES)}.")
