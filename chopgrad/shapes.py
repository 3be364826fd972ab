"""Tensors that have shapes but no data, fast enough to follow a decoder's sweeps in well under a second each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chopgrad.memory import tensors

META = torch.device("meta")


class ShapesOnly(TorchDispatchMode):
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
