"""CogVideoX: two latents per group; with an odd number of latents the first group takes one more."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, State, check_latent_frames
from chopgrad.decoders.latents import ScaledLatents
from chopgrad.pieces.cogvideox import residual
from chopgrad.pieces.group_norm import frames_per_latent, normed_silu, takes
from chopgrad.pieces.plain import is_plain


class CogVideoXDecoder(ScaledLatents, CausalDecoder):
    """``AutoencoderKLCogVideoX``.

    A piece is one half of a residual block (norm, activation, convolution), an upsampler or the head; the latent goes
    beside the features, because every norm reads it. The slices of the state are the cached features of the
    convolutions, less those of 1x1x1 convolutions: upstream stores the whole upsampled latent there and never reads it.
    """

    package = "diffusers"

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        size = self.vae.num_latent_frames_batch_size
        count = max(latent_frames // size, 1)
        extra = latent_frames - size * count
        factor = int(self.vae.config.temporal_compression_ratio)
        groups, latent, frame = [], 0, 0
        for i in range(count):
            n = size + (extra if i == 0 else 0)
            # Upsampling leaves the first latent of a group with an odd number of latents one frame long.
            frames = n * factor if n % 2 == 0 else 1 + (n - 1) * factor
            groups.append(FrameGroup(slice(latent, latent + n), slice(frame, frame + frames)))
            latent, frame = latent + n, frame + frames
        return groups

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        blocks: Blocks = [[[self._entry]], [residual(block, self._activate) for block in decoder.mid_block.resnets]]
        for up in decoder.up_blocks:
            units = [residual(block, self._activate) for block in up.resnets]
            units += [[partial(_upsample, upsampler)] for upsampler in up.upsamplers or []]
            blocks.append(units)
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        (z,) = features
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        x, cached = self.vae.decoder.conv_in(z, conv_cache=cached)
        return (x, z), cached

    def _activate(self, norm: Any, activation: Any, x: Tensor, z: Tensor) -> Tensor:
        odd = x.shape[2] > 1 and x.shape[2] % 2 == 1
        frames = frames_per_latent(x.shape[2], z.shape[2], first_alone=odd)
        parts = ("CogVideoXSpatialNorm3D", norm), ("SiLU", activation), *_convolutions(norm)
        if all(is_plain(part, (name,)) for name, part in parts) and takes(norm.norm_layer, x, z, frames):
            assert frames is not None
            return normed_silu(norm.norm_layer, x, norm.conv_y(z)[0], norm.conv_b(z)[0], frames)
        # The norm's second result is a cache of its 1x1x1 convolutions, which need none.
        return self.recomputed(lambda x, z: activation(norm(x, z)[0]), x, z)

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x, z = features
        x, cached = decoder.conv_out(self._activate(decoder.norm_out, decoder.conv_act, x, z), conv_cache=cached)
        return (x,), cached  # upstream does not clamp


def _convolutions(norm: Any) -> list[tuple[str, Any]]:
    """Of a norm's scale and shift."""
    both = [getattr(norm, name, None) for name in ("conv_y", "conv_b")]
    inside = [("CogVideoXSafeConv3d", getattr(x, "conv", None)) for x in both]
    return [*[("CogVideoXCausalConv3d", x) for x in both], *inside]


def _upsample(upsampler: Any, features: Features, nothing: None) -> tuple[Features, None]:
    x, z = features
    return (upsampler(x), z), nothing
