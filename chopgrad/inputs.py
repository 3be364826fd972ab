"""What ``frame_loss``, ``decode`` and ``patch`` are given, checked before any work: one sentence says what to pass."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from chopgrad.own import working_dtype
from chopgrad.recurrence import Group, Recurrence
from chopgrad.strategies import Sampled, Strategy

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_inputs(model: Recurrence, source: Tensor, strategy: Strategy) -> Sequence[Group]:
    """The groups of a source that fits the model."""
    name = model.entering
    are, have = _verbs(name)
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be Full(), Chop(distance=...), Exact() or Sampled(...), got {strategy!r}.")
    if not isinstance(source, Tensor) or source.ndim != 5:
        got = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        image = f" For an image pass {name}.unsqueeze(2)." if isinstance(source, Tensor) and source.ndim == 4 else ""
        raise ValueError(f"{name} must be a tensor {model.layout}, got {got}.{image}")
    if source.shape[1] != model.source_channels:
        raise ValueError(
            f"{name} {have} {source.shape[1]} channels, but this {model.part} takes {model.source_channels}: pass "
            f"{model.layout.replace('channels', str(model.source_channels))}; got {list(source.shape)}."
        )
    if not source.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {source.dtype}.")
    model.prepare()
    weight = next(iter(model.parameters()))
    # Weights that wait on meta are brought by hooks of accelerate, to where they are needed.
    if source.device != weight.device and not weight.is_meta:
        raise ValueError(
            f"{name} {are} on {source.device}, but the {model.part} is on {weight.device}: move one of them."
        )
    dtype = working_dtype(model)
    if source.dtype != dtype and not torch.is_autocast_enabled(source.device.type):
        raise TypeError(
            f"{name} {are} {source.dtype}, but the {model.part} is {dtype}: cast one of them, or use autocast."
        )
    groups = model.groups(source.shape[2])
    if not source.numel():
        raise ValueError(f"{name} {are} empty: {list(source.shape)}.")
    return groups


def check_dropout(model: Recurrence, strategy: Strategy) -> None:
    """For what runs steps more than once."""
    if any(isinstance(m, _Dropout) and m.training and m.p for m in model.vae.modules()):
        raise ValueError(f"{strategy} runs steps twice, and active dropout would differ between them: call vae.eval().")


def check_tangent(source: Tensor) -> None:
    """For what is not one graph."""
    if torch._C._are_functorch_transforms_active():
        raise TypeError("Transforms of torch.func need chopgrad.decode or encode with Full(), which is one graph.")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(source).tangent is not None:
        raise TypeError("Forward-mode derivatives need chopgrad.decode or encode with Full(), which is one graph.")


def trained_parameters(model: Recurrence, source: Tensor, depth: int) -> list[nn.Parameter]:
    """The model's parameters that get a gradient; said once, to the caller ``depth`` above, where the source gets one
    too.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    part = getattr(model.vae, model.part, model.vae)
    if parameters and source.requires_grad and torch.is_grad_enabled() and part not in _told:
        _told.add(part)
        millions = sum(p.numel() for p in parameters) / 1e6
        warnings.warn(
            f"{len(parameters)} parameters of the {model.part} ({millions:.1f} million numbers) get gradients beside "
            f"the {model.entering}. If only the {model.entering} {_verbs(model.entering)[0]} meant, freeze it: "
            "vae.requires_grad_(False).",
            stacklevel=depth,
        )
    return parameters


def check_sampled(strategy: Strategy, part: str = "decoder") -> None:
    if isinstance(strategy, Sampled):
        gives, instead = {
            "decoder": ("decode hands out frames", ", or use chopgrad.frame_loss"),
            "encoder": ("encode hands out moments", ""),
        }[part]
        raise TypeError(
            f"{strategy} draws losses of frame groups, and {gives}: pass {strategy.strategy} and "
            f"groups=slice(...){instead}."
        )


def _verbs(name: str) -> tuple[str, str]:
    return ("are", "have") if name.endswith("s") else ("is", "has")


_Dropout = nn.modules.dropout._DropoutNd
