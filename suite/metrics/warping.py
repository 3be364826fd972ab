"""Warping error (Lai et al. 2018), squared intensity on [0, 1], lower is better.

    E(V) = mean over t of  sum_x M_t(x) |V_{t+1}(x + F_t(x)) - V_t(x)|^2 / (3 sum_x M_t(x))

F_t is the optical flow of the *target* from frame t to t+1, M_t marks what is visible in both frames (``flow.py``).
All methods are judged along the same motion; what is left for the target itself is the error of flow and resampling:
print ``score(target, target, ["warping-error"])`` beside it. Blur lowers it, as it lowers every temporal difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suite.metrics.flow import Motion, motion_of, warp
from suite.metrics.frames import unit_range


def warping_error(restored: Tensor, target: Tensor) -> Tensor:
    """Warping error of each video [batch, 3, frames, H, W] in [-1, 1]: [batch].

    Frame pairs without a visible pixel do not count; NaN if there is no other (cuts between all frames).

    Raises:
        ValueError: a single frame.

    Cost: two optical flows per frame pair of the target, on the CPU; see ``flow.motion_of``.
    """
    if restored.shape[2] < 2:
        raise ValueError("The warping error compares neighbouring frames: pass at least 2 frames, got 1.")
    return torch.stack([_error(video, motion_of(truth)) for video, truth in zip(restored, target, strict=True)])


def _error(video: Tensor, motion: Motion) -> Tensor:
    frames = unit_range(video.double().cpu()).transpose(0, 1)
    difference = (warp(frames[1:], motion.flow.double()) - frames[:-1]).square().mean(1)
    seen = motion.visible.sum((1, 2))
    return ((difference * motion.visible).sum((1, 2)) / seen)[seen > 0].mean()
