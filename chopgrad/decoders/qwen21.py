"""Qwen-Image 2.1: a decoder of images, so that there is one group."""

from __future__ import annotations

from chopgrad.decoders.base import FrameGroup, check_latent_frames
from chopgrad.decoders.wan import WanDecoder


class QwenImage21Decoder(WanDecoder):
    """``AutoencoderKLQwenImage21``: the structure of Wan 2.2 with convolutions in space only.

    One latent becomes one frame, and upstream raises for more. What is gained is the walk over pieces
    (``Exact(pieces=True)``), which keeps the graph of one piece at a time; a strategy that truncates cuts nothing.
    """

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        if latent_frames > 1:
            raise ValueError(
                f"{type(self.vae).__name__} decodes images, one latent each, and not videos: got {latent_frames} "
                "latents. Pass images as a batch, [batch, channels, 1, h, w]."
            )
        return [FrameGroup(slice(0, 1), slice(0, 1))]
