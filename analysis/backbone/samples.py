"""The clips on which backbones are measured, all at once, and the films of the training diet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from suite.clips import TRAINING_CLIPS, packaged_clip


@dataclass(frozen=True)
class Samples:
    """Clips of the task.

    Attributes:
        sources: what each clip was cut from; clips of one film are alike (clusters of an interval).
        clean: [clips, 3, frames, H, W] in [-1, 1].
        condition, latents: [clips, channels, latent frames, h, w], degraded and clean, in the diffusion model's
            normalised space.
    """

    sources: list[str]
    clean: Tensor
    condition: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice | Tensor) -> Samples:
        chosen = torch.arange(len(self))[rows].tolist()
        return Samples([self.sources[k] for k in chosen], self.clean[rows], self.condition[rows], self.latents[rows])

    def clean_as_condition(self) -> Samples:
        """What a perfect restorer would make of them."""
        return replace(self, condition=self.latents)


def training_films() -> tuple[Path, ...]:
    """The films whose crops are half of the training diet."""
    return tuple(packaged_clip(name) for name in TRAINING_CLIPS)
