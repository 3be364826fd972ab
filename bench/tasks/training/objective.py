"""The loss of a task under an arm: its terms in latent space, and its terms on pixels through the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.tasks.data.pairs import from_bytes
from bench.tasks.task import Task
from bench.tasks.training.arms import Arm, LossFn
from chopgrad import CausalDecoder, framewise
from suite.losses import loss_by_name

CHEAP = ("mse", "l1")  # not worth being recomputed


@dataclass
class Objective:
    """``objective(restored, batch) -> (scalar, its terms)``.

    Args:
        task: its loss terms are taken.
        arm: differentiates the terms on pixels; an arm without pixels takes latent MSE alone.
        decoder: what decodes.
        device: where perceptual networks are to lie.
        stride: perceptual losses look at every ``stride``-th frame of a group, at others in the next step, in turn:
            all frames have their say, at a fraction of the cost, which otherwise exceeds that of a small decoder.

    Raises:
        FileNotFoundError: the weights of a perceptual loss are not installed.
    """

    task: Task
    arm: Arm
    decoder: CausalDecoder
    device: torch.device
    stride: int = 1
    pixel: Mapping[str, float] = field(init=False)
    latent: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.pixel = self.task.weight("pixel") if self.arm.pixels else {}
        apart = self.arm.of_target or not self.arm.pixels
        self.latent = {"mse": 1.0} if apart else self.task.weight("latent")
        plain = {name: loss_by_name(name, self.device) for name in {*self.pixel, *self.latent}}
        self._offset = 0
        self._functions = {name: f if name in CHEAP else _lean(f) for name, f in plain.items()}

    def __call__(self, restored: Tensor, batch: Mapping[str, Tensor], step: int = 0) -> tuple[Tensor, dict[str, float]]:
        """
        Args:
            restored: [batch, channels, latent frames, h, w] normalised, with a graph.
            batch: ``latents`` of that shape, ``target`` uint8 [batch, 3, frames, H, W] on any device.
            step: turns the frames that perceptual losses look at.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        self._offset = step  # not drawn at random: all arms must see the same frames
        terms: dict[str, Tensor] = {}
        total = restored.new_zeros((), dtype=torch.float32)
        for name, weight in self.latent.items():
            terms[f"latent {name}"] = self._functions[name](restored.float(), batch["latents"].to(restored).float())
            total = total + weight * terms[f"latent {name}"]
        if self.pixel:
            weights = next(iter(self.decoder.parameters()))
            decoded = batch["latents"].to(restored) if self.arm.of_target else restored
            latents = self.decoder.denormalize(decoded.float()).to(weights.dtype)
            terms["pixel"] = self.arm.pixel_loss(self.decoder, latents, from_bytes(batch["target"]), self._on_frames)
            total = total + terms["pixel"]
        for name, value in terms.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"The {name} loss is {value.item()}: lower --rate, or check clips and dtype.")
        return total, {name: value.item() for name, value in terms.items()}

    def _on_frames(self, frames: Tensor, target: Tensor) -> Tensor:
        """All terms on pixels: one walk through the decoder serves them all."""
        frames, target = frames.float(), target.to(frames.device)
        first = self._offset % min(self.stride, frames.shape[2])
        some = slice(first, None, self.stride)
        return torch.stack(
            [
                weight * self._functions[name](*((x if name in CHEAP else x[:, :, some]) for x in (frames, target)))
                for name, weight in self.pixel.items()
            ]
        ).sum()


def _lean(loss_fn: LossFn) -> LossFn:
    """Frame by frame, where there are several: the graph of a single one is as small as it gets."""
    one_by_one = framewise(loss_fn)
    return lambda x, y: (loss_fn if x.shape[2] == 1 else one_by_one)(x, y)
