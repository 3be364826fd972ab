"""Whether a module may be stood in for: what it computes is known, and nothing was put around it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks_of_all

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: Any, names: Collection[str]) -> bool:
    """Whether it is of a class of one of these names, with the class's own forward and without hooks.

    A wrapper (LoRA, parametrizations) is of another class; offloading and casting by layers set a forward or a hook.
    """
    if torch.compiler.is_compiling():
        return False  # the compiler decides itself what is kept
    if type(module).__name__ not in names or getattr(module, "_compiled_call_impl", None):
        return False
    return written_forward(module) is not None


def written_forward(module: nn.Module) -> type | None:
    """The class whose forward runs, as it was written there; None where somebody put a hook or a forward of his own on
    the module, on all modules, or on the class.
    """
    if "forward" in vars(module) or has_hook(module):
        return None
    if any(getattr(hooks_of_all, f"_global{kind}", None) for kind in HOOKS):
        return None
    # A forward that somebody put on the class has another name, or comes from elsewhere.
    definer = next(c for c in type(module).__mro__ if "forward" in vars(c))
    forward = vars(definer)["forward"]
    if hasattr(forward, "__wrapped__"):
        return None
    own = f"{definer.__qualname__}.forward", definer.__module__
    return definer if (getattr(forward, "__qualname__", None), getattr(forward, "__module__", None)) == own else None


def has_hook(module: Any) -> bool:
    """Whether somebody put a hook on this very module."""
    return any(getattr(module, kind, None) for kind in HOOKS)


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


def is_batched(adjoint: Tensor) -> bool:
    """Whether it stands for several, as ``is_grads_batched=True`` hands them to a backward pass."""
    functorch: Any = torch._C._functorch
    return functorch.is_batchedtensor(adjoint) or functorch.is_legacy_batchedtensor(adjoint)


_predicted_under = ContextVar("predicted under autocast", default=False)


@contextmanager
def predicted_under(autocast: bool) -> Iterator[None]:
    """While it is entered, tensors without data stand for some under autocast, or not."""
    token = _predicted_under.set(autocast)
    try:
        yield
    finally:
        _predicted_under.reset(token)


def is_casting(x: Tensor) -> bool:
    """Whether autocast is at work where the tensor is."""
    return _predicted_under.get() if x.is_meta else torch.is_autocast_enabled(x.device.type)
