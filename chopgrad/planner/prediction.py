"""Peak memory and compute of strategies for one video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Literal, get_args

import torch

from chopgrad.decoders import Checkpoint, decoder_for
from chopgrad.planner.architectures import build, latent_frames_of, spatial_factor
from chopgrad.planner.compute import once_more, relative_compute
from chopgrad.planner.loss_shapes import loss_shapes
from chopgrad.planner.peaks import DecoderSetting, FramesLoss, Setting
from chopgrad.recurrence import Recurrence
from chopgrad.shapes import ShapesOnly
from chopgrad.strategies import Chop, Exact, Full, Sampled, Strategy


@dataclass(frozen=True)
class Prediction:
    """Cost of one strategy for one video.

    Attributes:
        strategy: the strategy.
        checkpoint: what the decoder recomputes inside a group (``decoder_for(vae, checkpoint=...)``).
        device_bytes: predicted peak on the device, the decoder's weights included.
        host_bytes: predicted peak of what waits in host memory.
        relative_compute: forward and backward passes of the decoder (a backward counts as two forwards), as a ratio to
            full back-propagation; the ends of the video are ignored.
        distance: truncation distance in frame groups; None for an exact gradient.
        relative_seconds: predicted time as a ratio to full back-propagation, transfers and recomputation included; None
            where the strategy was followed by a sweep, not by formulas.
        seconds: that time, on the card that was asked about.
        moment: when the device's peak is, such as "up_blocks.3.resnets.0, first half, backward".
    """

    strategy: Strategy
    device_bytes: int
    host_bytes: int
    relative_compute: float
    distance: int | None
    checkpoint: Checkpoint = None
    relative_seconds: float | None = None
    seconds: float | None = None
    moment: str | None = None


def default_strategies(groups: int) -> list[Strategy]:
    """What is worth considering for a video of so many frame groups."""
    return [
        Full(),
        Exact(offload=False),
        Exact(offload=True),
        Exact(offload=True, pieces=True),
        Exact(offload=True, pieces=True, strips=4),
        Exact(offload=True, pieces=True, strips=16),
        Exact(offload=True, pieces=True, every=max(2, isqrt(groups))),
        Exact(offload=True, pieces=True, every=max(2, isqrt(groups)), strips=16),
        Exact(pieces=True, every=max(2, isqrt(groups))),
        *(Chop(d) for d in (0, 1, 2, 4)),
        Chop(1, block=4),
        Chop(1, block=4, recompute=True),
        Chop(1, block=4, recompute=True, offload=True, pieces=True),
        Chop(1, recompute=True, offload=True, pieces=True),
    ]


def plan(
    vae: str,
    frames: int,
    height: int,
    width: int,
    *,
    loss: str = "mse",
    frames_loss: FramesLoss = "streamed",
    dtype: torch.dtype = torch.bfloat16,
    trainable_decoder: bool = False,
    subfolder: str | None = None,
    strategies: Sequence[Strategy] | None = None,
    checkpoint: Checkpoint | Literal["best"] = "best",
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predict memory and compute of strategies for a video of ``frames`` frames of ``height`` x ``width`` pixels.

    Args:
        vae: a name in ``ARCHITECTURES``, a folder with a config.json, or a hub id.
        loss: ``"mse"``, or ``"lpips"`` (the shapes of VGG-16, frame by frame with recomputation).
        frames_loss: ``"streamed"``: ``chopgrad.frame_loss`` with a target that is made group by group; ``"whole"``:
            ``chopgrad.decode`` and one loss on the video, so that the frames, the target, their gradient and the loss's
            own graph are counted whole.
        trainable_decoder: gradients of all decoder parameters are wanted too.
        subfolder: where the VAE lies inside a pipeline's folder or hub id.
        strategies: default: ``default_strategies``. An ``Exact`` whose ``every`` is left open is taken to keep every
            state.
        checkpoint: what the decoder recomputes inside a group; ``"best"``: nothing, and for strategies that walk pieces
            also ``"frame"`` where that takes less.
        progress: called with the number of predictions made and that of all, before each and at the end.

    Raises:
        ValueError: unknown VAE, loss or form, or frames or size that it does not decode to; the message says what fits.
            ``Sampled``, whose cost depends on its draw; ``Exact()`` and ``strips="auto"``, which depend on free memory.

    Cost: some seconds per strategy, with strips a minute and more; ``estimator`` says nearly the same in no time. The
    peak of each phase (the forward pass, the loss, the backward pass) is linear
    in the number of groups once a strategy's window is full, so two short videos tell the line of each, and the highest
    at the video's length is the peak; with ``every`` the states that are not kept are taken off it.
    """
    if frames_loss not in get_args(FramesLoss):
        raise ValueError(f"frames_loss must be 'streamed' or 'whole', got {frames_loss!r}.")
    with ShapesOnly(), torch.device("meta"):
        setting, latent_frames = decoder_settings(
            vae, frames, height, width, loss, frames_loss, dtype, trainable_decoder, subfolder
        )
        groups = len(setting(None).model.groups(latent_frames))
        strategies = default_strategies(groups) if strategies is None else strategies
        return predict(setting, latent_frames, strategies, frames_loss, checkpoint, progress)


