"""Peak signal-to-noise ratio, dB, higher is better.

    PSNR = mean over frames of 10 log10(L^2 / MSE),    L = 2, the range of [-1, 1]

MSE is taken over the three colour channels and all pixels of a frame (RGB, not luma, which usually reads higher). The
mean of the frames' PSNR is what video super-resolution papers print; it is not the PSNR of the mean MSE.
"""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(restored: Tensor, target: Tensor) -> Tensor:
    """PSNR of each video [batch, 3, frames, H, W] in [-1, 1]: [batch], dB.

    A frame without any error makes it infinite: leave out frames that were copied.
    """
    mse = (restored.double() - target.double()).square().mean((1, 3, 4))
    return (10 * torch.log10(4 / mse)).mean(1).cpu()
