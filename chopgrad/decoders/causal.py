"""What a causal convolution looks back at, passed on by hand where upstream keeps it on modules or in dicts."""

from __future__ import annotations

import torch
from torch import Tensor


def with_past(x: Tensor, cached: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Features with the ``length`` frames before them, of which the first group repeats its first frame.

    Args:
        x: [batch, channels, frames, h, w].
        cached: the frames before x, [batch, channels, length, h, w]; None in the first group.
        length: frames of the kernel less one.

    Returns:
        Both, [batch, channels, length + frames, h, w], and the last ``length`` frames for the next group.
    """
    before = x[:, :, :1].expand(-1, -1, length, -1, -1) if cached is None else cached
    x = torch.cat([before, x], dim=2)
    return x, x[:, :, x.shape[2] - length :].clone()  # a copy, so that the rest of x is not kept alive
