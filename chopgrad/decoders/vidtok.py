"""VidTok: one latent per group; frames leave later than their latent, because upsampling looks one frame ahead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.causal import with_past
from chopgrad.recurrence import Checkpoint, unpatched


class VidTokDecoder(CausalDecoder):
    """``AutoencoderVidTok`` with ``is_causal=True``, of continuous (``"kl"``) and of quantised (``"fsq"``) latents.

    What is reproduced is ``decode`` without tiles: all latents at once. With tiles the VAE also cuts time into chunks,
    which gives other frames, and is refused. Indices have no gradient; ``decode_from_indices`` works where the VAE is
    patched.

    Convolutions are causal, but upsampling in time interpolates linearly, and so waits for the frame that follows. The
    frames of a group are those that its latents settle: the first latent, which is interpolated alone, one frame; the
    second one frame; each later one as many as are compressed in a latent. The last group adds what has been waiting;
    it takes the latent before its own, too, without reading it, which is how a step knows it.

    A piece is one half of a residual block, an attention, an upsampler in space, one in time, or the head. Its slice of
    the state is the last frames of the convolution's input. What tells the last group travels beside the features: the
    latent that is not read, of zero size elsewhere.

    Upstream interpolates in float32; a float64 model does so in float64 here.
    """

    package = "diffusers"

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto") -> None:
        super().__init__(vae, clamp, checkpoint)
        if not self.vae.is_causal:
            raise ValueError(
                "This VidTok is not causal (is_causal=False): every frame depends on later ones, so that it has no "
                "frame groups. Decode it as it is, or use a causal VidTok."
            )
        factors = [up.upsample.num_temp_upsample for up in self._levels() if up is not None]
        factor, expected = self.vae.temporal_compression_ratio, [2**i for i in range(len(factors))]
        if factors != expected or 2 ** len(factors) != factor:
            raise ValueError(
                f"This VidTok compresses time {factor} times and decodes it {2 ** len(factors)} times (tempo_ds and "
                "tempo_us), so that its first latent is not decoded alone: give the two as many levels, all of them "
                "among those upsampled in space (spatial_us)."
            )

    def _levels(self) -> list[Any]:
        """Of each level, in order of use, what upsamples in time, or None."""
        decoder = self.vae.decoder
        levels = range(decoder.num_resolutions)[::-1]
        both = set(decoder.spatial_us) & set(decoder.tempo_us)
        return [decoder.up_temporal[i] if i in both else None for i in levels]

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_channels

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        last, factor = latent_frames - 1, self.vae.temporal_compression_ratio
        stops = [1, *(2 + factor * i for i in range(last - 1)), 1 + factor * last][: last + 1]
        takes = [slice(i - 1 if 0 < i == last else i, i + 1) for i in range(latent_frames)]
        return [FrameGroup(takes[i], slice(stops[i - 1] if i else 0, stops[i])) for i in range(latent_frames)]

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        middle = decoder.mid
        blocks: Blocks = [
            [[self._entry]],
            [self._residual(middle.block_1), [partial(_attend, middle.attn_1)], self._residual(middle.block_2)],
        ]
        for i, in_time in zip(range(decoder.num_resolutions)[::-1], self._levels(), strict=True):
            units = []
            for space, time in zip(decoder.up[i].block, decoder.up_temporal[i].block, strict=True):
                units += [self._residual(space), self._residual(time)]
            if i in decoder.spatial_us:
                units.append([partial(self._upsample_space, decoder.up[i].upsample)])
            if in_time is not None:
                units.append([partial(_upsample_time, in_time.upsample)])
            blocks.append(units)
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        unread, z = features[0][:, :, :-1], features[0][:, :, -1:]
        x, cached = _convolve(self.vae.decoder.conv_in, z, cached)
        return (x, unread), cached

    def _residual(self, block: Any) -> list[Piece]:
        """A residual block, in time and space or one of them, as two pieces; its input travels to the second."""

        def activate(norm: Any, x: Tensor) -> Tensor:
            return self.per_frame(lambda x: block.nonlinearity(norm(x)), x)

        def first(features: Features, cached: Any) -> tuple[Features, Any]:
            x, unread = features
            y, cached = _convolve(block.conv1, activate(block.norm1, x), cached)
            return (y, x, unread), cached

        def second(features: Features, cached: Any) -> tuple[Features, Any]:
            y, x, unread = features
            y, cached = _convolve(block.conv2, block.dropout(activate(block.norm2, y)), cached)
            if block.in_channels != block.out_channels:
                x, _ = _convolve(block.nin_shortcut, x, None)  # of one frame: it caches nothing
            return (x + y, unread), cached

        return [first, second]

    def _upsample_space(self, upsample: Any, features: Features, nothing: None) -> tuple[Features, None]:
        return (self.per_frame(partial(_per_image, upsample), features[0]), features[1]), nothing

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x = self.per_frame(lambda x: decoder.nonlinearity(decoder.norm_out(x)), features[0])
        first = cached is None
        x, cached = _convolve(decoder.conv_out, x, cached)
        return (x[:, :, -1:] if first else x,), cached  # upstream does not clamp

    def own_decode(self, latents: Tensor) -> Tensor:
        try:
            return unpatched(self.vae, "decode")(latents)
        finally:
            self.vae._empty_causal_cached(self.vae.decoder)  # where upstream would keep features of all levels

    def answer(  # type: ignore[override]
        self, decode: Callable[[Tensor], Tensor], z: Tensor, decode_from_indices: bool = False
    ) -> Tensor:
        if decode_from_indices:
            z = self.vae.indices_to_latent(z)
        (frames,) = super().answer(decode, z, return_dict=False)
        return frames

    def denormalize(self, latents: Tensor) -> Tensor:
        """The same: VidTok's latents are not scaled."""
        return latents

    def normalize(self, latents: Tensor) -> Tensor:
        return latents


