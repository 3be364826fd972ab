"""How pipelines scale latents before ``vae.decode``: what several decoders share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaledLatents:
    """Latents are divided by ``scaling_factor``. To be named before ``CausalDecoder`` among the bases."""

    vae: Any

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def normalize(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor


def mean_and_std(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """A config's ``latents_mean`` and ``latents_std``, of each channel, for latents of this device and dtype."""
    mean, std = (torch.tensor(v).to(like).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return mean, std
