"""Deep image structure and texture similarity DISTS (Ding et al. 2020), 0 for equal pictures, lower is better.

    DISTS(x, y) = 1 - sum over maps j of [ alpha_j l(mx, my) + beta_j s(x, y) ],    sum of all alpha and beta = 1
    l = (2 mx my + c) / (mx^2 + my^2 + c),    s = (2 sxy + c) / (sx^2 + sy^2 + c),    c = 1e-6

over the picture's three channels and the five rectified stages of a VGG-16 whose max pools are Hanning-windowed L2
pools; mx, sx and sxy are the mean, variance and covariance of a map over the whole picture. The code, alpha and beta
are the authors' package; the VGG-16 convolutions come from the LPIPS wheel, because the package's own constructor
downloads them. Pictures are not resized (the authors' example shrinks large ones to 256 pixels first).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from suite.metrics.frames import mean_over_frames
from suite.networks.dists import VideoDISTS


def dists(restored: Tensor, target: Tensor) -> Tensor:
    """DISTS of each video [batch, 3, frames, H, W] in [-1, 1]: [batch].

    Raises:
        FileNotFoundError: its weights are not installed.
    """
    return mean_over_frames(_network(restored.device), restored.float(), target.float())


@lru_cache
def _network(device: torch.device) -> VideoDISTS:
    return VideoDISTS().to(device)
