"""CogVideoX's norm and SiLU for some rows, with statistics that are put together from those of strips of rows.

As in ``chopgrad.pieces.group_norm`` a graph keeps the input only. There scale and shift of the latents are applied
block by block; here a strip may begin between two rows of the latents, so these are spread, a latent at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chopgrad.graph import without_hooks
from chopgrad.pieces.group_norm import SMALLEST, moments
from chopgrad.pieces.plain import is_batched, is_casting, is_ordinary


def statistics(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mean and variance of each group of channels, [2, batch, groups], in float32 or better.

    Args:
        x: [batch, channels, frames, rows, width]; copied to that precision some groups at a time.
    """
    return _Statistics.apply(x, norm.num_groups)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        found = torch.stack([torch.cat(each, dim=1) for each in zip(*moments(x, groups), strict=True)])
        ctx.save_for_backward(x, found)
        return found

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None]:
        x, (mean, _) = ctx.saved_tensors
        groups = mean.shape[1]
        x = x.reshape(len(x), groups, -1)
        of_mean, of_variance = (y[..., None] / x.shape[2] for y in adjoint)
        result = torch.empty_like(x)
        for k in range(groups):
            here = slice(k, k + 1)
            of_part = (x[:, here] - mean[:, here, None]).mul_(2 * of_variance[:, here]).add_(of_mean[:, here])
            result[:, here] = of_part
        return result.view(ctx.saved_tensors[0].shape), None


