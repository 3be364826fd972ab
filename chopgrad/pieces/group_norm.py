"""A norm over groups of channels, scaled and shifted by the latents, and SiLU: a graph keeps their input only.

``silu(group_norm(x) * scale + shift)``. CogVideoX and K-VAE make scale and shift by 1x1x1 convolutions of the latents
repeated to the size of x. These commute with repeating: here they are run on the latents as they are, and each part of
x is scaled by its latents without a repeated copy. Statistics are those of PyTorch's own norm; in the backward pass the
rest is worked out again, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad.graph import without_hooks
from chopgrad.pieces.plain import is_batched, is_casting, is_ordinary, is_plain

PARTS = 16
"""How many, about: what is made of a part on the way is up to ten times as large."""
SMALLEST = 2**18
"""Numbers in a part at least; smaller ones cost more calls than they save memory."""


class Part(NamedTuple):
    """A part of the features, and of the latents that scale it."""

    of_x: tuple[slice, ...]
    of_z: tuple[slice, ...]
    across: int
    """Columns of the features for each of the latents; as many rows."""


def takes(norm: Any, x: Tensor, z: Tensor, frames: Sequence[int] | None) -> bool:
    """Whether ``normed_silu`` may stand for this norm and what is around it; if not, the modules are to be called.

    Args:
        norm: a ``GroupNorm``.
        x, z: features and latents, of which scale and shift are made; ordinary and of the norm's dtype.
        frames: see ``normed_silu``.
    """
    if frames is None or not is_plain(norm, ("GroupNorm",)) or {"weight", "bias"} - {*norm._parameters}:
        return False
    if norm.weight is None:
        return False
    if not is_ordinary(x, z, norm.weight, norm.bias) or not x.numel():
        return False
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return False  # for which PyTorch's norm has another kernel
    across = x.shape[4] // z.shape[4]
    fits = tuple(x.shape[2:]) == (sum(frames), z.shape[3] * across, z.shape[4] * across)
    return fits and not is_casting(x) and x.dtype == z.dtype == norm.weight.dtype


def normed_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor, frames: Sequence[int]) -> Tensor:
    """``silu(norm(x) * scale + shift)``, where ``takes``.

    Args:
        x: [batch, channels, frames, H, W].
        scale, shift: [batch, channels, latent_frames, h, w]; H and W are the same multiple of h and w.
        frames: how many frames each latent stands for.
    """
    settings = norm.num_groups, norm.eps, tuple(frames)
    if not torch.is_grad_enabled():
        return _forward(x, scale, shift, norm.weight, norm.bias, *settings)[0]
    return _NormedSiLU.apply(x, scale, shift, norm.weight, norm.bias, *settings)


def frames_per_latent(frames: int, latents: int, first_alone: bool) -> list[int] | None:
    """How many frames each latent stands for; None where they do not divide evenly.

    Args:
        first_alone: the first latent stands for the first frame only.
    """
    alone = int(first_alone)
    if latents <= alone:
        return [1] if frames == latents else None
    each, rest = divmod(frames - alone, latents - alone)
    return None if rest or not each else [1] * alone + [each] * (latents - alone)


def spread(z: Tensor, like: Tensor, frames: Sequence[int]) -> Tensor:
    """Latents repeated to the size of features."""
    counts = torch.tensor(frames, device=z.device)
    z = z.repeat_interleave(counts, dim=2, output_size=like.shape[2])
    across = like.shape[4] // z.shape[4]
    return z.repeat_interleave(across, dim=3).repeat_interleave(across, dim=4)


def _parts(x: Tensor, scale: Tensor, frames: Sequence[int]) -> Iterator[Part]:
    across, height = x.shape[4] // scale.shape[4], scale.shape[3]
    every = slice(None)
    begin = 0
    for latent, length in enumerate(frames):
        each = x.numel() // x.shape[2] * length
        count = max(1, min(ceil(PARTS / len(frames)), each // SMALLEST, height))
        rows = ceil(height / count)
        for top in range(0, height, rows):
            end = min(top + rows, height)
            yield Part(
                (every, every, slice(begin, begin + length), slice(top * across, end * across)),
                (every, every, slice(latent, latent + 1), slice(top, end)),
                across,
            )
            if x.is_meta:  # memory is being predicted: the first stands for all
                return
        begin += length


def _blocked(x: Tensor, across: int) -> Tensor:
    """[b, c, t, H, W] as [b, c, t, h, across, w, across]: what one latent scales are the dimensions 2, 4 and 6."""
    return x.unflatten(4, (-1, across)).unflatten(3, (-1, across))


def _of_latents(z: Tensor) -> Tensor:
    return z[:, :, :, :, None, :, None]


def _forward(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
    frames: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and mean and one over the standard deviation, [batch, groups] each, in the precision of x."""
    batch, channels = x.shape[:2]
    y, mean, inverse = torch.native_group_norm(
        x.contiguous(), weight, bias, batch, channels, x.numel() // (batch * channels), groups, eps
    )
    for part in _parts(x, scale, frames):
        block = _blocked(y[part.of_x], part.across)
        block.mul_(_of_latents(scale[part.of_z])).add_(_of_latents(shift[part.of_z]))
    return F.silu(y, inplace=True), mean, inverse


