"""What Wan's decoder and encoder are made of: causal convolutions, residual blocks, the middle, resampling in space."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from chopgrad.local import local
from chopgrad.pieces.plain import is_plain
from chopgrad.pieces.rms_norm import normed_silu, takes
from chopgrad.recurrence import Features, Piece, Recurrence

CACHED_FRAMES = 2  # a causal convolution with a kernel of three frames looks back at two


def convolve(convolution: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution, and the last frames of its input for the next group."""
    kept = x[:, :, -CACHED_FRAMES:]
    if kept.shape[2] < CACHED_FRAMES and cached is not None:
        kept = torch.cat([cached[:, :, -1:], kept], dim=2)
    elif kept.shape[2] < x.shape[2]:
        kept = kept.clone()  # so that the rest of x is not kept alive
    return convolution(x, cached), kept


def activate(model: Recurrence, norm: Any, activation: Any, x: Tensor) -> Tensor:
    """A norm and an activation, of which a graph keeps the input only.

    Where hooks or wrappers want the modules called they are, recomputed frame by frame with ``checkpoint="frame"``.
    """
    if takes(norm) and is_plain(activation, ("SiLU",)):
        return normed_silu(norm, x)
    return model.per_frame(lambda x: activation(norm(x)), x)


def residual(model: Recurrence, block: Any) -> list[Piece]:
    """A residual block as two pieces; its input travels beside the features to the second."""

    def first(features: Features, cached: Any) -> tuple[Features, Any]:
        x, *rest = features
        y, cached = convolve(block.conv1, activate(model, block.norm1, block.nonlinearity, x), cached)
        return (y, x, *rest), cached

    def second(features: Features, cached: Any) -> tuple[Features, Any]:
        y, x, *rest = features
        y, cached = convolve(block.conv2, block.dropout(activate(model, block.norm2, block.nonlinearity, y)), cached)
        return (y + block.conv_shortcut(x), *rest), cached

    return [
        local(first, block.norm1, block.nonlinearity, block.conv1),
        local(second, block.norm2, block.nonlinearity, block.dropout, block.conv2, block.conv_shortcut),
    ]


def middle(model: Recurrence, block: Any) -> list[list[Piece]]:
    """The units of the middle: residual blocks, and the attentions between them."""
    units = [residual(model, block.resnets[0])]
    for attention, after in zip(block.attentions, block.resnets[1:], strict=True):
        units += [[partial(attend, attention)], residual(model, after)]
    return units


def attend(attention: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """Attention inside each frame."""
    return (attention(features[0]), *features[1:]), nothing


def resample_space(model: Recurrence, resample: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """Up or down in height and width, frame by frame."""

    def each(x: Tensor) -> Tensor:
        batch = x.shape[0]
        images = resample(x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (batch, -1)).transpose(1, 2)

    return (model.per_frame(each, features[0]), *features[1:]), nothing


def fork(features: Features, nothing: None) -> tuple[Features, None]:
    """Wan 2.2: a block's input travels beside the features to its shortcut."""
    return (features[0], features[0]), nothing
