"""Kandinsky's K-VAE: 17 frames, then 16 at a time, out of five latents and then four."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.causal import with_past
from chopgrad.pieces.group_norm import frames_per_latent, normed_silu, takes
from chopgrad.pieces.plain import is_plain

SEGMENT_FRAMES = 16  # upstream's default


class KVAEDecoder(CausalDecoder):
    """``AutoencoderKLKVAEVideo``.

    Upstream's caches are nested dicts that each layer changes in place. Here they are the slices of the state, one for
    each piece: one half of a residual block (norm, activation, convolution), an upsampler in time, one in space, or the
    head. The latents go beside the features, because every norm reads them.

    The norms take their statistics over a whole segment, so that a group is a segment. As upstream does it, a last
    segment of one latent is not upsampled in time: it decodes to one frame (6, 10, 14, ... latents).
    """

    package = "diffusers"
    padding = "replicate"
    """In height and width."""

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_channels

    @property
    def frames_per_latent(self) -> int:
        """Of a latent that is not the first."""
        return 2 ** sum(hasattr(getattr(up, "upsample", None), "temporal_conv") for up in self.vae.decoder.up)

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        factor = self.frames_per_latent
        size, rest = divmod(SEGMENT_FRAMES, int(self.vae.config.temporal_compress_times))
        if rest or not size:
            raise ValueError(
                f"temporal_compress_times must divide {SEGMENT_FRAMES}, else upstream's segments do not fit."
            )
        bounds = [0, *range(1 + size, latent_frames, size), latent_frames]
        groups, frame = [], 0
        for start, stop in pairwise(bounds):
            count = stop - start
            frames = 1 if count == 1 else factor * count - (factor - 1 if start == 0 else 0)
            groups.append(FrameGroup(slice(start, stop), slice(frame, frame + frames)))
            frame += frames
        return groups

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        middle = [self._residual(block) for block in (decoder.mid.block_1, decoder.mid.block_2)]
        blocks: Blocks = [[[self._entry]], middle]
        for up in reversed(decoder.up):
            units = [self._residual(block) for block in up.block]
            if hasattr(up, "upsample"):
                in_time = [partial(self._upsample_time, up.upsample)] if hasattr(up.upsample, "temporal_conv") else []
                units.append([*in_time, partial(self._upsample_space, up.upsample)])
            blocks.append(units)
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        (z,) = features
        x, cached = self._convolve(self.vae.decoder.conv_in, z, cached)
        return (x, z), cached

    def _residual(self, block: Any) -> list[Piece]:
        """A residual block as two pieces; its input travels beside the features to the second."""

        def first(features: Features, cached: Any) -> tuple[Features, Any]:
            x, z = features
            y, cached = self._convolve(block.conv1, self._activate(block.norm1, x, z, cached is None), cached)
            return (y, x, z), cached

        def second(features: Features, cached: Any) -> tuple[Features, Any]:
            y, x, z = features
            y, cached = self._convolve(block.conv2, self._activate(block.norm2, y, z, cached is None), cached)
            if block.in_channels != block.out_channels:
                x = block.nin_shortcut(x)
            return (x + y, z), cached

        return [first, second]

    def _activate(self, norm: Any, x: Tensor, z: Tensor, first: bool) -> Tensor:
        """The norm, scaled and shifted by the latents, and the activation."""
        frames = frames_per_latent(x.shape[2], z.shape[2], first_alone=first and x.shape[2] > 1)
        inside = getattr(norm.norm_layer, "norm_layer", None)
        parts = ("KVAECachedGroupNorm", norm.norm_layer), *[("KVAESafeConv3d", c) for c in (norm.conv_y, norm.conv_b)]
        if all(is_plain(part, (name,)) for name, part in parts) and takes(inside, x, z, frames):
            assert inside is not None and frames is not None
            return normed_silu(inside, x, norm.conv_y(z), norm.conv_b(z), frames)

        def function(x: Tensor, z: Tensor) -> Tensor:
            z = _spread(z, x, first)
            return F.silu(norm.norm_layer(x) * norm.conv_y(z) + norm.conv_b(z))

        return self.recomputed(function, x, z)

    def _convolve(self, convolution: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
        x, kept = with_past(x, cached, convolution.time_pad)
        h, w = convolution.height_pad, convolution.width_pad
        y = convolution.conv(F.pad(x, (w, w, h, h, 0, 0), mode=self.padding) if h or w else x)
        return y.to(x.dtype), kept  # under autocast, too, as upstream

    def _upsample_time(self, upsampler: Any, features: Features, cached: Any) -> tuple[Features, Any]:
        x, z = features
        x = self._repeated(x, cached is None)
        y, cached = self._convolve(upsampler.temporal_conv, x, cached)
        return (y + x, z), cached

    def _repeated(self, x: Tensor, first: bool) -> Tensor:
        """Each frame twice, but for the first of a video."""
        if x.shape[2] == 1:  # upstream's rule, also for a single latent at the end of a video
            return x
        return x.repeat_interleave(2, dim=2)[:, :, first:]

    def _upsample_space(self, upsampler: Any, features: Features, nothing: None) -> tuple[Features, None]:
        def each(x: Tensor) -> Tensor:
            x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
            return upsampler.linear(x + upsampler.spatial_conv(x)).to(x.dtype)

        x, z = features
        return (self.per_frame(each, x), z), nothing

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x, z = features
        x, cached = self._convolve(decoder.conv_out, self._activate(decoder.norm_out, x, z, cached is None), cached)
        return (x,), cached  # upstream does not clamp

    def modules(self) -> list[nn.Module]:
        return [self.vae.decoder]

    def check_windows(self) -> None:
        """Nothing to refuse: the class has a flag ``use_tiling``, and its decode does not read it."""

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents  # no published pipeline scales them, and the config has no scale

    def normalize(self, latents: Tensor) -> Tensor:
        return latents


def _spread(z: Tensor, like: Tensor, first: bool) -> Tensor:
    """Latents repeated to the size of features; the first latent of a video belongs to the first frame alone."""
    frames, size = like.shape[2], like.shape[3:]
    if not first or frames == 1:
        return F.interpolate(z, size=(frames, *size), mode="nearest")
    head = F.interpolate(z[:, :, :1], size=(1, *size), mode="nearest")
    return torch.cat([head, F.interpolate(z[:, :, 1:], size=(frames - 1, *size), mode="nearest")], dim=2)
