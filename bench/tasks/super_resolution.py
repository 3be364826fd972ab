"""Video super-resolution (arXiv 2603.17812, Table 1): undo a real-world degradation, four times the size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.tasks.data.degradation import degrade
from bench.tasks.data.footage import film_clip
from bench.tasks.task import LossTerm, Pair, Task
from suite.motion import moving_clip


@dataclass(frozen=True)
class SuperResolution(Task):
    """Target: a clip; condition: the same clip degraded, shrunk and enlarged again.

    ``folder``: any folder of videos; without it, a camera over photographs with objects passing in front.

    Attributes:
        scale: how many times smaller the low-resolution clip is.

    Cost: about 0.1 s for 17 frames of 64x64 on one core.
    """

    scale: int = 4
    name: str = field(default="super-resolution", kw_only=True)
    losses: tuple[LossTerm, ...] = field(
        default=(LossTerm("mse", "pixel"), LossTerm("dists", "pixel", 0.1)), kw_only=True
    )

    def check(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale must be a whole number of at least 1, got {self.scale}.")

    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        if self.folder is None:
            target, source = moving_clip(generator, frames, height, width), f"generated {seed}"
        else:
            target, source = film_clip(self.folder, generator, frames, height, width)
        return Pair(degrade(target, self.scale, generator), target, None, source)
