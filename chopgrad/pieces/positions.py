"""A norm that treats each position alone, and SiLU, run part by part: a graph keeps their input and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import copy
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad.autocast import Autocast
from chopgrad.graph import without_hooks
from chopgrad.pieces.plain import HOOKS, is_batched, is_ordinary

PARTS = 16
"""How many, about: what the norm makes on the way is up to ten parts large."""
SMALLEST = 2**18
"""Numbers in a part at least; smaller ones cost more calls than they save memory."""


def normed_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """``silu(norm(x))``, in the backward pass run again; in memory for x, the result, and what one part needs.

    Args:
        norm: of [batch, channels, frames, h, w], with a result of the same shape. It treats rows alone, so that parts
            of x give parts of the result, and has no hooks.
    """
    parameters = list(norm.parameters())
    if not is_ordinary(x, *parameters) or list(norm.children()):
        return F.silu(norm(x))
    if not torch.is_grad_enabled():
        return _forward(norm, x)
    return _NormedSiLU.apply(_with(norm, {}), x, *parameters)


def _with(norm: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """A copy with these in place of its parameters: before the backward pass the module may get others, or a hook."""
    twin = copy(norm)
    twin._parameters = dict(norm._parameters) | parameters
    for kind in HOOKS:
        setattr(twin, kind, OrderedDict())
    return twin


def parts(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Of [batch, channels, frames, h, w]: some rows of a frame each."""
    frames, height = x.shape[2:4]
    count = max(1, min(ceil(PARTS / frames), x.numel() // (frames * SMALLEST), height))
    rows = ceil(height / count)
    places = [(t, top) for t in range(frames) for top in range(0, height, rows)]
    if x.is_meta:  # memory is being predicted: the first few stand for all
        places = places[:3]
    for t, top in places:
        yield slice(None), slice(None), slice(t, t + 1), slice(top, top + rows)


def _forward(norm: nn.Module, x: Tensor) -> Tensor:
    y = None
    for part in parts(x):
        of_part = norm(_alone(x, part))
        if y is None:
            y = torch.empty_like(x, dtype=of_part.dtype)  # another than x's under autocast
        y[part] = of_part
        del of_part  # before the next is made
    assert y is not None
    return F.silu(y, inplace=True)  # of the whole: on a CPU the last few numbers of a tensor are rounded another way


def _alone(x: Tensor, part: tuple[slice, ...]) -> Tensor:
    """A part in the order of the whole, so that kernels add it up in the same way."""
    return x[part].contiguous() if x.is_contiguous() else x[part]


class _NormedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: nn.Module, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.norm, ctx.autocast = norm, Autocast.now(x.device.type)
        ctx.save_for_backward(x, *parameters)
        return _forward(norm, x)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient will be differentiated
        sources = [s for s, needed in zip((x, *parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        named = dict(zip((name for name, _ in ctx.norm.named_parameters()), parameters, strict=True))
        with torch.enable_grad(), ctx.autocast.again():
            if again or is_batched(adjoint):
                with without_hooks(sources):
                    y = F.silu(_with(ctx.norm, named)(x))
                    found = torch.autograd.grad(y, sources, adjoint, create_graph=again)
            else:
                found = tuple(_gradients(ctx.norm, named, x, adjoint, ctx.needs_input_grad[1:]))
        given = iter(found)
        return None, *(next(given) if needed else None for needed in ctx.needs_input_grad[1:])


def _gradients(
    norm: nn.Module, named: dict[str, Tensor], x: Tensor, adjoint: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """Of x and of parameters, as far as they are needed."""
    of_x = torch.empty_like(x)
    trained = [name for name, needs in zip(named, needed[1:], strict=True) if needs]
    # What all parts add to is not rounded before it is summed.
    exact = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in named.items()}
    leaves = [exact[name].requires_grad_() for name in trained]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    norm = _with(norm, exact if trained else {name: p.detach() for name, p in named.items()})
    for part in parts(x):
        leaf = _alone(x.detach(), part).requires_grad_()
        y = F.silu(norm(leaf))
        of_part, *more = torch.autograd.grad(y, [leaf, *leaves], adjoint[part].to(y.dtype))
        of_x[part] = of_part
        for a, b in zip(sums, more, strict=True):
            a += b
        del leaf, y, of_part, more  # before the next are made
    return [*([of_x] if needed[0] else []), *(a.to(named[n].dtype) for a, n in zip(sums, trained, strict=True))]
