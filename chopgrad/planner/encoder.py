"""Peak memory and compute of strategies for the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch

from chopgrad.encoders import ENCODERS, encoder_for
from chopgrad.planner.architectures import build
from chopgrad.planner.peaks import EncoderSetting, Setting
from chopgrad.planner.prediction import Prediction, default_strategies, predict
from chopgrad.recurrence import Checkpoint
from chopgrad.shapes import ShapesOnly
from chopgrad.strategies import Strategy

EncoderGradient = Literal["both", "parameters", "video"]
"""Of what a gradient is wanted: a VAE that trains on clips from files needs that of its parameters alone."""


def plan_encoder(
    vae: str,
    frames: int,
    height: int,
    width: int,
    *,
    gradient: EncoderGradient = "both",
    dtype: torch.dtype = torch.bfloat16,
    subfolder: str | None = None,
    strategies: Sequence[Strategy] | None = None,
    checkpoint: Checkpoint | Literal["best"] = "best",
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predict memory and compute of ``chopgrad.encode`` for a video of ``frames`` frames of ``height`` x ``width``.

    The loss is a mean of the moments. What the decoder takes in the same step is predicted by ``plan``; the weights of
    the encoder alone are counted.

    Args:
        gradient: of ``"parameters"``, of the ``"video"``, or of ``"both"``, which takes most.
        vae, dtype, subfolder, strategies, checkpoint, progress: as in ``plan``.

    Raises:
        ValueError: unknown VAE or gradient, or frames or size that it does not encode; the message says what fits.
            ``Sampled``, which ``encode`` does not take.

    Cost: as of ``plan``.
    """
    if gradient not in get_args(EncoderGradient):
        raise ValueError(f"gradient must be 'both', 'parameters' or 'video', got {gradient!r}.")
    with ShapesOnly(), torch.device("meta"):
        setting = encoder_settings(vae, frames, height, width, gradient, dtype, subfolder)
        groups = len(setting(None).model.groups(frames))
        strategies = default_strategies(groups) if strategies is None else strategies
        return predict(setting, frames, strategies, "whole", checkpoint, progress)


def encoder_settings(
    vae: str, frames: int, height: int, width: int, gradient: EncoderGradient, dtype: torch.dtype, subfolder: str | None
) -> Callable[[Checkpoint], Setting]:
    """What is run, by what the encoder recomputes inside a group; as in ``plan_encoder``."""
    model = build(vae, dtype, subfolder, ENCODERS).eval().requires_grad_(gradient != "video")
    encoder = encoder_for(model, checkpoint=None)
    encoder.groups(frames)
    factor = encoder.spatial_factor
    if min(height, width) < 1 or height % factor or width % factor:
        raise ValueError(f"Height and width must be multiples of {factor}, got {height}x{width}.")

    @lru_cache
    def setting(checkpoint: Checkpoint) -> Setting:
        encoder = encoder_for(model, checkpoint=checkpoint)
        return EncoderSetting(encoder, (height, width), dtype, gradient != "parameters")

    return setting
