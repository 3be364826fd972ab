"""What frames are compared with, of any form, and the part of it that belongs to one frame group."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from chopgrad.decoders.base import FrameGroup

Target = Any
"""A tensor or array whose third axis is the frames, a pytree of them, None, or a function of a slice of frames."""

FAR_OUTSIDE = 16.0  # frames lie in [-1, 1]; nothing that is meant for them is as large


def check_target(target: Target, batch: int, latent_frames: int, groups: Sequence[FrameGroup]) -> None:
    """Raises:
    ValueError, TypeError: a part of the target has another number of frames, or of videos, than the latents.
    """
    if callable(target):
        return
    frames = groups[-1].frames.stop
    for part in tree_leaves(target):
        shape = getattr(part, "shape", None)
        if shape is None:
            if part is None or isinstance(part, str | bool | int | float | slice):
                continue  # handed on as it is
            raise ValueError(
                f"target must be a tensor or array [batch, channels, frames, ...], a pytree of them, None, or a "
                f"function of the slice of frames; got {type(part).__name__}."
            )
        if len(shape) < 3:
            raise ValueError(
                f"target must have the frames in its third axis, [batch, channels, frames, ...], got {list(shape)}."
            )
        if shape[2] != frames:
            what = "target must be [batch, 3, frames, H, W]" if len(shape) != 5 else f"target has {shape[2]} frames"
            raise ValueError(f"{what}, but {latent_frames} latent frames decode to {frames}; got {list(shape)}.")
        if shape[0] != batch and (part is target or shape[0] != 1):
            raise ValueError(f"target has batch {shape[0]}, but the latents have batch {batch}.")


def target_part(target: Target, at: slice, frames: Tensor) -> Any:
    """The part of the target for a group's frames [batch, 3, frames of the group, H, W].

    Args:
        at: where these frames are in the video.

    A copy, so that the loss may change it, on the frames' device and, where floating point, in their dtype.
    """
    called = callable(target)
    part = target(at) if called else target

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor | np.ndarray):
            return x
        if not called:
            x = x[:, :, at]
        x = torch.as_tensor(x)
        if not x.is_floating_point() and x.dtype != torch.bool and x.shape == frames.shape:
            raise TypeError(
                f"target is {x.dtype}; pass floating point in [-1, 1]. From 8-bit frames: target.float() / 127.5 - 1."
            )
        # A function may fill one pinned buffer again and again, so a copy from it must be over before it returns.
        dtype = frames.dtype if x.is_floating_point() else x.dtype
        return x.to(frames.device, dtype, non_blocking=not called, copy=True)

    part = tree_map(place, part)
    if called and isinstance(part, Tensor) and part.ndim == 5 and part.shape[2] != at.stop - at.start:
        raise ValueError(
            f"target for frames {at.start} to {at.stop - 1} has shape {list(part.shape)}, but "
            f"these are {at.stop - at.start} frames."
        )
    if at.start == 0:
        _tell_range(part, frames)
    return part


def frame_parts(tree: Any, frames: int, at: slice) -> Any:
    """Some of the frames of what has ``frames`` of them in its third axis; other leaves as they are."""

    def cut(x: Any) -> Any:
        return x[:, :, at] if isinstance(x, Tensor) and x.ndim > 2 and x.shape[2] == frames else x

    return tree_map(cut, tree)


def _tell_range(part: Any, frames: Tensor) -> None:
    for x in tree_leaves(part):
        has_values = isinstance(x, Tensor) and not (x.is_meta or isinstance(x, FakeTensor))
        if has_values and x.shape == frames.shape and x.is_floating_point():
            low, high = (v.item() for v in x.detach().aminmax())
            if max(-low, high) > FAR_OUTSIDE:
                warnings.warn(
                    f"The target goes from {low:g} to {high:g}, but frames lie in [-1, 1]. From 0 to 255: "
                    "target / 127.5 - 1.",
                    stacklevel=7,
                )
