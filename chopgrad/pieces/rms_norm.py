"""Wan's norm over channels and SiLU: a graph keeps their input and nothing else, and few passes over memory are made.

The norm is worked out in float32 where x is of lower precision. Its modules copy x for that; here each operator reads
what there is and writes what is wanted, and the result is theirs to the bit. With its copies the norm would take more
time on a GPU than the convolutions do.
"""

from __future__ import annotations

import ast
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from math import ceil
from textwrap import dedent
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad.autocast import Autocast
from chopgrad.graph import without_hooks
from chopgrad.pieces.plain import HOOKS, is_batched, is_casting, is_ordinary, is_plain

NORMS = ("WanRMS_norm", "QwenImageRMS_norm", "RMS_norm")
"""Classes of diffusers, and of the original repositories and their forks; all ``normalize(x) * scale * gamma + bias``.
"""
FORMULA = "F.normalize(x, dim=1 if self.channel_first else -1) * self.scale * self.gamma + self.bias"
"""What the original code and its forks return."""
SHORTEST = 1e-12
"""Of a length, as ``torch.nn.functional.normalize`` has it."""
PARTS = 12
"""How many the gradient is made in, about: on the way it needs up to two copies of a part in float32."""
SMALLEST = 2**19
"""Numbers in a part at least; smaller ones cost more calls than they save memory."""


def normed_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """``silu(norm(x))``, in the backward pass worked out again; in memory for x and the result.

    Args:
        norm: ``takes`` it.
        x: [batch, channels, frames, H, W].
    """
    parameters = list(norm.parameters())
    if not is_ordinary(x, *parameters) or not x.is_floating_point() or not x.numel():
        return F.silu(norm(x))
    if not torch.is_grad_enabled():
        return F.silu(_Normed.of(norm, x).inner, inplace=True)
    return _NormedSiLU.apply(_with(norm, {}), x, *parameters)


def takes(norm: Any) -> bool:
    """Whether it is such a norm over dimension 1, with its own forward and without hooks, whose tensors are parameters:
    of others the gradient would be lost.
    """
    if not is_plain(norm, NORMS) or not getattr(norm, "channel_first", False) or exact_dtype(norm) is None:
        return False
    held = [x for x in (norm.gamma, norm.bias) if isinstance(x, Tensor)]
    return len({id(x) for x in held} & {id(x) for x in norm._parameters.values()}) == len(held)


def _with(norm: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """A copy with these in place of its parameters: before the backward pass the module may get others, or a hook."""
    twin = copy(norm)
    twin._parameters = dict(norm._parameters) | parameters
    for kind in HOOKS:
        setattr(twin, kind, OrderedDict())
    return twin


class Precision(NamedTuple):
    """Of what the modules make on the way.

    Attributes:
        exact: in which x is normalised.
        kept: to which the result is rounded.
    """

    exact: torch.dtype
    kept: torch.dtype

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor, casting: bool) -> Precision:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return cls(x.dtype, x.dtype)
        if exact_dtype(norm) is torch.float32:
            return cls(torch.float32, x.dtype)
        return cls(torch.float32, torch.float32) if casting else cls(x.dtype, x.dtype)


def exact_dtype(norm: nn.Module) -> torch.dtype | None:
    """In which its class normalises bfloat16: diffusers in float32 since 0.37, the original code in bfloat16.

    None where it may compute something else than we do: there are forks, and a name is no promise.
    """
    kind: Any = type(norm)
    return _exact_dtype(kind)


@cache
def _exact_dtype(kind: Any) -> torch.dtype | None:
    """By what is written in its forward."""
    try:
        source = dedent(inspect.getsource(kind.forward))
        (function,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if kind.__module__.startswith("diffusers."):
        return torch.float32 if "float()" in source else torch.bfloat16
    if kind.forward.__globals__.get("F") is not F or not isinstance(function, ast.FunctionDef):
        return None
    *before, last = function.body
    known = ast.dump(ast.parse(FORMULA, mode="eval").body)
    same = not before and isinstance(last, ast.Return) and last.value is not None and ast.dump(last.value) == known
    return torch.bfloat16 if same else None


class _Normed(NamedTuple):
    """The norm of x on the way to its result.

    Attributes:
        length: over channels, and no shorter than ``SHORTEST``.
        unit: x / length * scale.
        inner: the result.
    """

    length: Tensor
    unit: Tensor
    inner: Tensor

    @classmethod
    def of(cls, norm: Any, x: Tensor, precision: Precision | None = None, in_place: bool = True) -> _Normed:
        """Args:
        precision: None: that of the module under the present autocast.
        in_place: ``unit`` is not wanted, and ``inner`` may take its memory.
        """
        exact, kept = precision or Precision.of(norm, x, is_casting(x))
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=exact).clamp_min_(SHORTEST)
        unit = torch.empty_like(x, dtype=kept)
        torch.div(x, length, out=unit)
        unit *= norm.scale
        inner = unit
        for parameter, combine, combine_in_place in (
            (norm.gamma, torch.mul, Tensor.mul_),
            (norm.bias, torch.add, Tensor.add_),
        ):
            if isinstance(parameter, Tensor):
                fits = torch.result_type(inner, parameter) == inner.dtype and (in_place or inner is not unit)
                inner = (combine_in_place if fits else combine)(inner, parameter)
        return cls(length, unit, inner)


