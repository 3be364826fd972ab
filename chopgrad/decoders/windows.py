"""Windows in place of a cache: VAEs that decode tiles of the time axis which overlap, and blend the overlaps."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames


class WindowDecoder(CausalDecoder):
    """The temporally tiled decode of ``AutoencoderKLHunyuanVideo`` and ``AutoencoderKLLTXVideo`` as a recurrence.

    A group takes the latents of one temporal tile, and neighbours overlap in latents. Its frames are blended with the
    last ones of the tile before, which are the state; it yields those that no later tile changes. So the receptive
    field ends with the tile, and one tile is in memory at a time.

    Pieces: halves of residual blocks, upsamplers, the head, and last the blending, which has the state. Where the VAE
    also tiles in space (``enable_tiling``) there is one piece, and ``checkpoint="frame"`` recomputes each spatial tile.
    """

    package = "diffusers"
    own_methods = ("decode", "_decode", "_temporal_tiled_decode", "tiled_decode", "blend_t")
    dropped: ClassVar[slice]
    """What is left of the frames of a later tile: upstream drops one, because a tile begins with a single frame."""

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Frames per latent, latents in a tile (it takes one more), latents from one tile to the next."""
        ratio = self.vae.temporal_compression_ratio
        return ratio, self.vae.tile_sample_min_num_frames // ratio, self.vae.tile_sample_stride_num_frames // ratio

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        self._check_sizes()
        ratio, size, stride = self._sizes
        if latent_frames <= size:
            return [FrameGroup(slice(0, latent_frames), slice(0, (latent_frames - 1) * ratio + 1))]
        groups, frame = [], 0
        # A tile of one latent at the end yields nothing.
        for start in (0, *range(stride, latent_frames - 1, stride)):
            stop = min(start + size + 1, latent_frames)
            end = frame + min(stride, stop - start - 1) * ratio + (start == 0)
            groups.append(FrameGroup(slice(start, stop), slice(frame, end)))
            frame = end
        return groups

    def check_windows(self) -> None:
        if not self.vae.use_framewise_decoding:
            raise ValueError(
                f"{type(self.vae).__name__} decodes all frames at once, so that there are no groups: set "
                "vae.use_framewise_decoding = True, which decodes temporal tiles and blends them (the frames differ a "
                "little), or use vae.enable_gradient_checkpointing() and ordinary back-propagation."
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        vae, ratio = self.vae, self.vae.temporal_compression_ratio
        size, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
        if size % ratio or stride % ratio or not 0 < stride <= size:
            raise ValueError(
                f"Temporal tiles of {size} frames at steps of {stride} do not fit {ratio} frames per latent: the VAE's "
                "own decode would leave out or repeat frames. Set vae.tile_sample_min_num_frames and "
                f"vae.tile_sample_stride_num_frames to multiples of {ratio}, the second not above the first."
            )

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        tile = [[[self._tile]]] if self.vae.use_tiling else self.tile_blocks()
        return [*tile, [[self._blend]]]

    @abstractmethod
    def tile_blocks(self) -> Blocks:
        """The pieces of ``tile``, none of which has a state."""

    @abstractmethod
    def tile(self, x: Tensor) -> Tensor:
        """The frames of the latents of one tile, by the stock decoder."""

    def _tile(self, features: Features, nothing: None) -> tuple[Features, None]:
        """All of a temporal tile, in spatial tiles as ``vae.tiled_decode`` lays and blends them."""
        (x,), vae = features, self.vae
        ratio = vae.spatial_compression_ratio
        height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
        if x.shape[-2] <= height and x.shape[-1] <= width:
            return (self.recomputed(self.tile, x),), nothing
        down, across = vae.tile_sample_stride_height, vae.tile_sample_stride_width
        over_height, over_width = vae.tile_sample_min_height - down, vae.tile_sample_min_width - across
        tiles: list[list[Tensor]] = []
        for top in range(0, x.shape[-2], down // ratio):
            tiles.append([])
            for left in range(0, x.shape[-1], across // ratio):
                part = x[..., top : top + height, left : left + width]
                tiles[-1].append(self.recomputed(self.tile, part))
        rows = []
        for i, row in enumerate(tiles):
            for j in range(len(row)):
                if i > 0:
                    row[j] = vae.blend_v(tiles[i - 1][j], row[j], over_height)
                if j > 0:
                    row[j] = vae.blend_h(row[j - 1], row[j], over_width)
            rows.append(torch.cat([frames[..., :down, :across] for frames in row], dim=-1))
        return (torch.cat(rows, dim=-2)[..., : x.shape[-2] * ratio, : x.shape[-1] * ratio],), nothing

    def _blend(self, features: Features, before: Any) -> tuple[Features, Any]:
        """Final frames, and those that the next tile is blended with; "begun" where tiles do not overlap."""
        (frames,) = features
        ratio, size, stride = self._sizes
        if before is None and frames.shape[2] <= (size - 1) * ratio + 1:
            return features, None  # so few latents are not tiled
        final = stride * ratio + (before is None)
        if before is not None:
            frames = frames[:, :, self.dropped]
        if isinstance(before, Tensor):
            frames = cross_fade(before, frames)
        overlap = min((size - stride) * ratio, frames.shape[2])
        return (frames[:, :, :final],), frames[:, :, -overlap:].clone() if overlap else "begun"

    def residual(self, block: Any) -> list[Piece]:
        """A residual block as two pieces; its input travels beside the features to the second."""

        def first(features: Features, nothing: None) -> tuple[Features, None]:
            (x,) = features
            return (self.convolve(block.conv1, self.activate(block.norm1, block.nonlinearity, x)), x), nothing

        def second(features: Features, nothing: None) -> tuple[Features, None]:
            y, x = features
            y = self.convolve(block.conv2, block.dropout(self.activate(block.norm2, block.nonlinearity, y)))
            return (y + self.shortcut(block, x),), nothing

        return [first, second]

    def convolve(self, convolution: Any, x: Tensor) -> Tensor:
        return convolution(x)

    def activate(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        return self.recomputed(lambda x: activation(norm(x)), x)

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        return x if block.conv_shortcut is None else block.conv_shortcut(x)


def cross_fade(before: Tensor, frames: Tensor) -> Tensor:
    """The first frames blended linearly with the last ones before, as ``vae.blend_t`` does it, but not in place."""
    count = min(before.shape[2], frames.shape[2])
    ending = before[:, :, before.shape[2] - count :]
    # Frame by frame with numbers for weights, which are not rounded to the frames' precision.
    mixed = [ending[:, :, i : i + 1] * (1 - i / count) + frames[:, :, i : i + 1] * (i / count) for i in range(count)]
    return torch.cat([*mixed, frames[:, :, count:]], dim=2)


def stateless(module: Any, **settings: Any) -> Piece:
    """A module of the main features as a piece."""
    return partial(_run, module, settings)


def _run(module: Any, settings: dict[str, Any], features: Features, nothing: None) -> tuple[Features, None]:
    return (module(features[0], **settings), *features[1:]), nothing