def _convolve(convolution: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A convolution in space, or a causal one in time or both, and the last frames of its input for the next group.

    Upstream's causal modules keep their input on themselves, so the convolution inside is called instead.
    """
    if not hasattr(convolution, "time_pad"):
        return _per_image(convolution, x), None
    if convolution.time_pad:
        x, cached = with_past(x, cached, convolution.time_pad)
    if isinstance(convolution.conv, nn.Conv1d):
        pixels = x.permute(0, 3, 4, 1, 2)
        y = convolution.conv(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])
        return y.permute(0, 3, 4, 1, 2), cached
    return convolution.conv(F.pad(x, convolution.spatial_padding, mode=convolution.pad_mode)), cached


def _per_image(function: Any, x: Tensor) -> Tensor:
    """What works on images, on the frames of a video."""
    images = function(x.transpose(1, 2).flatten(0, 1))
    return images.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _attend(block: Any, features: Features, nothing: None) -> tuple[Features, None]:
    """Attention inside each frame."""
    x, unread = features
    y = block.norm(x)
    q, k, v = (_convolve(each, y, None)[0].permute(0, 2, 3, 4, 1).flatten(2, 3) for each in (block.q, block.k, block.v))
    y = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
    return (x + _convolve(block.proj_out, y, None)[0], unread), nothing


def _upsample_time(upsampler: Any, features: Features, before: Any) -> tuple[Features, Any]:
    """Two frames out of each: those of the first latent by themselves, those of all others as one sequence.

    Args:
        before: the last frame, once there is one of the sequence, and what the convolution looks back at.
    """
    x, unread = features
    frame, cached = before if before is not None else (None, None)
    kept = None if before is None else x[:, :, -1:].clone()
    x = x if frame is None else torch.cat([frame, x], dim=2)
    x = _interpolate(x, start=frame is None, end=before is None or unread.shape[2] > 0)
    alpha = upsampler.mix_factor.sigmoid()
    y, cached = _convolve(upsampler.conv, x, cached)
    return (alpha * x + (1 - alpha) * y, unread), (kept, cached)


def _interpolate(x: Tensor, start: bool, end: bool) -> Tensor:
    """Two frames between each and the next, at a quarter and three quarters; at an end that is there, a frame as it is.

    This is linear interpolation by two whose outer half frames are left out where the sequence goes on.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide[:, :, :-1], wide[:, :, 1:]
    between = torch.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], dim=3).flatten(2, 3).to(x)
    return torch.cat([x[:, :, :1]] * start + [between] + [x[:, :, -1:]] * end, dim=2)
