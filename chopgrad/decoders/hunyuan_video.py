"""HunyuanVideo: temporal tiles of 16 frames (five latents) at steps of 12, on by default."""

from __future__ import annotations

from torch import Tensor

from chopgrad.decoders.base import Blocks, Features
from chopgrad.decoders.latents import ScaledLatents
from chopgrad.decoders.windows import WindowDecoder, stateless


class HunyuanVideoDecoder(ScaledLatents, WindowDecoder):
    """``AutoencoderKLHunyuanVideo``.

    Its norms are over all frames of a tile and its middle block attends to them all, so that only the tiles limit what
    a frame depends on. The causal mask of that attention grows with the square of a tile's latents: at high resolution
    it needs ``vae.enable_tiling()``, as without a gradient.
    """

    dropped = slice(1, None)

    def tile(self, x: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(x))

    def tile_blocks(self) -> Blocks:
        decoder = self.vae.decoder
        blocks: Blocks = [[[self._entry]], [[stateless(decoder.mid_block)]]]
        for up in decoder.up_blocks:
            units = [self.residual(block) for block in up.resnets]
            blocks.append([*units, *([stateless(upsampler)] for upsampler in up.upsamplers or [])])
        return [*blocks, [[self._head]]]

    def _entry(self, features: Features, nothing: None) -> tuple[Features, None]:
        return (self.vae.decoder.conv_in(self.vae.post_quant_conv(features[0])),), nothing

    def _head(self, features: Features, nothing: None) -> tuple[Features, None]:
        decoder = self.vae.decoder
        x = self.activate(decoder.conv_norm_out, decoder.conv_act, features[0])
        return (decoder.conv_out(x),), nothing  # upstream does not clamp
