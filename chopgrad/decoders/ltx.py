"""LTX-Video and LTX-2: temporal tiles of 16 frames (three latents) at steps of 8, once they are switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chopgrad.decoders.base import Blocks, Features
from chopgrad.decoders.windows import WindowDecoder, stateless
from chopgrad.recurrence import unpatched


class LTXDecoder(WindowDecoder):
    """``AutoencoderKLLTXVideo``.

    Its convolutions look at later frames too, as far as the tile goes. Upstream drops the last frame of each later tile
    where the first is meant, so that its tiled decode lags by a frame; so does this one.

    Attributes:
        timestep: the pipeline's ``decode_timestep``, for decoders that are conditioned on it (LTX-Video 0.9.5 and
            later); set it on what ``decoder_for(vae, check=False)`` gives. The decoder is then one piece.
    """

    dropped = slice(None, -1)
    timestep: float | None = None

    def check_windows(self) -> None:
        super().check_windows()
        if any(self._flags("decoder_inject_noise")):
            raise ValueError(
                "This decoder adds random noise (decoder_inject_noise, LTX-Video 0.9.1), so that a step cannot be "
                "repeated: use a VAE without it (0.9.0, or 0.9.5 and later)."
            )
        if self.vae.config.timestep_conditioning and self.timestep is None:
            raise ValueError(
                "This decoder is conditioned on a timestep: make it by decoder_for(vae, check=False) and set "
                "decoder.timestep = 0.05 (the pipeline's decode_timestep). It is vae.decode.decoder where patched."
            )

    def _flags(self, name: str) -> tuple[bool, ...]:
        found = self.vae.config[name]
        return (found,) if isinstance(found, bool) else tuple(found)

    def _condition(self, x: Tensor) -> Tensor | None:
        if not self.vae.config.timestep_conditioning or self.timestep is None:
            return None
        return x.new_full((x.shape[0],), self.timestep)

    def own_decode(self, latents: Tensor) -> Tensor:
        return unpatched(self.vae, "decode")(latents, self._condition(latents), return_dict=False)[0]

    def answer(  # type: ignore[override]
        self, decode: Callable[[Tensor], Tensor], z: Tensor, temb: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        if self.vae.config.timestep_conditioning:
            own = self.timestep
            same = temb is not None and own is not None and bool(((temb - own).abs() < 1e-6).all())
            if not same:
                raise ValueError(f"decode was given the timestep {temb}: set vae.decode.decoder.timestep to the same.")
        return super().answer(decode, z, return_dict)

    def tile(self, x: Tensor) -> Tensor:
        return self.vae.decoder(x, self._condition(x))

    def tile_blocks(self) -> Blocks:
        decoder = self.vae.decoder
        if self.vae.config.timestep_conditioning:
            return [[[stateless(self.tile)]]]
        blocks: Blocks = [[[self._entry]], [self.residual(block) for block in decoder.mid_block.resnets]]
        for up in decoder.up_blocks:
            units = [] if up.conv_in is None else [self.residual(up.conv_in)]
            units += [[stateless(upsampler, **self._settings)] for upsampler in up.upsamplers or []]
            blocks.append([*units, *(self.residual(block) for block in up.resnets)])
        return [*blocks, [[self._head]]]

    @property
    def _settings(self) -> dict[str, Any]:
        """Of every convolution."""
        return {}

    def convolve(self, convolution: Any, x: Tensor) -> Tensor:
        return convolution(x, **self._settings)

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        return norm(x.movedim(1, -1)).movedim(-1, 1)

    def activate(self, norm: Any, activation: Any, x: Tensor) -> Tensor:
        return self.per_frame(lambda x: activation(self.norm(norm, x)), x)

    def shortcut(self, block: Any, x: Tensor) -> Tensor:
        if block.norm3 is not None:
            x = self.per_frame(lambda x: block.norm3(x.movedim(1, -1)).movedim(-1, 1), x)
        return super().shortcut(block, x)

    def _entry(self, features: Features, nothing: None) -> tuple[Features, None]:
        return (self.convolve(self.vae.decoder.conv_in, features[0]),), nothing

    def _head(self, features: Features, nothing: None) -> tuple[Features, None]:
        decoder = self.vae.decoder
        x = self.activate(decoder.norm_out, decoder.conv_act, features[0])
        x = self.convolve(decoder.conv_out, x)
        size = decoder.patch_size
        # Channels are [.., in time, across, down]; upstream does not clamp.
        x = x.unflatten(1, (-1, decoder.patch_size_t, size, size)).permute(0, 1, 5, 2, 6, 4, 7, 3)
        return (x.flatten(6, 7).flatten(4, 5).flatten(2, 3),), nothing

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (x.to(like).view(1, -1, 1, 1, 1) for x in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std


class LTX2Decoder(LTXDecoder):
    """``AutoencoderKLLTX2Video``: the same with other norms, and convolutions that are told whether they are causal."""

    def answer(  # type: ignore[override]
        self,
        decode: Callable[[Tensor], Tensor],
        z: Tensor,
        temb: Tensor | None = None,
        causal: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        if causal and not self.vae.decoder.is_causal:
            raise ValueError("decode was given causal=True, but the decoder is not causal: leave it out.")
        return super().answer(decode, z, temb, return_dict)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"causal": self.vae.decoder.is_causal}

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        return norm(x)
