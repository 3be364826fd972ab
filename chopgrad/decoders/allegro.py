"""Allegro: windows of six latents (24 frames) at steps of four, always in spatial tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chopgrad.decoders.base import (
    Blocks,
    CausalDecoder,
    Checkpoint,
    Features,
    FrameGroup,
    State,
    check_latent_frames,
)
from chopgrad.decoders.latents import ScaledLatents
from chopgrad.recurrence import unpatched


class AllegroDecoder(ScaledLatents, CausalDecoder):
    """``AutoencoderKLAllegro``, frames as [batch, 3, frames, H, W] (its own decode puts the frames first).

    A window is blended with the last frames of the one before, which are the state. A group that is not the last takes
    one more latent, by which alone a step knows it: the last yields its last frames itself. A group is one piece;
    ``checkpoint="frame"`` recomputes each spatial tile, and ``vae.enable_gradient_checkpointing()`` works within.

    Frames equal those of the VAE's decode but for the order of rounding, because it weighs each spatial tile in time
    before it adds them. It leaves black what its tiles do not cover; such sizes are refused.
    The trial in ``decoder_for`` runs on ten latents of 40x40, the least that it takes: on a CPU use ``check=False``.
    """

    package = "diffusers"
    own_methods = ("decode", "_decode", "tiled_decode")

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, clamp, checkpoint)
        self.trial_size = max(self.vae.kernel[1:]) // self.vae.spatial_compression_ratio

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def _sizes(self) -> list[tuple[int, int, int]]:
        """In time, height and width: pixels per latent, latents in a tile, and from one tile to the next."""
        vae = self.vae
        ratios = (int(vae.config.temporal_compression_ratio), *[vae.spatial_compression_ratio] * 2)
        return [(r, size // r, step // r) for r, size, step in zip(ratios, vae.kernel, vae.stride, strict=True)]

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        ratio, size, step = self._sizes[0]
        if size > 2 * step or self.vae.kernel[0] % ratio or self.vae.stride[0] % ratio:
            raise ValueError(
                f"Windows of {self.vae.kernel[0]} frames at steps of {self.vae.stride[0]} are not taken: set "
                f"vae.kernel and vae.stride to multiples of {ratio} frames, the first at most twice the second."
            )
        starts = _starts("latent frames", latent_frames, size, step)
        groups, frame = [], 0
        for start in starts:
            last = start == starts[-1]
            end = frame + (size if last else step) * ratio
            groups.append(FrameGroup(slice(start, start + size + (not last)), slice(frame, end)))
            frame = end
        return groups

    def check_windows(self) -> None:
        if not self.vae.use_tiling:
            raise ValueError("Allegro decodes in tiles only: call vae.enable_tiling().")

    def initial_state(self) -> State:
        return (None,)

    def blocks(self) -> Blocks:
        return [[[self._group]]]

    def _group(self, features: Features, before: Any) -> tuple[Features, Any]:
        (x,), (ratio, size, step) = features, self._sizes[0]
        last, overlap = x.shape[2] == size, (size - step) * ratio
        x = self.vae.post_quant_conv(x[:, :, :size].transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1))
        frames = self._window(x.transpose(1, 2))
        if isinstance(before, Tensor):
            rising = (torch.arange(overlap, device=x.device) / overlap).view(-1, 1, 1)
            begun = before * (1 - rising) + frames[:, :, :overlap] * rising
            frames = torch.cat([begun.to(frames.dtype), frames[:, :, overlap:]], dim=2)
        if last:
            return (frames,), None
        final = step * ratio
        return (frames[:, :, :final],), frames[:, :, final:].clone() if overlap else None

    def _window(self, x: Tensor) -> Tensor:
        """The frames of one window, blended from spatial tiles."""
        _, (ratio, height, down), (_, width, across) = self._sizes
        tops = _starts("latent rows", x.shape[-2], height, down)
        lefts = _starts("latent columns", x.shape[-1], width, across)
        shape = (x.shape[0], self.vae.config.out_channels, self.vae.kernel[0])
        video = x.new_zeros((*shape, x.shape[-2] * ratio, x.shape[-1] * ratio))
        for top in tops:
            for left in lefts:
                tile = self.recomputed(self.vae.decoder, x[..., top : top + height, left : left + width])
                over_height, over_width = (height - down) * ratio, (width - across) * ratio
                weight = _weight(tile.shape[-2], over_height, top, tops, x).view(-1, 1)
                tile = tile * weight * _weight(tile.shape[-1], over_width, left, lefts, x)
                there = slice(top * ratio, (top + height) * ratio), slice(left * ratio, (left + width) * ratio)
                video[..., there[0], there[1]] += tile
        return video

    def own_decode(self, latents: Tensor) -> Tensor:
        frames = [unpatched(self.vae, "decode")(z, return_dict=False)[0] for z in latents.split(1)]
        return torch.cat(frames).transpose(1, 2)  # upstream takes one video at a time

    def answer(self, decode: Callable[[Tensor], Tensor], z: Tensor, return_dict: bool = True) -> Any:
        return super().answer(lambda z: decode(z).transpose(1, 2), z, return_dict)


def _starts(name: str, length: int, size: int, step: int) -> list[int]:
    if length < size or (length - size) % step:
        raise ValueError(
            f"Allegro's tiles cover {size}, {size + step}, {size + 2 * step}, ... {name} and its own decode leaves the "
            f"rest black: pass such a number, got {length}."
        )
    return list(range(0, length - size + 1, step))


def _weight(size: int, overlap: int, start: int, starts: list[int], like: Tensor) -> Tensor:
    """Along height or width: rising where a tile came before, falling where one comes after."""
    weight = torch.ones(size, device=like.device)
    rising = torch.arange(overlap, device=like.device) / max(overlap, 1)
    if start != starts[0]:
        weight[:overlap] *= rising
    if start != starts[-1]:
        weight[size - overlap :] *= 1 - rising
    return weight.to(like.dtype)
