"""What CogVideoX's decoder and encoder have in common: the residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chopgrad.recurrence import Features, Piece


def residual(
    block: Any, activate: Callable[..., Tensor], piece: Callable[..., Piece] = lambda run, *modules: run
) -> list[Piece]:
    """A residual block as two pieces; its input travels beside the features to the second.

    Args:
        activate: ``(norm, activation, x, *rest)`` -> the activated norm of x; rest is what travels beside x.
        piece: ``(run, norm, *modules)`` -> the piece that runs these modules. ``run`` hands keywords on to the norm.
    """

    def first(features: Features, cached: Any, **strip: Any) -> tuple[Features, Any]:
        x, *rest = features
        y, cached = block.conv1(activate(block.norm1, block.nonlinearity, x, *rest, **strip), conv_cache=cached)
        return (y, x, *rest), cached

    def second(features: Features, cached: Any, **strip: Any) -> tuple[Features, Any]:
        y, x, *rest = features
        of_y, of_shortcut = cached if cached is not None else (None, None)
        y = block.dropout(activate(block.norm2, block.nonlinearity, y, *rest, **strip))
        y, of_y = block.conv2(y, conv_cache=of_y)
        if block.in_channels != block.out_channels:
            if block.use_conv_shortcut:
                x, of_shortcut = block.conv_shortcut(x, conv_cache=of_shortcut)
            else:
                x = block.conv_shortcut(x)
        return (y + x, *rest), (of_y, of_shortcut)

    shortcut = [block.conv_shortcut] if block.in_channels != block.out_channels else []
    return [
        piece(first, block.norm1, block.nonlinearity, block.conv1),
        piece(second, block.norm2, block.nonlinearity, block.dropout, block.conv2, *shortcut),
    ]