class _NormedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
        frames: Sequence[int],
    ) -> Tensor:  # fmt: skip
        y, mean, inverse = _forward(x, scale, shift, weight, bias, groups, eps, frames)
        ctx.save_for_backward(x, scale, shift, weight, bias, mean, inverse)
        ctx.groups, ctx.eps, ctx.frames = groups, eps, frames
        return y

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mean, inverse = ctx.saved_tensors
        if mean.dtype not in (torch.float32, torch.float64):
            mean, inverse = _statistics(inputs[0], ctx.groups, ctx.eps)
        if torch.is_grad_enabled() or is_batched(adjoint):
            # The gradient will be differentiated, or there are several.
            found = _differentiable(inputs, adjoint, ctx)
        else:
            found = _gradients(inputs, mean, inverse, adjoint, ctx)
        return *found, None, None, None


def moments(x: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and variance, [batch, groups] each, of some groups after the other, in float32 or better."""
    grouped = x.reshape(len(x), groups, -1)
    each = max(1, groups // PARTS, min(groups, groups * SMALLEST // max(1, x.numel())))
    for part in grouped.split(each, dim=1):
        variance, mean = torch.var_mean(part.to(torch.promote_types(x.dtype, torch.float32)), dim=2, correction=0)
        yield mean, variance


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and one over the standard deviation, [batch * groups] each, in float32.

    PyTorch's norm works in float32 and hands these out in the precision of x, too coarse to work its result out again.
    """
    mean, variance = (torch.cat(each, dim=1).flatten() for each in zip(*moments(x, groups), strict=True))
    return mean, (variance + eps).rsqrt()


def _differentiable(inputs: Sequence[Tensor], adjoint: Tensor, ctx: Any) -> list[Tensor | None]:
    x, scale, shift, weight, bias = inputs
    sources = [s for s, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_hooks(sources):
        y = F.group_norm(x, ctx.groups, weight, bias, ctx.eps)
        y = F.silu(y * spread(scale, x, ctx.frames) + spread(shift, x, ctx.frames))
        found = iter(torch.autograd.grad(y, sources, adjoint, create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


def _gradients(
    inputs: Sequence[Tensor], mean: Tensor, inverse: Tensor, adjoint: Tensor, ctx: Any
) -> list[Tensor | None]:
    """By parts: first the adjoint of the norm's result and what is summed over all, then with these sums the rest."""
    x, scale, shift, weight, bias = inputs
    batch, channels, groups = x.shape[0], x.shape[1], ctx.groups
    exact = torch.promote_types(x.dtype, torch.float32)

    def each(z: Tensor) -> Tensor:
        """[batch, channels] beside blocks of x."""
        return z.to(exact).reshape(-1, channels, 1, 1, 1, 1, 1)

    per_channel = [s.reshape(batch, groups).repeat_interleave(channels // groups, dim=1) for s in (mean, inverse)]
    centre, inverse = (each(s) for s in per_channel)
    of_x = torch.empty_like(x)
    of_scale, of_shift = (torch.empty_like(z, dtype=exact) for z in (scale, shift))
    of_normed = [torch.zeros(batch, channels, dtype=exact, device=x.device) for _ in range(2)]
    for part in _parts(x, scale, ctx.frames):
        block = _blocked(x[part.of_x], part.across).to(exact)
        unit = (block - centre) * inverse
        normed = unit * each(weight) + each(bias)
        by = _of_latents(scale[part.of_z]).to(exact)
        inner = normed * by + _of_latents(shift[part.of_z]).to(exact)
        of_inner = torch.ops.aten.silu_backward(_blocked(adjoint[part.of_x], part.across).to(exact), inner)
        del block, inner
        of_scale[part.of_z] = (of_inner * normed).sum((2, 4, 6)).unsqueeze(2)
        of_shift[part.of_z] = of_inner.sum((2, 4, 6)).unsqueeze(2)
        del normed
        of_inner = of_inner.mul_(by)
        of_normed[0] += of_inner.sum((2, 3, 4, 5, 6))
        of_normed[1] += unit.mul_(of_inner).sum((2, 3, 4, 5, 6))
        _blocked(of_x[part.of_x], part.across).copy_(of_inner)
        del of_inner, unit
    count = x.numel() // (batch * groups)
    offset, slope = (
        each((s * weight.to(exact)).reshape(batch, groups, -1).sum(2).repeat_interleave(channels // groups, dim=1))
        / count
        for s in of_normed
    )
    for part in _parts(x, scale, ctx.frames):
        block = _blocked(x[part.of_x], part.across).to(exact)
        unit = block.sub(centre).mul_(inverse)
        place = _blocked(of_x[part.of_x], part.across)
        place.copy_((place.to(exact) * each(weight)).sub_(offset).sub_(unit.mul_(slope)).mul_(inverse))
        del block, unit
    found = [of_x, of_scale, of_shift, of_normed[1].sum(0), of_normed[0].sum(0)]
    return [
        g.to(s.dtype) if needed else None for g, s, needed in zip(found, inputs, ctx.needs_input_grad, strict=False)
    ]
