"""Which pieces are local in space, so that they can be run on some of the rows (``chopgrad.strips``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from chopgrad.pieces.plain import written_forward

Features = tuple[Tensor, ...]
"""What one piece of a step hands to the next: the main features first, then what a later piece needs (skips)."""

Piece = Callable[[Features, Any], tuple[Features, Any]]
"""A pure part of a step: ``(features, its slice of the state) -> (features, the slice for the next group)``."""


@dataclass(frozen=True)
class Local:
    """A piece whose rows depend on those of the features, and of the slice of the state, at most ``radius`` away.

    Args:
        run: the piece. Features that it only passes on must be the same objects.
        radius: in rows of the main features. So many are run beside a strip and dropped of what comes out; what is
            padded there does not matter, therefore.
        scale: rows of what it makes for each row of the main features. The state has as many rows as these.
    """

    run: Piece
    radius: int = 0
    scale: int = 1

    def __call__(self, features: Features, state: Any) -> tuple[Features, Any]:
        return self.run(features, state)

    def within(self, wrap: Callable[[Any], Any]) -> Self:
        """The same with its function wrapped."""
        return replace(self, run=wrap(self.run))


def local(run: Piece, *modules: nn.Module, scale: int = 1) -> Piece:
    """The piece as ``Local``, or as it is: what it calls may be something else than the VAE's class put there.

    Args:
        modules: all that the piece calls and that might mix rows.
    """
    radius = 0
    for module in (m for called in modules for m in _inside(called)):
        if not is_local(module):
            return run
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            radius += module.dilation[-2] * (module.kernel_size[-2] // 2)  # one after the other at worst
    return Local(run, radius, scale)


CONVOLUTIONS = ("Conv2d", "Conv3d", "WanCausalConv3d", "QwenImageCausalConv3d", "CausalConv3d", "CogVideoXSafeConv3d")
ROW_BY_ROW = (
    "SiLU", "ReLU", "Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "WanRMS_norm", "QwenImageRMS_norm",
    "RMS_norm", "DupUp3D",
)  # fmt: skip
UPSAMPLERS = ("Upsample", "WanUpsample", "QwenImageUpsample")
CALLING = ("Sequential", "CogVideoXCausalConv3d", "CogVideoXUpsample3D")
"""Modules that do nothing to rows but by the modules inside."""


def is_local(module: nn.Module) -> bool:
    """Whether its own part of the work is known to be local: by the class whose forward runs, with no hook.

    Of adapters of peft, which call the layer inside and convolutions beside it, that is nothing.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        return True  # never called
    definer = written_forward(module)
    name = definer.__name__ if definer else ""
    if name in CONVOLUTIONS and isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.stride[-2] == 1 and module.kernel_size[-2] % 2 == 1 and module.padding_mode != "circular"
    if name in UPSAMPLERS and isinstance(module, nn.Upsample):
        return module.mode in ("nearest", "nearest-exact")
    return name in ROW_BY_ROW or name in CALLING or bool(definer and definer.__module__.startswith("peft."))


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those inside it, but for what only makes weights."""
    yield module
    for name, child in module.named_children():
        if name != "parametrizations":
            yield from _inside(child)


@dataclass(frozen=True)
class Pooled(Local):
    """A local piece but for statistics of its main features over all rows, as a group norm takes them.

    Args:
        statistics: of some of the rows.
        pool: those of all rows, from those of parts and how many rows these have.
        run_with: the piece, given these too: ``(features, state, statistics, rows)``; rows: for each of the features
            the first row that is given, and the last (not included).
    """

    statistics: Callable[[Tensor], Tensor] = field(kw_only=True)
    pool: Callable[[Sequence[Tensor], Sequence[int]], Tensor] = field(kw_only=True)
    run_with: Callable[[Features, Any, Tensor, Sequence[tuple[int, int]]], tuple[Features, Any]] = field(kw_only=True)

    def within(self, wrap: Callable[[Any], Any]) -> Self:
        return replace(self, run=wrap(self.run), run_with=wrap(self.run_with))
