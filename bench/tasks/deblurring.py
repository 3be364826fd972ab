"""Deblurring: the gentlest of the tasks and none of the paper's; what the backbones of ``analysis/`` learn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.tasks.data.footage import film_clip, stretch_of
from bench.tasks.task import LossTerm, Pair, Task
from suite.motion import moving_clip


@dataclass(frozen=True)
class Deblurring(Task):
    """Target: a clip; condition: the same clip blurred, shrunk and enlarged, and made noisy, each frame alike.

    ``folder``: any folder of videos; without it, a camera over photographs with objects passing in front.

    Attributes:
        blur: standard deviation of the blur in pixels.
        shrink: factor of the shrinking.
        noise: standard deviation of the noise; pixels lie in [-1, 1].
        films: crops of these, clip by clip in turn, in place of generated clips.
        mixed: every other clip is generated all the same.

    Cost: about 10 ms for 33 frames of 32x32 on one core; of a film, the time to decode it up to the crop.
    """

    blur: float = 1.5
    shrink: int = 4
    noise: float = 0.3
    films: tuple[Path, ...] = ()
    mixed: bool = False
    name: str = field(default="deblurring", kw_only=True)
    losses: tuple[LossTerm, ...] = field(default=(LossTerm("mse", "pixel"),), kw_only=True)

    def check(self) -> None:
        if self.shrink < 1 or min(self.blur, self.noise) < 0:
            raise ValueError(
                "Deblurring needs a shrink of at least 1, and blur and noise of at least 0; got "
                f"shrink {self.shrink}, blur {self.blur}, noise {self.noise}."
            )

    def film(self, seed: int) -> Path | None:
        """The film that a clip is cut from; None for a generated one."""
        if not self.films or (self.mixed and seed % 2 == 0):
            return None
        return self.films[(seed // 2 if self.mixed else seed) % len(self.films)]

    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        film = self.film(seed)
        if self.folder is not None:
            target, source = film_clip(self.folder, generator, frames, height, width)
        elif film is not None:
            target, source = stretch_of(film, generator, frames, height, width), film.name
        else:
            target, source = moving_clip(generator, frames, height, width), f"generated {seed}"
        return Pair(degrade(target, self, generator), target, None, source)


def degrade(video: Tensor, task: Deblurring, generator: torch.Generator) -> Tensor:
    """[3, frames, H, W] in [-1, 1] -> the same, frame by frame blurred, shrunk, enlarged and made noisy."""
    frames = video.transpose(0, 1)
    if task.blur > 0:
        reach = max(1, round(3 * task.blur))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / task.blur) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, -1)
        padded = F.pad(frames, (reach,) * 4, mode="replicate")
        rows = F.conv2d(padded, kernel[..., None], groups=3)
        frames = F.conv2d(rows, kernel[:, :, None], groups=3)
    if task.shrink > 1:
        small = [max(1, n // task.shrink) for n in frames.shape[-2:]]
        small_frames = F.interpolate(frames, size=small, mode="bicubic", antialias=True)
        frames = F.interpolate(small_frames, size=video.shape[-2:], mode="bicubic")
    frames = frames + task.noise * torch.randn(frames.shape, generator=generator)
    return frames.clamp(-1, 1).transpose(0, 1)
