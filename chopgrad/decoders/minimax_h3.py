"""MiniMax-H3: windows of seven latents at steps of five; each yields 17 frames, and the last five frames more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, State, check_latent_frames
from chopgrad.decoders.latents import mean_and_std


class MiniMaxH3Decoder(CausalDecoder):
    """``AutoencoderKLMiniMaxH3``: its decoder is a transformer that attends to all latents of a window.

    A window is blended with the last frames of the one before, which are the state. A group that is not the last takes
    one more latent, by which alone a step knows it: the last yields its last frames itself, and repeats the last latent
    where its window is not full, as upstream does.

    A group is one piece. With spatial tiles, which are on by default and belong to the published model,
    ``checkpoint="frame"`` recomputes each of them, and ``vae.enable_gradient_checkpointing()`` each transformer block.

    Frames are normalised with ImageNet's mean and standard deviation, as the VAE's own decode gives them.
    """

    package = "diffusers"
    own_methods = ("decode", "_decode", "_decode_clip")

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def _window(self) -> int:
        return self.vae.tokens_chunk_size + self.vae.token_overlap

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        step, dropped = self.vae.tokens_chunk_size, self.vae.config.token_drop
        if not 0 <= dropped < step:
            raise ValueError(
                f"token_drop={dropped} is not below the {step} latents of a chunk: no VAE is known for it."
            )
        count = math.ceil((latent_frames + dropped) / step) - (dropped > 0)
        if count < 1:
            raise ValueError(
                f"MiniMax-H3 decodes at least {step - dropped + 1} latents (its own decode fails on fewer), got "
                f"{latent_frames}."
            )
        groups, frame = [], 0
        for start in range(0, count * step, step):
            stop = min(start + self._window + (start + step < count * step), latent_frames)
            end = frame + self._frames(stop - start)
            groups.append(FrameGroup(slice(start, stop), slice(frame, end)))
            frame = end
        return groups

    def _frames(self, latents: int) -> int:
        """Frames that a group of so many latents yields; the last latent of a chunk stands for fewer of them."""
        vae, ratio = self.vae, self.vae.temporal_compression_ratio
        final = vae.tokens_chunk_size * ratio - vae.frame_pre_padding
        if latents > self._window:
            return final
        ending = max(vae.token_overlap * ratio - vae.frame_pre_padding, 0)
        short = vae.config.clip_length % ratio or ratio
        repeated = range(latents, self._window)
        return final + ending - sum(short if i % vae.tokens_chunk_size == 0 else ratio for i in repeated)

    def check_windows(self) -> None:
        """Spatial tiles are those of the VAE itself."""

    def initial_state(self) -> State:
        return (None,)

    def blocks(self) -> Blocks:
        return [[[self._group]]]

    def _group(self, features: Features, before: Any) -> tuple[Features, Any]:
        (x,), vae = features, self.vae
        latents = x.shape[2]
        x = x[:, :, : self._window].to(vae.post_quant_conv.weight.dtype)
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, self._window - x.shape[2], -1, -1)], dim=2)
        clip = self._clip(x)
        size, padding = vae.tokens_chunk_size * vae.temporal_compression_ratio, vae.frame_pre_padding
        frames, ending = clip[:, :, padding:size], clip[:, :, size + padding :]
        if isinstance(before, Tensor):
            frames = vae._blend(before, frames, vae.frame_overlap, dim=-3)
        if latents > self._window:
            return (frames,), ending.clone() if ending.shape[2] else None
        return (torch.cat([frames, ending], dim=2)[:, :, : self._frames(latents)],), None

    def _clip(self, x: Tensor) -> Tensor:
        """The frames of one window; in spatial tiles, laid and blended by the VAE."""
        vae, ratio = self.vae, self.vae.spatial_compression_ratio
        if not vae.use_tiling:
            return self.recomputed(self._decode, x)
        tops, heights, over_height = vae._split_tiles(
            x.shape[-2] * ratio, vae.tile_sample_min_height, vae.tile_sample_min_overlap_height
        )
        lefts, widths, over_width = vae._split_tiles(
            x.shape[-1] * ratio, vae.tile_sample_min_width, vae.tile_sample_min_overlap_width
        )
        down = [slice(top // ratio, top // ratio + n // ratio) for top, n in zip(tops, heights, strict=True)]
        across = [slice(left // ratio, left // ratio + n // ratio) for left, n in zip(lefts, widths, strict=True)]
        tiles = [[self.recomputed(self._decode, x[..., i, j]) for j in across] for i in down]
        return vae._stitch_tiles(tiles, over_height, over_width)

    def _decode(self, x: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(x))

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return mean_and_std(self.vae.config, like)