class _NormedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: nn.Module, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.norm, ctx.autocast = norm, Autocast.now(x.device.type)
        ctx.precision = Precision.of(norm, x, is_casting(x))
        ctx.save_for_backward(x, *parameters)
        return F.silu(_Normed.of(norm, x, ctx.precision).inner, inplace=True)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        named = dict(zip((name for name, _ in ctx.norm.named_parameters()), parameters, strict=True))
        norm = _with(ctx.norm, named)
        again = torch.is_grad_enabled()
        if not again and not is_batched(adjoint):
            wanted = dict(zip(("x", *named), needed, strict=True))
            return None, *_gradients(norm, x, adjoint, wanted, ctx.precision)
        # The gradient will be differentiated, or there are several.
        sources = [s for s, needs in zip((x, *parameters), needed, strict=True) if needs]
        with torch.enable_grad(), ctx.autocast.again(), without_hooks(sources):
            found = iter(torch.autograd.grad(F.silu(norm(x)), sources, adjoint, create_graph=again))
        return None, *(next(found) if needs else None for needs in needed)


def _gradients(
    norm: Any, x: Tensor, adjoint: Tensor, needed: dict[str, bool], precision: Precision
) -> Sequence[Tensor | None]:
    """Of x, and of parameters in their order, as far as they are needed."""
    length, unit, inner = _Normed.of(norm, x, precision, in_place=not needed.get("gamma"))
    of_inner = torch.ops.aten.silu_backward.grad_input(adjoint, inner, grad_input=inner)
    sums = _sums(of_inner, unit, needed)
    of_unit = of_inner.mul_(norm.gamma).to(unit.dtype).mul_(norm.scale)
    del inner, of_inner, unit
    found = {name: s.to(getattr(norm, name).dtype).view_as(getattr(norm, name)) for name, s in sums.items()}
    if needed["x"]:
        found["x"] = _of_normalised(x, length, of_unit)
    return [found.get(name) for name in needed]


def _sums(of_inner: Tensor, unit: Tensor, needed: dict[str, bool]) -> dict[str, Tensor]:
    """Of the parameters, added up in float32 or better."""
    found: dict[str, Tensor] = {}
    for name in ("gamma", "bias"):
        if needed.get(name):
            exact = torch.promote_types(of_inner.dtype, torch.float32)
            found[name] = torch.zeros(of_inner.shape[1], dtype=exact, device=of_inner.device)
            for part in parts(of_inner):
                here = of_inner[part].to(exact)
                found[name] += (here * unit[part] if name == "gamma" else here).sum((0, 2, 3, 4))
    return found


def _of_normalised(x: Tensor, length: Tensor, adjoint: Tensor) -> Tensor:
    """Gradient of x from that of x / length, whose memory it takes."""
    of_x = adjoint if adjoint.dtype == x.dtype else torch.empty_like(x)
    for part in parts(x):
        # In float32 or better: half precision has no room for such products.
        exact = torch.promote_types(length.dtype, torch.float32)
        of_part, here, along = adjoint[part].to(exact), x[part], length[part].to(exact)
        product = of_part * here
        # Where the length is the shortest it is a constant.
        slope = (product.sum(1, keepdim=True) / along / along / along).masked_fill_(along <= SHORTEST, 0)
        torch.mul(here, slope, out=product)
        torch.sub(of_part.div_(along), product, out=of_x[part])
    return of_x


def parts(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Of [batch, channels, frames, H, W]: some rows of a frame each, or some frames."""
    every = slice(None)
    frames, height = x.shape[2:4]
    count = max(1, min(PARTS, x.numel() // SMALLEST, frames * height))
    if count <= frames:
        each, rows = ceil(frames / count), height
    else:
        each, rows = 1, ceil(height / (count // frames))
    places = [(t, top) for t in range(0, frames, each) for top in range(0, height, rows)]
    for t, top in places[:2] if x.is_meta else places:  # memory is being predicted: the first two stand for all
        yield every, every, slice(t, t + each), slice(top, top + rows)
