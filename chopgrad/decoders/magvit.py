"""EasyAnimate's Magvit VAE: the first latent decodes alone to one frame, each later one to four."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.causal import with_past
from chopgrad.decoders.latents import ScaledLatents


class MagvitDecoder(ScaledLatents, CausalDecoder):
    """``AutoencoderKLMagvit``.

    Upstream keeps the last frames that a convolution has seen on the module itself (``prev_features``). Here they are
    the slices of the state, and the convolution is called as the plain ``Conv3d`` that it is, so that modules hold
    nothing. A piece is one half of a residual block (norm, activation, convolution), an upsampler or the head.
    """

    package = "diffusers"

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def frame_groups(self, latent_frames: int) -> list[FrameGroup]:
        check_latent_frames(latent_frames)
        upsamplers = [up.upsampler for up in self.vae.decoder.up_blocks if up.upsampler is not None]
        factor = 2 ** sum(upsampler.temporal_upsample for upsampler in upsamplers)
        size = self.vae.num_latent_frames_batch_size
        bounds = [0, *range(1, latent_frames, size), latent_frames]
        frames = [0] + [1 + factor * (i - 1) for i in bounds[1:]]
        return [FrameGroup(slice(*z), slice(*x)) for z, x in zip(pairwise(bounds), pairwise(frames), strict=True)]

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        blocks: Blocks = [[[self._entry]], [self._residual(block) for block in decoder.mid_block.convs]]
        for up in decoder.up_blocks:
            units = [self._residual(block) for block in up.convs]
            if up.upsampler is not None:
                units.append([partial(_upsample, up.upsampler)])
            blocks.append(units)
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        x, cached = _convolve(self.vae.decoder.conv_in, self.vae.post_quant_conv(features[0]), cached)
        return (x,), cached

    def _residual(self, block: Any) -> list[Piece]:
        """A residual block as two pieces; its input travels beside the features to the second."""
        each_frame = block.spatial_group_norm

        def first(features: Features, cached: Any) -> tuple[Features, Any]:
            (x,) = features
            y, cached = _convolve(block.conv1, self._activate(block.norm1, block.nonlinearity, x, each_frame), cached)
            return (y, x), cached

        def second(features: Features, cached: Any) -> tuple[Features, Any]:
            y, x = features
            y = block.dropout(self._activate(block.norm2, block.nonlinearity, y, each_frame))
            y, cached = _convolve(block.conv2, y, cached)
            return ((y + block.shortcut(x)) / block.output_scale_factor,), cached

        return [first, second]

    def _activate(self, norm: Any, activation: Any, x: Tensor, each_frame: bool) -> Tensor:
        """Norm and activation; ``each_frame``: the norm's statistics are of a frame, else of the whole group."""
        if not each_frame:
            return self.recomputed(lambda x: activation(norm(x)), x)

        def each(x: Tensor) -> Tensor:
            images = norm(x.transpose(1, 2).flatten(0, 1))
            return activation(images.unflatten(0, (x.shape[0], -1)).transpose(1, 2))

        return self.per_frame(each, x)

    def _head(self, features: Features, cached: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x = self._activate(decoder.conv_norm_out, decoder.conv_act, features[0], decoder.spatial_group_norm)
        x, cached = _convolve(decoder.conv_out, x, cached)
        return (x,), cached  # upstream does not clamp

    def own_decode(self, latents: Tensor) -> Tensor:
        # Upstream clears its caches only after a decode that succeeds: what an exception left would enter this one.
        self.vae._clear_conv_cache()
        try:
            return super().own_decode(latents)
        finally:
            self.vae._clear_conv_cache()


def _convolve(convolution: Any, x: Tensor, cached: Tensor | None) -> tuple[Tensor, Tensor]:
    """A causal convolution without the cache on its module; upstream calls it once for every frame.

    Raises:
        ValueError: something was put around the module, which would not be called.
    """
    if not isinstance(convolution, nn.Conv3d) or "forward" in vars(convolution):
        raise ValueError(
            "A causal convolution of this VAE is wrapped (LoRA, casting or offloading by layers), which would not be "
            "called, because these convolutions are run without the cache on their modules: take it off. "
            "enable_model_cpu_offload is fine."
        )
    x, kept = with_past(x, cached, convolution.temporal_padding)  # type: ignore[arg-type]
    return nn.Conv3d.forward(convolution, x), kept


def _upsample(upsampler: Any, features: Features, cached: Any) -> tuple[Features, Any]:
    """Twice the height and width, and twice the frames but for the first group of a video."""
    x = F.interpolate(features[0], scale_factor=(1.0, 2.0, 2.0), mode="nearest")
    first = cached is None
    x, cached = _convolve(upsampler.conv, x, cached)
    if upsampler.temporal_upsample and not first:
        mode = "nearest" if upsampler.spatial_group_norm else "trilinear"
        x = F.interpolate(x, scale_factor=(2.0, 1.0, 1.0), mode=mode)
    return (x,), cached
