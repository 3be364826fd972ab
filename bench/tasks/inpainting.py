"""Video inpainting (arXiv 2603.17812, Table 3): fill what a mask hides, in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bench.tasks.data.footage import film_clip
from bench.tasks.task import LossTerm, Pair, Task, uniform
from suite.motion import moving_clip

HIDDEN = 0.0  # the grey that stands for "not known"


@dataclass(frozen=True)
class Inpainting(Task):
    """Target: a clip; condition: the same clip, grey where the mask is 1.

    ``folder``: any folder of videos; without it, a camera over photographs with objects passing in front.

    Attributes:
        region: ``"centre"``: the central half of height and width, as in the paper; ``"object"``: the outline of an
            object that moves and changes its shape.
    """

    region: Literal["centre", "object"] = "centre"
    name: str = field(default="inpainting", kw_only=True)
    losses: tuple[LossTerm, ...] = field(default=(LossTerm("mse", "latent"), LossTerm("lpips", "pixel")), kw_only=True)

    def check(self) -> None:
        if self.region not in ("centre", "object"):
            raise ValueError(f"region must be 'centre' or 'object', got '{self.region}'.")

    def make(self, seed: int, generator: torch.Generator, frames: int, height: int, width: int) -> Pair:
        if self.folder is None:
            target, source = moving_clip(generator, frames, height, width, objects=2), f"generated {seed}"
        else:
            target, source = film_clip(self.folder, generator, frames, height, width)
        if self.region == "centre":
            mask = centre_mask(frames, height, width)
        else:
            mask = object_mask(generator, frames, height, width)
        return Pair(torch.where(mask > 0, torch.tensor(HIDDEN), target), target, mask, source)


def centre_mask(frames: int, height: int, width: int) -> Tensor:
    """[1, frames, height, width]: 1 in the central half of height and of width."""
    mask = torch.zeros(1, frames, height, width)
    mask[:, :, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 1
    return mask


def object_mask(generator: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """[1, frames, height, width]: 1 inside a round outline with bulges, which crosses the picture while it turns,
    grows or shrinks, and wobbles.
    """
    path = torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)
    time = torch.arange(frames).float()
    heading = uniform(generator, -math.pi, math.pi)
    length = uniform(generator, 0.2, 0.6)
    cy = uniform(generator, 0.4, 0.6) + path * length * math.sin(heading)
    cx = uniform(generator, 0.4, 0.6) + path * length * math.cos(heading)
    size = uniform(generator, 0.22, 0.34) * torch.exp(path * uniform(generator, -0.4, 0.4))
    stretch = math.exp(uniform(generator, -0.4, 0.4))
    ys = (torch.arange(height) + 0.5)[None, :, None] / height - cy[:, None, None]
    xs = (torch.arange(width) + 0.5)[None, None, :] / width - cx[:, None, None]
    ys, xs = ys * min(1.0, height / width), xs * min(1.0, width / height)  # in shares of the longer side
    ys, xs = ys * stretch, xs / stretch
    angle = torch.atan2(ys, xs) + (time * uniform(generator, -0.05, 0.05))[:, None, None]
    outline = torch.ones(frames, height, width)
    for waves in (2, 3, 5):
        phase = uniform(generator, -math.pi, math.pi) + time * uniform(generator, -0.25, 0.25)
        outline += uniform(generator, 0.05, 0.4) / waves * torch.cos(waves * angle + phase[:, None, None])
    limit = size[:, None, None] * min(height, width) / max(height, width) * outline
    return ((ys**2 + xs**2).sqrt() < limit).float()[None]
