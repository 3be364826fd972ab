"""Mochi: one latent per group, the first decodes to one frame and each later one to six."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.causal import with_past
from chopgrad.decoders.latents import mean_and_std


class MochiDecoder(CausalDecoder):
    """``AutoencoderKLMochi``: its ``decode`` as it is by default, of all latents at once.

    Every convolution is causal, its norms are per frame, and a latent becomes its frames without a look at others: so a
    latent at a time is exact, where a convolution is handed the last frames of its input. The VAE's own frame-wise
    decode is no reference: it raises. ``drop_last_temporal_frames`` is read as the VAE reads it: where it is set, as it
    is by default, the first latent leaves its last frame only.

    A piece is one half of a residual block (norm, activation, convolution), the end of a level (a projection, unfolded
    in time and space) or the head. Its slice of the state is the last frames of the convolution's input.
    """

    package = "diffusers"

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        factor, dropped = self.vae.temporal_compression_ratio, self._dropped
        stops = [factor * (i + 1) - dropped for i in range(latent_frames)]
        return [FrameGroup(slice(i, i + 1), slice(stops[i - 1] if i else 0, stops[i])) for i in range(latent_frames)]

    @property
    def _dropped(self) -> int:
        """Frames that are left out at the start."""
        return self.vae.temporal_compression_ratio - 1 if self.vae.drop_last_temporal_frames else 0

    def check_windows(self) -> None:
        super().check_windows()
        padding = {m.pad_mode for m in self.vae.decoder.modules() if hasattr(m, "pad_mode")}
        if self.vae.use_framewise_decoding or padding != {"replicate"}:
            raise ValueError(
                "The VAE decodes frame-wise (_enable_framewise_decoding), where its own decode raises: load it again. "
                "chopgrad decodes a latent at a time in any case, and gives what the VAE gives by default."
            )

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        blocks: Blocks = [[[self._entry]], [self._residual(block) for block in decoder.block_in.resnets]]
        for up in decoder.up_blocks:
            blocks.append([*(self._residual(block) for block in up.resnets), [partial(_upsample, up)]])
        return [*blocks, [self._residual(block) for block in decoder.block_out.resnets], [[self._head]]]

    def _entry(self, features: Features, nothing: None) -> tuple[Features, None]:
        return (self.vae.decoder.conv_in(features[0]),), nothing

    def _residual(self, block: Any) -> list[Piece]:
        """A residual block as two pieces; its input travels beside the features to the second."""

        def activate(norm: Any, x: Tensor) -> Tensor:
            return self.per_frame(lambda x: block.nonlinearity(norm(x)), x)

        def first(features: Features, cached: Any) -> tuple[Features, Any]:
            (x,) = features
            y, cached = _convolve(block.conv1, activate(block.norm1, x), cached)
            return (y, x), cached

        def second(features: Features, cached: Any) -> tuple[Features, Any]:
            y, x = features
            y, cached = _convolve(block.conv2, activate(block.norm2, y), cached)
            return (y + x,), cached

        return [first, second]

    def _head(self, features: Features, seen: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x = features[0] if seen else features[0][:, :, self._dropped :]
        return (_project(decoder.proj_out, decoder.nonlinearity(x)),), "seen"  # upstream does not clamp

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return like.new_zeros(()), like.new_ones(())  # as the pipeline has it
        return mean_and_std(config, like)


def _convolve(causal: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution, and the last frames of its input for the next group.

    Upstream's module repeats the first frame of whatever it is given, so its inner convolution is called instead.
    """
    x, kept = with_past(x, cached, causal.time_pad)
    sides = (causal.width_pad, causal.width_pad, causal.height_pad, causal.height_pad, 0, 0)
    return causal.conv(F.pad(x, sides, mode="replicate")), kept


def _project(linear: Any, x: Tensor) -> Tensor:
    """A linear layer over channels."""
    return linear(x.movedim(1, -1)).movedim(-1, 1)


def _upsample(up: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """Channels become frames, rows and columns."""
    x = _project(up.proj, features[0])
    time, space = up.temporal_expansion, up.spatial_expansion
    x = x.unflatten(1, (-1, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return (x.flatten(6, 7).flatten(4, 5).flatten(2, 3),), nothing
