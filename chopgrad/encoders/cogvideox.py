"""CogVideoX: eight frames per group; with one frame more the first group takes it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from chopgrad.encoders.base import Blocks, CausalEncoder, Features, LatentGroup, State, check_frames, refused
from chopgrad.pieces.cogvideox import residual


class CogVideoXEncoder(CausalEncoder):
    """``AutoencoderKLCogVideoX``.

    A piece is one half of a residual block (norm, activation, convolution), a downsampler, or the head with the
    quantisation. The slices of the state are the cached features of the convolutions. Its norms are over all frames of
    a group.
    """

    package = "diffusers"

    @property
    def source_channels(self) -> int:
        return self.vae.encoder.conv_in.conv.in_channels

    @property
    def spatial_factor(self) -> int:
        return 2 ** sum(len(down.downsamplers or ()) for down in self.vae.encoder.down_blocks)

    def latent_groups(self, frames: int) -> list[LatentGroup]:
        check_frames(frames)
        size = self.vae.num_sample_frames_batch_size
        count, beyond = divmod(frames, size)
        if beyond > 1 or (not count and frames > 1):
            why = f"it takes 1, {size}k or {size}k + 1, and others become latents that decode to another number"
            raise refused(frames, size * count + 1, size * (count + 1), why)
        factor = int(self.vae.config.temporal_compression_ratio)
        groups, frame, latent = [], 0, 0
        for i in range(max(count, 1)):
            taken = frames - size * max(count - 1, 0) if i == 0 else size
            made = -(-taken // factor)  # of an odd number the first frame stays alone
            groups.append(LatentGroup(slice(frame, frame + taken), slice(latent, latent + made)))
            frame, latent = frame + taken, latent + made
        return groups

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        encoder = self.vae.encoder
        blocks: Blocks = [[[self._entry]]]
        for down in encoder.down_blocks:
            units = [residual(block, self._activate) for block in down.resnets]
            units += [[partial(_downsample, downsampler)] for downsampler in down.downsamplers or []]
            blocks.append(units)
        return [*blocks, [residual(block, self._activate) for block in encoder.mid_block.resnets], [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        x, cached = self.vae.encoder.conv_in(features[0], conv_cache=cached)
        return (x,), cached

    def _activate(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        return self.recomputed(lambda x: activation(norm(x)), x)

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        encoder = self.vae.encoder
        x = self._activate(encoder.norm_out, encoder.conv_act, features[0])
        x, cached = encoder.conv_out(x, conv_cache=cached)
        return (x if self.vae.quant_conv is None else self.vae.quant_conv(x),), cached


def _downsample(downsampler: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """In height, width and, where the block compresses it, in time; it looks back at no earlier group."""
    return (downsampler(features[0]),), nothing
