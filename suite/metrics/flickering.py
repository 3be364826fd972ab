"""Temporal flickering (VBench, Huang et al. 2024), at most 1, higher is better.

    flickering = 1 - mean over neighbouring frames, pixels and channels of |V_{t+1} - V_t| / 255,    V in 0 .. 255

It looks at the restored video alone. It says "flickering", yet VBench prints one minus it, so a frozen video gets 1.
VBench uses it on static scenes: where things move, motion lowers it and blur raises it, so read it beside the
target's own value, ``score(target, target, ["flickering"])``. Frames are not rounded to 8 bits.
"""

from __future__ import annotations

from torch import Tensor


def flickering(restored: Tensor, target: Tensor) -> Tensor:
    """Flickering score of each video [batch, 3, frames, H, W] in [-1, 1]: [batch]; ``target`` is not read.

    Raises:
        ValueError: a single frame.
    """
    if restored.shape[2] < 2:
        raise ValueError("Temporal flickering compares neighbouring frames: pass at least 2 frames, got 1.")
    restored = restored.double()
    step = (restored[:, :, 1:] - restored[:, :, :-1]).abs().mean((1, 2, 3, 4))
    return (1 - step / 2).cpu()  # [-1, 1] is 2 wide
