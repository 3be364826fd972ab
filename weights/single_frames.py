"""A shortcut for single frames, which most training steps see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.nn import functional as F


@contextlib.contextmanager
def single_frames_as_images() -> Iterator[None]:
    """Evaluate causal 3D convolutions of one uncached frame in 2D: the same result at a third of the work.

    In front of a first frame Wan pads with zeros (only the last temporal slice of the kernel sees the frame) and
    CogVideoX repeats the frame (the slices add up).
    """
    wan, cog = WanCausalConv3d.forward, CogVideoXCausalConv3d.forward

    def wan_forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.stride[0] > 1 or self.kernel_size[0] == 1:
            return wan(self, x, cache_x)
        out = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[2:4])
        return out[:, :, None]

    def cog_forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.shape[2] > 1 or conv_cache is not None or self.time_kernel_size == 1:
            return cog(self, inputs, conv_cache)  # type: ignore
        conv = self.conv
        out = F.conv2d(
            inputs[:, :, 0], conv.weight.sum(2), conv.bias, conv.stride[1:], (self.height_pad, self.width_pad)
        )
        return out[:, :, None], inputs.repeat(1, 1, self.time_kernel_size - 1, 1, 1)

    WanCausalConv3d.forward, CogVideoXCausalConv3d.forward = wan_forward, cog_forward  # type: ignore
    try:
        yield
    finally:
        WanCausalConv3d.forward, CogVideoXCausalConv3d.forward = wan, cog  # type: ignore
