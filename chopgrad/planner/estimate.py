"""Predictions of many strategies in a second or two: by formulas, from the profile of a few groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch

from chopgrad.encoders import CausalEncoder
from chopgrad.planner import prediction
from chopgrad.planner.compute import once_more, relative_compute
from chopgrad.planner.encoder import EncoderGradient, encoder_settings
from chopgrad.planner.formulas import Surroundings, need
from chopgrad.planner.peaks import FramesLoss, Setting
from chopgrad.planner.prediction import Prediction, distance_of, rows_of
from chopgrad.planner.profile import Profile, profile
from chopgrad.planner.seconds import H200, Card, seconds
from chopgrad.recurrence import Checkpoint
from chopgrad.shapes import ShapesOnly
from chopgrad.strategies import Full, Strategy


class Estimator:
    """Strategies of one video.

    Args:
        setting: what is run, by what the model recomputes inside a group.
        length: latents or frames that it takes.
        frames_loss: what the loss sees.
        card: whose rates the times are of.

    Cost: under a second for a published architecture, twice that with ``checkpoint="frame"``; then microseconds for a
    strategy.
    """

    def __init__(
        self, setting: Callable[[Checkpoint], Setting], length: int, frames_loss: FramesLoss, card: Card = H200
    ) -> None:
        self._setting, self.length, self._frames_loss, self._card = setting, length, frames_loss, card
        self._profile = lru_cache(self._profiled)
        self._around = lru_cache(self._surroundings)

    def of(self, strategies: Sequence[Strategy], checkpoint: Checkpoint | Literal["best"]) -> list[Prediction]:
        """Their predictions, as ``plan`` makes them, with times and moments.

        Raises:
            ValueError: ``Sampled``.
        """
        return self.at(self.length, strategies, checkpoint)

    def groups(self) -> int:
        """How many there are."""
        return len(self._setting(None).model.groups(self.length))

    def multiple(self, size: tuple[int, int]) -> int:
        """Of which height and width in pixels must be multiples."""
        model = self._setting(None).model
        return (
            model.spatial_factor if isinstance(model, CausalEncoder) else size[0] // self._setting(None).source_size[0]
        )

    def shorter(self) -> Iterator[tuple[int, int]]:
        """(length, frames) of all shorter videos, the longest first."""
        model = self._setting(None).model
        for length in range(self.length - 1, 0, -1):
            try:
                last = model.groups(length)[-1]
            except ValueError:  # the model has no groups for that many
                continue
            yield length, length if model.part == "encoder" else last.yields.stop

    def at(
        self, length: int, strategies: Sequence[Strategy], checkpoint: Checkpoint | Literal["best"]
    ) -> list[Prediction]:
        """Predictions for a shorter video, from the same profile."""
        rows = rows_of(strategies, checkpoint, self._setting(None).model)
        return [self._prediction(strategy, inside, length) for strategy, inside in rows]

    def _prediction(self, strategy: Strategy, inside: Checkpoint, length: int) -> Prediction:
        found, around = self._profile(inside), self._around(length)
        groups = len(self._setting(None).model.groups(length))
        if length != self.length:
            source = found.source_bytes * length // self.length
            found = replace(found, groups=groups, source_bytes=source)
        device, host, moment = need(strategy, found, around)
        streams = self._frames_loss == "streamed"
        whole = replace(self._profile(None), groups=groups)
        time = seconds(strategy, found, self._card, streams)
        compute = relative_compute(strategy, groups, self._frames_loss)
        compute += 0 if inside in (None, "frame") else once_more(strategy, groups)
        full = seconds(Full(), whole, self._card, streams)
        return Prediction(
            strategy, device, host, compute, distance_of(strategy, groups), inside, time / full, time, moment
        )

    def _profiled(self, inside: Checkpoint) -> Profile:
        setting = self._setting(inside)
        size = (self.length, *setting.source_size)
        return profile(setting.model, size, setting.dtype, source_needs_grad=setting.of_source, beginning=True)

    def _surroundings(self, length: int) -> Surroundings:
        return self._setting(None).surroundings(length)


def estimator(
    vae: str, frames: int, height: int, width: int, *, loss: str = "mse", frames_loss: FramesLoss = "streamed",
    dtype: torch.dtype = torch.bfloat16, trainable_decoder: bool = False, subfolder: str | None = None,
    card: Card = H200,
) -> Estimator:  # fmt: skip
    """Of a decoder and its loss; arguments and errors as of ``plan``.

    ``Estimator.of(strategies, checkpoint)`` then predicts in a second what ``plan`` follows in sweeps of some seconds
    each, within 5 % of it.
    """
    if frames_loss not in get_args(FramesLoss):
        raise ValueError(f"frames_loss must be 'streamed' or 'whole', got {frames_loss!r}.")
    with ShapesOnly(), torch.device("meta"):
        setting, length = prediction.decoder_settings(
            vae, frames, height, width, loss, frames_loss, dtype, trainable_decoder, subfolder
        )
    return Estimator(setting, length, frames_loss, card)


def encoder_estimator(
    vae: str, frames: int, height: int, width: int, *, gradient: EncoderGradient = "both",
    dtype: torch.dtype = torch.bfloat16, subfolder: str | None = None, card: Card = H200,
) -> Estimator:  # fmt: skip
    """Of an encoder; arguments and errors as of ``plan_encoder``."""
    with ShapesOnly(), torch.device("meta"):
        setting = encoder_settings(vae, frames, height, width, gradient, dtype, subfolder)
    return Estimator(setting, frames, "whole", card)
