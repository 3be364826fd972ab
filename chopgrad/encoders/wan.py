"""Wan 2.1, Wan 2.2 and Qwen-Image: the first frame of a video is a group, and then every four are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from chopgrad.encoders.base import (
    Blocks,
    CausalEncoder,
    Checkpoint,
    Features,
    LatentGroup,
    Piece,
    State,
    check_frames,
    refused,
)
from chopgrad.pieces.wan import activate, convolve, fork, middle, resample_space, residual

GROUP = 4  # frames that upstream encodes at once, whatever the config


class WanEncoder(CausalEncoder):
    """``AutoencoderKLWan`` (2.1, and the residual 2.2 form with patches) and ``AutoencoderKLQwenImage``.

    A piece is one half of a residual block, an attention, a downsampler in space, one in time, or the head with the
    quantisation. Its slice of the state is what upstream keeps in its flat ``feat_cache`` list for the convolution in
    it: None (nothing cached), the last two feature frames, or of a downsampler in time the last one.
    """

    package = "diffusers"
    recomputes_frames = False

    def __init__(self, vae: nn.Module, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, checkpoint)
        self.blocks()  # raises for a layer that is not known, before the VAE's own encode fails in it

    @property
    def named(self) -> Any:
        """The VAE's parts under the names that diffusers gives them."""
        return self.vae

    @property
    def source_channels(self) -> int:
        return self.named.encoder.conv_in.in_channels // self._patch_size**2

    @property
    def spatial_factor(self) -> int:
        layers = [getattr(layer, "downsampler", layer) for layer in self.named.encoder.down_blocks]
        return self._patch_size * 2 ** sum(hasattr(layer, "resample") for layer in layers)

    @property
    def _patch_size(self) -> int:
        return getattr(self.named.config, "patch_size", None) or 1

    def latent_groups(self, frames: int) -> list[LatentGroup]:
        check_frames(frames)
        factor = 2 ** sum(self.named.config.temperal_downsample)
        if GROUP % factor:
            raise ValueError(
                f"This VAE makes one latent of {factor} frames, and its encode takes {GROUP} at once: it cannot encode "
                "a video."
            )
        beyond = (frames - 1) % GROUP
        if beyond:
            why = f"it takes 1 + {GROUP}k, and the VAE's own encode drops the last {beyond} of these without a word"
            raise refused(frames, frames - beyond, frames - beyond + GROUP, why)
        step = GROUP // factor
        later = (
            LatentGroup(slice(1 + GROUP * i, 1 + GROUP * (i + 1)), slice(1 + step * i, 1 + step * (i + 1)))
            for i in range((frames - 1) // GROUP)
        )
        return [LatentGroup(slice(0, 1), slice(0, 1)), *later]

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        encoder = self.named.encoder
        blocks: Blocks = [[[self._entry]], []]
        for layer in encoder.down_blocks:
            if hasattr(layer, "avg_shortcut"):
                units = [residual(self, block) for block in layer.resnets]
                units += [self._downsample(layer.downsampler)] if layer.downsampler is not None else []
                blocks.append([[fork], *units, [partial(_join, layer.avg_shortcut)]])
            elif hasattr(layer, "resample"):
                blocks[-1].append(self._downsample(layer))
                blocks.append([])
            elif hasattr(layer, "conv1"):
                blocks[-1].append(residual(self, layer))
            else:
                raise ValueError(
                    f"This Wan encoder has {type(layer).__name__} between its downsampling blocks (attn_scales), where "
                    "the VAE's own encode fails too: write an encoder for it (a subclass of chopgrad.CausalEncoder)."
                )
        blocks += [middle(self, encoder.mid_block), [[self._head]]]
        return [block for block in blocks if block]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        x = patchify(features[0], patch_size=self._patch_size)
        x, cached = convolve(self.named.encoder.conv_in, x, cached)
        return (x,), cached

    def _downsample(self, sampler: Any) -> list[Piece]:
        in_time = [partial(_downsample_time, sampler.time_conv)] if sampler.mode == "downsample3d" else []
        return [partial(resample_space, self, sampler.resample), *in_time]

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        encoder = self.named.encoder
        x = activate(self, encoder.norm_out, encoder.nonlinearity, features[0])
        x, cached = convolve(encoder.conv_out, x, cached)
        return (self.named.quant_conv(x),), cached


def _downsample_time(convolution: Any, features: Features, cached: Tensor | None) -> tuple[Features, Tensor]:
    """One frame out of two and the last before them; the first frame of a video passes as it is."""
    x, *rest = features
    kept = x[:, :, -1:]
    if kept.shape[2] < x.shape[2]:
        kept = kept.clone()  # so that the rest of x is not kept alive
    if cached is None:
        return features, kept
    return (convolution(torch.cat([cached, x], dim=2)), *rest), kept


def _join(shortcut: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """Wan 2.2: the block's input, averaged, is added to its output."""
    x, skip = features
    return (x + shortcut(skip),), nothing
