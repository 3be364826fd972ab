"""Wan 2.1, Wan 2.2 and Qwen-Image: one latent per group, the first decodes to one frame and each later one to four."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from chopgrad.decoders.base import CausalDecoder, FrameGroup, State, check_latent_frames


class WanDecoder(CausalDecoder):
    """``AutoencoderKLWan`` (2.1, and the residual 2.2 form with patches) and ``AutoencoderKLQwenImage``.

    The state is the tuple of upstream's ``feat_cache`` entries: None (nothing cached), "Rep" (an upsampler that has
    seen only the first latent) or the last two feature frames in front of a causal convolution. Upstream changes its
    list in place; each step here hands it a fresh list, which is what makes the step pure.
    """

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        factor = 2 ** sum(self.vae.config.temperal_downsample)
        starts = [0] + [1 + factor * i for i in range(latent_frames)]
        return [FrameGroup(slice(i, i + 1), slice(starts[i], starts[i + 1])) for i in range(latent_frames)]

    def initial_state(self) -> State:
        return (None,) * self.vae._cached_conv_counts["decoder"]

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        cache = list(state)
        first = {"first_chunk": cache[0] is None} if isinstance(self.vae, AutoencoderKLWan) else {}
        x = self.vae.decoder(self.vae.post_quant_conv(z), feat_cache=cache, feat_idx=[0], **first)
        if getattr(self.vae.config, "patch_size", None) is not None:
            x = unpatchify(x, patch_size=self.vae.config.patch_size)
        return self._finish(x), tuple(cache)

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (torch.tensor(v).to(like).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std
