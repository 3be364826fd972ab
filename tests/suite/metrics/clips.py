"""Real clips for the tests of the metrics, ways to spoil them, and which tests need which weights."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from suite.clips import fit, packaged_clip, read_frames, to_unit
from suite.metrics import unavailable


def needs(*metrics: str) -> pytest.MarkDecorator:
    """Skips a test by the name of the metric whose weights are missing, and says how to get them."""
    missing = unavailable(metrics)
    return pytest.mark.skipif(bool(missing), reason="; ".join(f"{name}: {how}" for name, how in missing.items()))


def real_clip(name: str, frames: int, height: int, width: int, start: int = 0) -> Tensor:
    """[3, frames, height, width] of a packaged clip."""
    return fit(to_unit(read_frames(packaged_clip(name), frames, start)), height, width)


def blurred(video: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of every frame, standard deviation in pixels; the last two axes are the picture's."""
    sigmas = (0.0,) * (video.ndim - 2) + (sigma, sigma)
    return torch.from_numpy(gaussian_filter(video.numpy(), sigmas))


def noisy(video: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Independent noise on every pixel of every frame."""
    return video + deviation * torch.randn(video.shape, generator=torch.Generator().manual_seed(seed))
