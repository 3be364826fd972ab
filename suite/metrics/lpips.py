"""Learned perceptual distance LPIPS v0.1 (Zhang et al. 2018), 0 for equal pictures, lower is better.

    LPIPS(x, y) = sum over layers l of mean over pixels of ||w_l * (f_l(x) - f_l(y))||^2

with unit-normalised features f_l of AlexNet (``lpips-alex``, what tables of results print) or VGG-16 (``lpips-vgg``,
what networks are trained on), and weights w_l fitted to human judgement. The network is that of
``suite.networks.lpips``: the official code with the official numbers, mean over frames, at the video's resolution.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from suite.metrics.frames import mean_over_frames
from suite.networks.lpips import VideoLPIPS


def lpips(net: str, restored: Tensor, target: Tensor) -> Tensor:
    """LPIPS of each video [batch, 3, frames, H, W] in [-1, 1]: [batch].

    Args:
        net: ``"alex"`` or ``"vgg"``.

    Raises:
        FileNotFoundError: its weights are not installed.
    """
    network = _network(net, restored.device)
    return mean_over_frames(network, restored.float(), target.float())


lpips_alex = partial(lpips, "alex")
lpips_vgg = partial(lpips, "vgg")


@lru_cache
def _network(net: str, device: torch.device) -> VideoLPIPS:
    return VideoLPIPS(net).to(device)
