"""Wan 2.1, Wan 2.2 and Qwen-Image: one latent per group, the first decodes to one frame and each later one to four."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames

CACHED_FRAMES = 2  # a causal convolution with a kernel of three frames looks back at two


class WanDecoder(CausalDecoder):
    """``AutoencoderKLWan`` (2.1, and the residual 2.2 form with patches) and ``AutoencoderKLQwenImage``.

    A piece is one half of a residual block (norm, activation, convolution), an attention, an upsampler in time, one in
    space, or the head. Its slice of the state is what upstream keeps in its flat ``feat_cache`` list for the
    convolution in it: None (nothing cached), "Rep" (an upsampler in time that has seen only the first latent) or the
    last two feature frames.
    """

    package = "diffusers"

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
        middle = [self._residual(decoder.mid_block.resnets[0])]
        for attention, block in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            middle += [[partial(_attend, attention)], self._residual(block)]
        blocks: Blocks = [[[self._entry]], middle]
        for up in decoder.up_blocks:
            shortcut = getattr(up, "avg_shortcut", None)
            upsampler = up.upsampler if hasattr(up, "upsampler") else up.upsamplers and up.upsamplers[0]
            units = [self._residual(block) for block in up.resnets]
            if upsampler is not None:
                in_time = [partial(_upsample_time, upsampler)] if upsampler.mode == "upsample3d" else []
                units.append([*in_time, partial(self._upsample_space, upsampler.resample)])
            if shortcut is not None:
                units = [[_fork], *units, [partial(_join, shortcut)]]
            blocks.append(units)
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        x, cached = _convolve(self.named.decoder.conv_in, self.named.post_quant_conv(features[0]), cached)
        return (x,), cached

    def _residual(self, block: Any) -> list[Piece]:
        """A residual block as two pieces; its input travels beside the features to the second."""

        def first(features: Features, cached: Any) -> tuple[Features, Any]:
            x, *rest = features
            y, cached = _convolve(block.conv1, self._activate(block.norm1, block.nonlinearity, x), cached)
            return (y, x, *rest), cached

        def second(features: Features, cached: Any) -> tuple[Features, Any]:
            y, x, *rest = features
            y, cached = _convolve(
                block.conv2, block.dropout(self._activate(block.norm2, block.nonlinearity, y)), cached
            )
            return (y + block.conv_shortcut(x), *rest), cached

        return [first, second]

    def _activate(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        # The norm is over channels, in float32 where x is of lower precision: its copies are a piece's largest part.
        return self.per_frame(lambda x: activation(norm(x)), x)

    def _upsample_space(self, resample: Any, features: Features, nothing: None) -> tuple[Features, None]:
        def each(x: Tensor) -> Tensor:
            batch = x.shape[0]
            images = resample(x.transpose(1, 2).flatten(0, 1))
            return images.unflatten(0, (batch, -1)).transpose(1, 2)

        return (self.per_frame(each, features[0]), *features[1:]), nothing

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.named.decoder
        x = self._activate(decoder.norm_out, decoder.nonlinearity, features[0])
        x, cached = _convolve(decoder.conv_out, x, cached)
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
        config = self.named.config
        mean, std = (torch.tensor(v).to(like).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std


def _convolve(convolution: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution, and the last frames of its input for the next group."""
    kept = x[:, :, -CACHED_FRAMES:]
    if kept.shape[2] < CACHED_FRAMES and cached is not None:
        kept = torch.cat([cached[:, :, -1:], kept], dim=2)
    elif kept.shape[2] < x.shape[2]:
        kept = kept.clone()  # so that the rest of x is not kept alive
    return convolution(x, cached), kept


def _attend(attention: Any, features: Features, nothing: None) -> tuple[Features, None]:
    return (attention(features[0]), *features[1:]), nothing


def _upsample_time(upsampler: Any, features: Features, cached: Any) -> tuple[Features, Any]:
    """Two frames out of each; the first latent of a video stays one frame and leaves the mark "Rep"."""
    x, *rest = features
    if cached is None:
        return features, "Rep"
    x, kept = _convolve(upsampler.time_conv, x, cached if isinstance(cached, Tensor) else None)
    if kept.shape[2] < CACHED_FRAMES:
        kept = torch.cat([torch.zeros_like(kept), kept], dim=2)  # as from now on, so that all later groups are alike
    even, odd = x.chunk(2, dim=1)
    return (torch.stack([even, odd], dim=3).flatten(2, 3), *rest), kept


def _fork(features: Features, nothing: None) -> tuple[Features, None]:
    return (features[0], features[0]), nothing


def _join(shortcut: Any, features: Features, seen: Any) -> tuple[Features, Any]:
    """Wan 2.2: the block's input, upsampled by repetition, is added to its output."""
    x, skip = features
    return (x + shortcut(skip, first_chunk=seen is None),), "Rep"
