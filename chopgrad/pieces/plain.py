"""Whether a module may be stood in for: what it computes is known, and nothing was put around it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks_of_all

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: Any, names: Collection[str]) -> bool:
    """Whether it is of a class of one of these names, with the class's own forward and without hooks.

    A wrapper (LoRA, parametrizations) is of another class; offloading and casting by layers set a forward or a hook.
    """
    if torch.compiler.is_compiling():
        return False  # the compiler decides itself what is kept
    cls = type(module)
    if cls.__name__ not in names or "forward" in vars(module) or getattr(module, "_compiled_call_impl", None):
        return False
    if has_hook(module) or any(getattr(hooks_of_all, f"_global{kind}", None) for kind in _HOOKS):
        return False
    # A forward that somebody put on the class has another name, or comes from elsewhere.
    definer = next(c for c in cls.__mro__ if "forward" in vars(c))
    forward = vars(definer)["forward"]
    own = f"{definer.__qualname__}.forward", definer.__module__
    return (getattr(forward, "__qualname__", None), getattr(forward, "__module__", None)) == own


def has_hook(module: Any) -> bool:
    """Whether somebody put a hook on this very module."""
    return any(getattr(module, kind, None) for kind in _HOOKS)


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether a function of ours may take the place of PyTorch's operators: none of its compilers or transforms is at
    work, and these are ordinary tensors without tangents.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        x is None or (type(x) in (Tensor, nn.Parameter, FakeTensor) and forward_ad.unpack_dual(x).tangent is None)
        for x in tensors
    )
