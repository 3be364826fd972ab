"""The VAE of Kandinsky 6's video super-resolution: one latent per group; one frame, then four per latent."""

from __future__ import annotations

from torch import Tensor

from chopgrad.decoders.base import FrameGroup, check_latent_frames
from chopgrad.decoders.kvae import KVAEDecoder
from chopgrad.decoders.latents import ScaledLatents


class Kandinsky6Decoder(ScaledLatents, KVAEDecoder):
    """``Kandinsky6SRVAE``: its ``decode(z)``, which takes latents alone, and not the pipeline's blending of tiles.

    The structure of ``KVAEDecoder`` with norms over channels only and zeros around the frames. So upstream's segments
    of four latents do not change what it gives, and a group is one latent: a quarter of a segment's memory.
    """

    padding = "constant"

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        starts = [0] + [1 + self.frames_per_latent * i for i in range(latent_frames)]
        return [FrameGroup(slice(i, i + 1), slice(starts[i], starts[i + 1])) for i in range(latent_frames)]

    def _repeated(self, x: Tensor, first: bool) -> Tensor:
        return x.repeat_interleave(2, dim=2)[:, :, first:]
