"""What a reverse sweep starts from: the adjoints of the frames, scaled where they are float16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chopgrad.offload import OffloadBuffer

# In float16 a sweep's adjoints are scaled so that the largest is below 2 and their sum below this: the sum, because the
# gradient of a bias is one, and 65504 is the largest number.
LARGEST_SUM = 2.0**12


class FrameAdjoints:
    """dL/dx_i of frame groups i, [batch, 3, frames of the group, H, W] each; they wait where the states wait.

    Args:
        host: where that is.
        half: the decoder computes in float16.
    """

    def __init__(self, host: OffloadBuffer, half: bool) -> None:
        self._host, self._half = host, half
        self._waiting: dict[int, Any] = {}
        self._sizes: dict[int, Tensor] = {}
        """In float16: largest entry and sum of magnitudes."""

    def add(self, i: int, adjoint: Tensor) -> None:
        if self._half:
            adjoint = adjoint.float()  # what is too small for float16 now may be large enough when it is scaled
        if i in self._waiting:
            adjoint = adjoint + self._host.get(self._waiting[i])
        if self._half:
            magnitude = adjoint.abs()
            self._sizes[i] = torch.stack([magnitude.max(), magnitude.sum()])
        self._waiting[i] = self._host.put(adjoint)

    def get(self, i: int, scale: Tensor | None) -> Tensor | None:
        if i not in self._waiting:
            return None
        adjoint = self._host.get(self._waiting[i])
        return adjoint if scale is None else adjoint * scale

    def drop(self, i: int) -> None:
        self._waiting.pop(i, None)
        self._sizes.pop(i, None)

    def scale(self, first: int, last: int) -> Tensor | None:
        """In float16 the power of two for a sweep over groups first .. last."""
        sizes = [size for i, size in self._sizes.items() if first <= i <= last]
        if not sizes:
            return None
        largest, sums = torch.stack(sizes).unbind(1)
        headroom = torch.minimum(1 / largest.max(), LARGEST_SUM / sums.sum())
        # Infinite where all adjoints are zero, zero where one is infinite.
        return torch.exp2(torch.floor(torch.log2(headroom)).nan_to_num(0.0).clamp(-100, 100))


def unscaled(x: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """The true gradient; in float32 after float16, whose range it may need to leave."""
    return x if x is None or scale is None else x.float() / scale


def computes_in_float16(latents: Tensor) -> bool:
    kind = latents.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == torch.float16
    return latents.dtype == torch.float16
