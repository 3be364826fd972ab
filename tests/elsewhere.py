"""A stand-in for a GPU: PyTorch's meta device, made strict about what lies on it and what does not.

On the meta device tensors have shapes and no values, and some of its kernels do not mind tensors from elsewhere. Within
``strict()`` an operation that mixes it with the CPU fails, as it does with CUDA, and what is copied back is random.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chopgrad.memory import tensors
from chopgrad.shapes import ShapesOnly

DEVICE = "meta"
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")
"""Copies, and indices on the CPU, which CUDA takes as well."""


@cache
def _name(func: Any) -> str:
    return str(func._schema.name) + (f".{func._schema.overload_name}" if func._schema.overload_name else "")


class strict(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.shapes = ShapesOnly()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        away = [x for x in given if x.is_meta]
        here = [x for x in given if not x.is_meta and x.ndim]  # scalars may lie anywhere
        name = _name(func)
        if away and here and not name.startswith(MAY_MIX):
            shapes = [[list(x.shape) for x in part] for part in (away, here)]
            raise AssertionError(f"{name} got {shapes[0]} on the device and {shapes[1]} on the CPU")
        if name == "aten::_local_scalar_dense" and away:
            return 1.0 if given[0].is_floating_point() else 1
        if name == "aten::_to_copy" and away and torch.device(kwargs.get("device") or DEVICE).type == "cpu":
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.rand(args[0].shape, generator=self.generator, dtype=torch.float64).to(dtype)
        if away and len(away) == len(given) and torch.device(kwargs.get("device") or DEVICE).type == DEVICE:
            return self.shapes.__torch_dispatch__(func, types, args, kwargs)  # works an operator out once
        return func(*args, **kwargs)
