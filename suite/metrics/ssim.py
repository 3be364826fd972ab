"""Structural similarity (Wang et al. 2004), at most 1, higher is better.

    SSIM(x, y) = (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2))

with means, variances and covariance under a Gaussian window of 11 pixels and standard deviation 1.5, C1 = (0.01 L)^2,
C2 = (0.03 L)^2, on [0, 1] (L = 1; the value depends on where black lies, so not on [-1, 1]). Mean over every place
where the window fits, over the three colour channels and over frames, without shrinking the picture first. Equal to
``skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)``, which a test
checks; written in torch so that it also runs where the videos are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from suite.metrics.frames import mean_over_frames, unit_range

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2


def ssim(restored: Tensor, target: Tensor) -> Tensor:
    """SSIM of each video [batch, 3, frames, H, W] in [-1, 1]: [batch], in float64.

    Raises:
        ValueError: the picture is smaller than the window.
    """
    if min(restored.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, got {restored.shape[-2]}x{restored.shape[-1]}."
        )
    return mean_over_frames(_ssim, restored, target)


def _ssim(restored: Tensor, target: Tensor) -> Tensor:
    x, y = (unit_range(v.double()).flatten(0, 2)[:, None] for v in (restored, target))
    mean_x, mean_y = _window(x), _window(y)
    var_x = _window(x * x) - mean_x**2
    var_y = _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).mean()


def _window(x: Tensor) -> Tensor:
    """Gaussian mean around each place where the window fits inside the picture."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    gauss = torch.exp(-0.5 * (offset / SIGMA) ** 2)
    gauss = gauss / gauss.sum()
    return F.conv2d(F.conv2d(x, gauss[None, None, :, None]), gauss[None, None, None, :])
