"""A group norm whose statistics are put together from those of strips of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chopgrad.pieces.plain import is_casting


def statistics(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mean and variance of each group of channels, [2, batch, groups], in float32 or better.

    Args:
        x: [batch, channels, frames, rows, width]; copied to that precision frame by frame.
    """
    return _Statistics.apply(x, norm.num_groups)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        parts = []
        for frame in x.split(1, dim=2):
            variance, mean = torch.var_mean(_grouped(frame, groups), dim=-1, correction=0)
            parts.append(torch.stack([mean, variance]))
        pooled = pool(parts, [1] * len(parts))
        ctx.save_for_backward(x, pooled)
        return pooled

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None]:
        x, (mean, _) = ctx.saved_tensors
        count = x.numel() // mean.numel()
        of_mean, of_variance = (y[..., None] / count for y in adjoint)
        result = torch.empty_like(x)
        for frame, into in zip(x.split(1, dim=2), result.split(1, dim=2), strict=True):
            gradient = (_grouped(frame, mean.shape[1]) - mean[..., None]).mul_(2 * of_variance).add_(of_mean)
            into.copy_(gradient.view(frame.shape))
        return result, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)


def pool(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """The statistics of all rows; as exact as those of the parts, whatever the mean."""
    shares = torch.tensor(rows, dtype=parts[0].dtype, device=parts[0].device) / sum(rows)
    means, variances = torch.stack([*parts]).unbind(1)
    shares = shares.view(-1, 1, 1)
    mean = (shares * means).sum(0)
    return torch.stack([mean, (shares * (variances + (means - mean).square())).sum(0)])


def normalized(norm: nn.GroupNorm, x: Tensor, of_all: Tensor) -> Tensor:
    """Some rows of what the norm makes, [batch, channels, frames, rows, width]."""
    mean, variance = (s.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) for s in of_all)
    factor = (variance + norm.eps).rsqrt()
    shift = -mean * factor
    if norm.affine:
        factor, shift = factor * norm.weight, shift * norm.weight + norm.bias
    factor, shift = (s[:, :, None, None, None] for s in (factor, shift))
    y = torch.addcmul(shift, x.to(shift.dtype), factor)
    # Autocast runs norms in float32 and leaves their output so.
    return y if is_casting(x) else y.to(x.dtype)