def pool(parts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """The statistics of all rows; as exact as those of the parts, whatever the mean."""
    shares = torch.tensor(rows, dtype=parts[0].dtype, device=parts[0].device) / sum(rows)
    means, variances = torch.stack([*parts]).unbind(1)
    shares = shares.view(-1, 1, 1)
    mean = (shares * means).sum(0)
    return torch.stack([mean, (shares * (variances + (means - mean).square())).sum(0)])


class Rows(NamedTuple):
    """Which rows these are.

    Attributes:
        frames: how many frames each latent stands for.
        factor: rows, and columns, for each of the latents.
        top: of the rows that the first row of the latents is spread to, the one that is the first here.
    """

    frames: tuple[int, ...]
    factor: int
    top: int

    def spread(self, z: Tensor, count: int) -> Tensor:
        """[..., h, w] to ``count`` rows of the features."""
        h, w = z.shape[-2:]
        wide = z[..., :, None, :, None].expand(*z.shape[:-2], h, self.factor, w, self.factor)
        return wide.reshape(*z.shape[:-2], h * self.factor, -1)[..., self.top : self.top + count, :]

    def gathered(self, of_spread: Tensor, h: int) -> Tensor:
        """The adjoint of ``spread``."""
        below = h * self.factor - self.top - of_spread.shape[-2]
        padded = F.pad(of_spread, (0, 0, self.top, below))
        return padded.unflatten(-1, (-1, self.factor)).unflatten(-3, (h, self.factor)).sum((-1, -3))


def normed_silu(norm: nn.GroupNorm, x: Tensor, of_all: Tensor, scale: Tensor, shift: Tensor, rows: Rows) -> Tensor:
    """``silu(norm(x) * scale + shift)`` of some rows.

    Args:
        x: [batch, channels, frames, rows, width].
        of_all: statistics of all rows.
        scale, shift: [batch, channels, latent_frames, h, w], of the latents that these rows lie in.
    """
    given = x, of_all, scale, shift, norm.weight, norm.bias
    same = norm.affine and all(y.dtype == x.dtype for y in (scale, shift, norm.weight, norm.bias))
    if same and is_ordinary(*given) and not is_casting(x):
        return _NormedSiLU.apply(*given, norm.num_groups, norm.eps, rows)
    return by_frames(norm, F.silu, x, of_all, scale, shift, rows)


def by_frames(
    norm: nn.GroupNorm, activation: Any, x: Tensor, of_all: Tensor, scale: Tensor, shift: Tensor, rows: Rows
) -> Tensor:
    """The same with any activation, recomputed frame by frame: no frame needs another any more."""

    def function(x: Tensor, of_all: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        count = x.shape[-2]
        y = normalized(norm, x, of_all) * rows.spread(scale, count) + rows.spread(shift, count)
        return activation(y)

    frames, made = iter(x.split(1, dim=2)), []
    for length, of_latent in zip(rows.frames, zip(scale.split(1, 2), shift.split(1, 2), strict=True), strict=True):
        for _ in range(length):
            given = (next(frames), of_all, *of_latent)
            graded = torch.is_grad_enabled()
            made.append(checkpoint(function, *given, use_reentrant=False) if graded else function(*given))
    return torch.cat(made, dim=2)


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


class _Lines(NamedTuple):
    """What the norm does to each channel: [batch, channels, 1, 1, 1] each, ``(x - mean) * slope + offset``."""

    mean: Tensor
    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, of_all: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> _Lines:
        mean, variance = (s.repeat_interleave(len(weight) // groups, dim=1) for s in of_all)
        slope = (variance + eps).rsqrt() * weight.to(variance.dtype)
        offset = bias.to(variance.dtype).expand_as(slope)
        return cls(*(s[:, :, None, None, None] for s in (mean, slope, offset)))


class _NormedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, of_all: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int,
        eps: float, rows: Rows,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, of_all, scale, shift, weight, bias)
        ctx.groups, ctx.eps, ctx.rows = groups, eps, rows
        lines = _Lines.of(of_all, weight, bias, groups, eps)
        y = torch.empty_like(x)
        for latent, frames in _latents(x, rows.frames):
            by, plus = (rows.spread(z[:, :, latent], x.shape[-2]) for z in (scale, shift))
            for part in frames:
                normed = (x[:, :, part] - lines.mean).mul_(lines.slope).add_(lines.offset)
                y[:, :, part] = normed
                y[:, :, part].mul_(by).add_(plus)
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        inputs, settings = ctx.saved_tensors, (ctx.groups, ctx.eps, ctx.rows)
        again = torch.is_grad_enabled()
        if again or is_batched(adjoint):
            # The gradient will be differentiated, or there are several.
            sources = [s for s, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            with torch.enable_grad(), without_hooks(sources):
                found = iter(torch.autograd.grad(_written(inputs, *settings), sources, adjoint, create_graph=again))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:6]), None, None, None
        return *_gradients(inputs, adjoint, *settings), None, None, None


def _written(inputs: Sequence[Tensor], groups: int, eps: float, rows: Rows) -> Tensor:
    x, of_all, scale, shift, weight, bias = inputs
    lines = _Lines.of(of_all, weight, bias, groups, eps)
    counts = torch.tensor(rows.frames, device=x.device)
    by, plus = (
        rows.spread(z.repeat_interleave(counts, dim=2, output_size=x.shape[2]), x.shape[-2]) for z in (scale, shift)
    )
    return F.silu(((x - lines.mean) * lines.slope + lines.offset).to(x.dtype) * by + plus)


def _gradients(inputs: Sequence[Tensor], adjoint: Tensor, groups: int, eps: float, rows: Rows) -> list[Tensor]:
    """All of them: of latents and statistics little is lost where they are not wanted."""
    x, of_all, scale, shift, weight, bias = inputs
    exact = of_all.dtype
    with torch.enable_grad():
        small = [s.detach().requires_grad_() for s in (of_all, weight, bias)]
        lines = _Lines.of(small[0], small[1], small[2], groups, eps)
    mean, slope, offset = (s.detach() for s in lines)
    of_mean, of_slope, of_offset = (torch.zeros_like(s) for s in (mean, slope, offset))
    of_x = torch.empty_like(x)
    of_scale, of_shift = (torch.empty_like(z, dtype=exact) for z in (scale, shift))
    for latent, frames in _latents(x, rows.frames):
        by, plus = (rows.spread(z[:, :, latent], x.shape[-2]) for z in (scale, shift))
        of_by, of_plus = (torch.zeros_like(z, dtype=exact) for z in (by, plus))
        for part in frames:
            centred = x[:, :, part] - mean
            normed = torch.addcmul(offset, centred, slope)
            inner = torch.addcmul(plus, normed, by)
            of_inner = torch.ops.aten.silu_backward.grad_input(adjoint[:, :, part], inner, grad_input=inner)
            of_plus += of_inner.sum(2, keepdim=True)
            of_by += normed.mul_(of_inner).sum(2, keepdim=True)
            of_normed = of_inner.mul_(by)
            of_offset += of_normed.sum((2, 3, 4), keepdim=True)
            of_slope += centred.mul_(of_normed).sum((2, 3, 4), keepdim=True)
            of_x[:, :, part] = of_normed.mul_(slope)
            of_mean -= of_normed.sum((2, 3, 4), keepdim=True)
            del centred, normed, inner, of_inner, of_normed
        h = scale.shape[-2]
        of_scale[:, :, latent], of_shift[:, :, latent] = rows.gathered(of_by, h), rows.gathered(of_plus, h)
    of_small = torch.autograd.grad(list(lines), small, [of_mean, of_slope, of_offset])
    found = (of_x, of_small[0], of_scale, of_shift, *of_small[1:])
    return [g.to(s.dtype) for g, s in zip(found, inputs, strict=True)]


def _latents(x: Tensor, frames: Sequence[int]) -> Iterator[tuple[slice, list[slice]]]:
    """Each latent, and its frames: together where they are small, else one at a time."""
    begin = 0
    for latent, length in enumerate(frames):
        step = max(1, min(length, SMALLEST * x.shape[2] // max(1, x.numel())))
        end = begin + length
        yield slice(latent, latent + 1), [slice(t, min(t + step, end)) for t in range(begin, end, step)]
        begin = end
