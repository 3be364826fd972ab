"""Convolutions with frozen weights that do not keep their input.

The gradient of a convolution's input needs the weight and the input's shape. PyTorch keeps the input all the same,
because one formula serves the gradients of both. In a frozen decoder these inputs are about half of all that a graph
keeps. Forward and gradient are PyTorch's own kernels, so that every bit stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpointing

P = ParamSpec("P")
R = TypeVar("R")

_DIMENSIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def lean(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with convolutions in it that keep their input only where the weight's gradient needs it.

    Modules are called as they are, with their hooks and wrappers; what they ask of ``torch.conv2d`` and the like is
    looked at. Compiled code is left alone, also a compiled module inside: the compiler decides itself what is kept.
    """
    if torch.compiler.is_compiling():
        return function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with FrozenConvolutions():
            return function(*args, **kwargs)

    return call


class FrozenConvolutions(TorchFunctionMode):
    """While it is entered, a convolution whose weight requires no gradient saves the weight and not its input.

    A part that is recomputed must save the same both times, and this mode is not entered again for it: so what a
    checkpoint inside runs is left to PyTorch, unless the checkpointed function is ``lean`` itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saving = _saving()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dimensions = None if torch.compiler.is_compiling() else _DIMENSIONS.get(func)
        if dimensions is None or self._saving != _saving():
            return func(*args, **kwargs)
        return _convolution(func, dimensions, *args, **kwargs)


def _saving() -> Any:
    """Tells whether a checkpoint was entered meanwhile: by the hooks that see what a graph saves."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # there is no public way to ask
    if hooks is not None:
        return hooks(False)
    frame, inside = sys._getframe(), 0  # PyTorch 2.6 has not that either: how many of its calls are under way
    while frame.f_back is not None:
        frame = frame.f_back
        inside += frame.f_code.co_filename == checkpointing.__file__
    return inside


def _convolution(
    func: Any,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d`` and the like, whose names of arguments these are."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _gains(tensors) or isinstance(padding, str) or input.ndim != dimensions + 2:
        return func(input, weight, bias, stride, padding, dilation, groups)
    if input.device.type != "meta" and torch.is_autocast_enabled(input.device.type):
        # As autocast would do it below; here, where the graph sees it, because the backward pass runs without autocast.
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, *rest = (x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
        bias = rest[0] if rest else None
    settings = [_each(x, dimensions) for x in (stride, padding, dilation)]
    return _Frozen.apply(func, input, weight, bias, *settings, groups)


def _gains(tensors: tuple[Tensor, ...]) -> bool:
    """Whether there is a graph, in which the weight is a constant, and nothing that only PyTorch's own operator knows:
    subclasses of tensors, transforms of ``torch.func``, tangents of forward mode.
    """
    x, weight, *bias = tensors
    return (
        not weight.requires_grad
        and any(y.requires_grad for y in (x, *bias))
        and torch.is_grad_enabled()
        and all(type(y) in (Tensor, nn.Parameter, FakeTensor) for y in tensors)
        and not torch._C._are_functorch_transforms_active()
        and all(forward_ad.unpack_dual(y).tangent is None for y in tensors)
    )


def _each(x: Any, dimensions: int) -> list[int]:
    values = [x] if isinstance(x, int) else list(x)
    return values * dimensions if len(values) == 1 else values


class _Frozen(torch.autograd.Function):
    """A convolution; its backward pass is an operator that can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
        groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)  # with the check that nobody changes it meanwhile
        ctx.shape, ctx.bias_shape = x.shape, None if bias is None else bias.shape
        ctx.settings = stride, padding, dilation, False, [0] * len(stride), groups
        order = _CHANNELS_LAST.get(len(stride))
        ordered = order is not None and x.is_contiguous(memory_format=order) and not x.is_contiguous()
        ctx.order = order if ordered else None
        return func(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        like_input = weight.new_empty(()).expand(ctx.shape)  # of which only the shape is read
        if ctx.order is not None:
            weight = weight.contiguous(memory_format=ctx.order)  # the kernels' order is the weight's or the input's
        wanted = [ctx.needs_input_grad[1], False, ctx.needs_input_grad[3]]
        of_input, _, of_bias = torch.ops.aten.convolution_backward(
            adjoint, like_input, weight, ctx.bias_shape, *ctx.settings, wanted
        )
        return None, of_input, None, of_bias, None, None, None, None