def decoder_settings(
    vae: str, frames: int, height: int, width: int, loss: str, frames_loss: FramesLoss, dtype: torch.dtype,
    trainable_decoder: bool, subfolder: str | None,
) -> tuple[Callable[[Checkpoint], Setting], int]:  # fmt: skip
    """What is run, by what the decoder recomputes inside a group, and the number of latents; as in ``plan``."""
    model = build(vae, dtype, subfolder).eval().requires_grad_(trainable_decoder)
    decoder = decoder_for(model, checkpoint=None)
    latent_frames = latent_frames_of(decoder, frames)
    factor = spatial_factor(decoder, dtype)
    if min(height, width) < 1 or height % factor or width % factor:
        raise ValueError(f"Height and width must be multiples of {factor}, got {height}x{width}.")
    size = (height // factor, width // factor)
    loss_fn = loss_shapes(loss, (height, width), dtype)

    @lru_cache
    def setting(checkpoint: Checkpoint) -> Setting:
        decoder = decoder_for(model, checkpoint=checkpoint)
        return DecoderSetting(decoder, size, dtype, (height, width), loss_fn, frames_loss)

    return setting, latent_frames


def predict(
    setting: Callable[[Checkpoint], Setting],
    length: int,
    strategies: Sequence[Strategy],
    frames_loss: FramesLoss,
    checkpoint: Checkpoint | Literal["best"],
    progress: Callable[[int, int], None] | None,
) -> list[Prediction]:
    """Predictions of strategies at one length; the rest as in ``plan``.

    Raises:
        ValueError: ``Sampled``.
    """
    model = setting(None).model
    groups = len(model.groups(length))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = rows_of(strategies, checkpoint, model)
    predictions: list[Prediction] = []
    for strategy, inside in rows:
        if progress is not None:
            progress(len(predictions), len(rows))
        device, host = setting(inside).peaks(strategy, length)
        compute = relative_compute(strategy, groups, frames_loss)
        compute += 0 if inside in (None, "frame") else once_more(strategy, groups)
        predictions.append(Prediction(strategy, weights + device, host, compute, distance_of(strategy, groups), inside))
    if progress is not None:
        progress(len(rows), len(rows))
    return predictions


def rows_of(
    strategies: Sequence[Strategy], checkpoint: Checkpoint | Literal["best"], model: Recurrence
) -> list[tuple[Strategy, Checkpoint]]:
    """Each strategy with what the model recomputes inside a group.

    Raises:
        ValueError: ``Sampled``, or one of which something is chosen when it is called.
    """
    rows: list[tuple[Strategy, Checkpoint]] = []
    for strategy in strategies:
        if isinstance(strategy, Sampled):
            raise ValueError(f"What {strategy} takes depends on its draw: pass the strategy inside it.")
        if isinstance(strategy, Exact | Chop) and strategy.is_automatic:
            raise ValueError(f"What {strategy} takes depends on the memory that is free: pass a form of it.")
        settings = strategy.plan()
        helps = settings.pieces and not settings.strips and model.recomputes_frames
        best: tuple[Checkpoint, ...] = (None, "frame") if helps else (None,)
        rows += [(strategy, inside) for inside in (best if checkpoint == "best" else (checkpoint,))]
    return rows


def distance_of(strategy: Strategy, groups: int) -> int | None:
    """In frame groups; None for an exact gradient."""
    # The first block reaches over all groups from here on, and later ones have fewer before them.
    exact = not isinstance(strategy, Chop) or strategy.block + strategy.distance >= groups
    return None if exact else strategy.plan().distance
