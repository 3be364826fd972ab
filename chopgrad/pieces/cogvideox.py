"""What CogVideoX's decoder and encoder have in common: the residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chopgrad.recurrence import Features, Piece


def residual(block: Any, activate: Callable[..., Tensor]) -> list[Piece]:
    """A residual block as two pieces; its input travels beside the features to the second.

    Args:
        activate: ``(norm, activation, x, *rest)`` -> the activated norm of x; rest is what travels beside x.
    """

    def first(features: Features, cached: Any) -> tuple[Features, Any]:
        x, *rest = features
        y, cached = block.conv1(activate(block.norm1, block.nonlinearity, x, *rest), conv_cache=cached)
        return (y, x, *rest), cached

    def second(features: Features, cached: Any) -> tuple[Features, Any]:
        y, x, *rest = features
        of_y, of_shortcut = cached if cached is not None else (None, None)
        y = block.dropout(activate(block.norm2, block.nonlinearity, y, *rest))
        y, of_y = block.conv2(y, conv_cache=of_y)
        if block.in_channels != block.out_channels:
            if block.use_conv_shortcut:
                x, of_shortcut = block.conv_shortcut(x, conv_cache=of_shortcut)
            else:
                x = block.conv_shortcut(x)
        return (y + x, *rest), (of_y, of_shortcut)

    return [first, second]
