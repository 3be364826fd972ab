"""CogVideoX: two latents per group; with an odd number of latents the first group takes one more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from chopgrad.decoders.base import Blocks, CausalDecoder, Features, FrameGroup, Piece, State, check_latent_frames
from chopgrad.decoders.latents import ScaledLatents
from chopgrad.local import Local, Pooled, local
from chopgrad.pieces import pooled_norm
from chopgrad.pieces.cogvideox import residual
from chopgrad.pieces.group_norm import frames_per_latent, normed_silu, takes
from chopgrad.pieces.plain import is_plain


class CogVideoXDecoder(ScaledLatents, CausalDecoder):
    """``AutoencoderKLCogVideoX``.

    A piece is one half of a residual block (norm, activation, convolution), an upsampler or the head; the latent goes
    beside the features, because every norm reads it. The slices of the state are the cached features of the
    convolutions, less those of 1x1x1 convolutions: upstream stores the whole upsampled latent there and never reads it.
    """

    package = "diffusers"
    recomputes_frames = False

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

    def initial_state(self) -> State:
        return (None,) * len(self.pieces())

    def blocks(self) -> Blocks:
        decoder = self.vae.decoder
        before = [] if self.vae.post_quant_conv is None else [self.vae.post_quant_conv]
        blocks: Blocks = [[[local(self._entry, *before, decoder.conv_in)]]]
        blocks.append([residual(block, self._activate, _piece) for block in decoder.mid_block.resnets])
        for up in decoder.up_blocks:
            units = [residual(block, self._activate, _piece) for block in up.resnets]
            units += [[local(partial(_upsample, upsampler), upsampler, scale=2)] for upsampler in up.upsamplers or []]
            blocks.append(units)
        return [*blocks, [[_piece(self._head, decoder.norm_out, decoder.conv_act, decoder.conv_out)]]]

    def _entry(self, features: Features, cached: Any) -> tuple[Features, Any]:
        (z,) = features
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        x, cached = self.vae.decoder.conv_in(z, conv_cache=cached)
        return (x, z), cached

    def _activate(self, norm: Any, activation: Any, x: Tensor, z: Tensor, **strip: Any) -> Tensor:
        if strip:
            return self._activate_rows(norm, activation, x, z, **strip)
        frames = _frames_per_latent(x, z)
        parts = ("CogVideoXSpatialNorm3D", norm), ("SiLU", activation), *_convolutions(norm)
        if all(is_plain(part, (name,)) for name, part in parts) and takes(norm.norm_layer, x, z, frames):
            assert frames is not None
            return normed_silu(norm.norm_layer, x, norm.conv_y(z)[0], norm.conv_b(z)[0], frames)
        # The norm's second result is a cache of its 1x1x1 convolutions, which need none.
        return self.recomputed(lambda x, z: activation(norm(x, z)[0]), x, z)

    def _activate_rows(
        self, norm: Any, activation: Any, x: Tensor, z: Tensor, of_all: Tensor, rows: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The same for some rows of x, given the statistics of all, and the rows of the latents around them.

        Convolutions of one pixel run at the latents' size, before these are spread.
        """
        (start, _), (first, _) = rows
        frames = _frames_per_latent(x, z)
        if frames is None:
            raise RuntimeError(f"{z.shape[2]} latents do not divide {x.shape[2]} frames evenly: leave out strips.")
        factor = x.shape[-1] // z.shape[-1]
        place = pooled_norm.Rows(tuple(frames), factor, start - first * factor)
        given = x, of_all, norm.conv_y(z)[0], norm.conv_b(z)[0], place
        if is_plain(activation, ("SiLU",)):
            return pooled_norm.normed_silu(norm.norm_layer, *given)
        return pooled_norm.by_frames(norm.norm_layer, activation, *given)

    def _head(self, features: Features, cached: Any, **strip: Any) -> tuple[Features, Any]:
        decoder = self.vae.decoder
        x, z = features
        x = self._activate(decoder.norm_out, decoder.conv_act, x, z, **strip)
        x, cached = decoder.conv_out(x, conv_cache=cached)
        return (x,), cached  # upstream does not clamp


def _frames_per_latent(x: Tensor, z: Tensor) -> list[int] | None:
    odd = x.shape[2] > 1 and x.shape[2] % 2 == 1
    return frames_per_latent(x.shape[2], z.shape[2], first_alone=odd)


def _convolutions(norm: Any) -> list[tuple[str, Any]]:
    """Of a norm's scale and shift."""
    both = [getattr(norm, name, None) for name in ("conv_y", "conv_b")]
    inside = [("CogVideoXSafeConv3d", getattr(x, "conv", None)) for x in both]
    return [*[("CogVideoXCausalConv3d", x) for x in both], *inside]


def _upsample(upsampler: Any, features: Features, nothing: None) -> tuple[Features, None]:
    x, z = features
    return (upsampler(x), z), nothing


def _piece(run: Any, norm: Any, *modules: nn.Module) -> Piece:
    """A piece that is local but for the group norm inside a norm by the latents."""
    if not is_plain(norm, ("CogVideoXSpatialNorm3D",)) or not is_plain(norm.norm_layer, ("GroupNorm",)):
        return run
    found = local(run, norm.conv_y, norm.conv_b, *modules)
    if not isinstance(found, Local):
        return run

    def run_with(features: Features, cached: Any, of_all: Tensor, rows: Any) -> tuple[Features, Any]:
        return run(features, cached, of_all=of_all, rows=(rows[0], rows[-1]))

    statistics = partial(pooled_norm.statistics, norm.norm_layer)
    return Pooled(run, found.radius, statistics=statistics, pool=pooled_norm.pool, run_with=run_with)
