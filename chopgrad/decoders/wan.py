"""Wan 2.1, Wan 2.2 and Qwen-Image: one latent per group, the first decodes to one frame and each later one to four."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.latents import mean_and_std
from chopgrad.local import Local, local
from chopgrad.pieces.wan import CACHED_FRAMES, activate, convolve, fork, middle, resample_space, residual


class WanDecoder(CausalDecoder):
    """``AutoencoderKLWan`` (2.1, and the residual 2.2 form with patches) and ``AutoencoderKLQwenImage``.

    A piece is one half of a residual block (norm, activation, convolution), an attention, an upsampler in time, one in
    space, or the head. Its slice of the state is what upstream keeps in its flat ``feat_cache`` list for the
    convolution in it: None (nothing cached), "Rep" (an upsampler in time that has seen only the first latent) or the
    last two feature frames.
    """

    package = "diffusers"
    recomputes_frames = False

    @property
    def named(self) -> Any:
        """The VAE's parts under the names that diffusers gives them."""
        return self.vae

    @property
    def latent_channels(self) -> int:
        return self.named.config.z_dim

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        factor = 2 ** sum(self.named.config.temperal_downsample)
        starts = [0] + [1 + factor * i for i in range(latent_frames)]
        return [FrameGroup(slice(i, i + 1), slice(starts[i], starts[i + 1])) for i in range(latent_frames)]

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.named.decoder
        entry = local(self._entry, self.named.post_quant_conv, decoder.conv_in)
        blocks: Blocks = [[[entry]], middle(self, decoder.mid_block)]
        for up in decoder.up_blocks:
            shortcut = getattr(up, "avg_shortcut", None)
            upsampler = up.upsampler if hasattr(up, "upsampler") else up.upsamplers and up.upsamplers[0]
            units = [residual(self, block) for block in up.resnets]
            if upsampler is not None:
                in_time: list[Piece] = []
                if upsampler.mode == "upsample3d":
                    in_time = [local(partial(_upsample_time, upsampler), upsampler.time_conv)]
                in_space = partial(resample_space, self, upsampler.resample)
                units.append([*in_time, local(in_space, upsampler.resample, scale=2)])
            if shortcut is not None:
                units = [[Local(fork)], *units, [local(partial(_join, shortcut), shortcut)]]
            blocks.append(units)
        patch = getattr(self.named.config, "patch_size", None) or 1
        head = local(self._head, decoder.norm_out, decoder.nonlinearity, decoder.conv_out, scale=patch)
        return [*blocks, [[head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        x, cached = convolve(self.named.decoder.conv_in, self.named.post_quant_conv(features[0]), cached)
        return (x,), cached

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.named.decoder
        x = activate(self, decoder.norm_out, decoder.nonlinearity, features[0])
        x, cached = convolve(decoder.conv_out, x, cached)
        if getattr(self.named.config, "patch_size", None) is not None:
            x = unpatchify(x, patch_size=self.named.config.patch_size)
        return (self.clamped(x),), cached

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return mean_and_std(self.named.config, like)


def _upsample_time(upsampler: Any, features: Features, cached: Any) -> tuple[Features, Any]:
    """Two frames out of each; the first latent of a video stays one frame and leaves the mark "Rep"."""
    x, *rest = features
    if cached is None:
        return features, "Rep"
    x, kept = convolve(upsampler.time_conv, x, cached if isinstance(cached, Tensor) else None)
    if kept.shape[2] < CACHED_FRAMES:
        kept = torch.cat([torch.zeros_like(kept), kept], dim=2)  # as from now on, so that all later groups are alike
    even, odd = x.chunk(2, dim=1)
    return (torch.stack([even, odd], dim=3).flatten(2, 3), *rest), kept


def _join(shortcut: Any, features: Features, seen: Any) -> tuple[Features, Any]:
    """Wan 2.2: the block's input, upsampled by repetition, is added to its output."""
    x, skip = features
    return (x + shortcut(skip, first_chunk=seen is None),), "Rep"
