"""Tensors that have shapes but no data, fast enough to follow a decoder's sweeps in well under a second each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

from chopgrad.memory import tensors

META = torch.device("meta")


@cache
def fuse_attention() -> Library:
    """From now on attention on meta tensors is PyTorch's memory-efficient kernel, which keeps no matrix of weights.

    On a device PyTorch chooses such a kernel by itself, on meta it writes attention out as products of matrices. This
    kernel takes heads of any size, such as the one of 384 channels in Wan's decoder. Tensors with data are not touched.
    """
    library = Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    return library  # the kernel goes with it


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention``, whose names of arguments these are."""
    heads = [x if x.dim() == 4 else x.view(1, *x.shape) for x in (query, key, value)]
    if enable_gqa:
        heads[1:] = (x.repeat_interleave(heads[0].shape[1] // x.shape[1], dim=1) for x in heads[1:])
    if attn_mask is not None:
        mask = attn_mask if attn_mask.is_floating_point() else torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = mask.expand(*heads[0].shape[:2], query.shape[-2], key.shape[-2])
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in heads)
    y = torch.ops.aten._scaled_dot_product_efficient_attention(
        *heads, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]
    return y.view(*query.shape[:-1], value.shape[-1])


class WithoutData(TorchDispatchMode):
    """What the modes for meta tensors have in common: attention is the kernel that a device would run."""

    def __init__(self) -> None:
        super().__init__()
        fuse_attention()


class ShapesOnly(WithoutData):
    """What runs inside runs on PyTorch's meta device, which plays the device *and* the host: nothing has data.

    What is asked to be on the CPU is made on meta too; ``PeakMemory("meta")``, entered inside, still sees where it was
    to be, and counts it for the host. It comes back by ``copy_`` into a new tensor, as in ``chopgrad.offload``;
    ``.to("meta")`` would find it there already.

    An operator is worked out once for each shape of its arguments. PyTorch writes most shape functions in Python (0.1
    ms and more a call), and sweeps repeat the same few hundred calls thousands of times. ``FakeTensorMode`` gives the
    same bytes and takes about five times as long; unlike it, nothing here checks that what meets is on one device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Callable[[], Any] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": META}
        key = (func, signature(args), signature(tuple(kwargs.items())))
        if key not in self._known:
            out = func(*args, **kwargs)
            self._known[key] = recipe(out, (args, kwargs))
            return out
        again = self._known[key]
        return func(*args, **kwargs) if again is None else again()


def signature(x: Any) -> Any:
    """All that a result's shape can depend on where values are not looked at."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    if isinstance(x, list | tuple):
        return tuple([signature(y) for y in x])
    return type(x), x  # 2, 2.0 and True are equal


def recipe(out: Any, arguments: Any) -> Callable[[], Any] | None:
    """Makes such a result again; None where it is not memory of its own: a view, or an argument changed in place."""
    if isinstance(out, list | tuple):
        parts, kind = [recipe(x, arguments) for x in out], type(out)
        return None if None in parts else lambda: kind([part() for part in parts if part])
    if not isinstance(out, Tensor):  # None is a gradient that was not asked for
        return lambda: out
    storage, shape, stride, dtype = out.untyped_storage(), out.shape, out.stride(), out.dtype

    def again() -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)

    is_whole = storage.nbytes() == again().untyped_storage().nbytes()
    return again if is_whole and all(storage is not x.untyped_storage() for x in tensors(arguments)) else None
