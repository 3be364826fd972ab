"""CogVideoX: two latents per group; with an odd number of latents the first group takes one more."""

from __future__ import annotations

from torch import Tensor

from chopgrad.decoders.base import CausalDecoder, FrameGroup, State, check_latent_frames


class CogVideoXDecoder(CausalDecoder):
    """``AutoencoderKLCogVideoX``.

    The state is upstream's nested dict of cached features, less the entries of 1x1x1 convolutions: upstream stores the
    whole upsampled latent there and never reads it.
    """

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

    def step(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        x, cache = self.vae.decoder(z, conv_cache=state)
        return self._finish(x), _without_pointwise(cache)

    def _finish(self, frames: Tensor) -> Tensor:
        return frames  # upstream does not clamp either

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def normalize(self, latents: Tensor) -> Tensor:
        return latents * self.vae.config.scaling_factor


def _without_pointwise(cache: dict) -> dict:
    return {
        key: _without_pointwise(value) if isinstance(value, dict) else value
        for key, value in cache.items()
        if key not in ("conv_y", "conv_b")
    }
