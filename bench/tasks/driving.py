"""Controlled driving video (arXiv 2603.17812, Table 4): inserted cars get the scene's light and cast its shadows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.tasks.data.footage import paired_clip
from bench.tasks.scenes.road import Road, wrong_light
from bench.tasks.task import LossTerm, Pair, Task


@dataclass(frozen=True)
class Driving(Task):
    """Target: a drive with cars under one sun; condition: the same with the cars cut out and put back in, lit by
    another sun and without shadow. The mask covers cars and their shadows. The decoder trains too.

    ``folder``: ``condition/`` and ``target/`` with videos of equal names; without it, a procedural road.

    Cost: about 0.1 s a frame of 64x64 on one core, in proportion to the pixels.
    """

    name: str = field(default="driving", kw_only=True)
    losses: tuple[LossTerm, ...] = field(default=(LossTerm("mse", "pixel"),), kw_only=True)
    trains_decoder: bool = field(default=True, kw_only=True)

    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        if self.folder is not None:
            condition, target, source = paired_clip(self.folder, generator, frames, height, width)
            return Pair(condition, target, None, source)
        road = Road.random(generator, frames)
        other = wrong_light(road.light, generator)
        parts = [road.frame(k, height, width, other) for k in range(frames)]
        target, condition, mask = (torch.stack(x, dim=1) for x in zip(*parts))
        return Pair(condition, target, mask, f"generated {seed}")
