"""Wan's VAE in the original repositories' classes, and those that derive from them: other names for the same structure.

``WanVAE_`` of Wan 2.1 and 2.2, ``VideoVAE_`` and ``VideoVAE38_`` of DiffSynth-Studio, and trainers' forks of them. A
class is recognised by its structure and proven by one tiny decode (``decoder_for``), never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from chopgrad.decoders.wan import WanDecoder
from chopgrad.recurrence import Checkpoint, unpatched


class OriginalWanDecoder(WanDecoder):
    """The recurrence of an original Wan VAE.

    Its own ``decode(z, scale)`` takes normalised latents and neither clamps; what clamps and knows the latents'
    statistics is the object around it (``Wan2_1_VAE``, ``WanVideoVAE``). Pass that to ``decoder_for``, or the model
    alone: then there is no clamp, and ``denormalize`` needs ``statistics``.

    Args:
        vae: the model.
        clamp: keep the clamp of the object around it.
        checkpoint: see ``CausalDecoder``.
        around: that object, if there is one.
    """

    def __init__(self, vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto", around: Any = None) -> None:
        wrapped = around is not None and inner(around) is not around
        super().__init__(vae, clamp=clamp and wrapped, checkpoint=checkpoint)
        self.statistics: tuple[Tensor, Tensor] | None = None
        """Mean and standard deviation of the latents, [channels] each."""
        if wrapped:
            mean, inverse = (torch.as_tensor(x).detach() for x in around.scale)
            self.statistics = mean, 1 / inverse

    @property
    def named(self) -> Any:
        model = self.vae
        decoder = model.decoder
        return SimpleNamespace(
            post_quant_conv=model.conv2,
            config=SimpleNamespace(
                z_dim=model.z_dim,
                temperal_downsample=model.temperal_downsample,
                patch_size=2 if decoder.head[2].out_channels == 12 else None,
            ),
            decoder=SimpleNamespace(
                conv_in=decoder.conv1,
                mid_block=SimpleNamespace(
                    resnets=[named_residual(decoder.middle[0]), named_residual(decoder.middle[2])],
                    attentions=[decoder.middle[1]],
                ),
                up_blocks=list(_up_blocks(decoder.upsamples)),
                norm_out=decoder.head[0],
                nonlinearity=decoder.head[1],
                conv_out=decoder.head[2],
            ),
        )

    def modules(self) -> list[nn.Module]:
        return [self.vae.decoder, self.vae.conv2]

    def own_decode(self, latents: Tensor) -> Tensor:
        model = self.vae
        unscaled = [latents.new_zeros(model.z_dim), latents.new_ones(model.z_dim)]
        return self.clamped(unpatched(model, "decode")(latents, unscaled))

    def answer(self, decode: Callable[[Tensor], Tensor], z: Tensor, scale: Any) -> Tensor:  # type: ignore[override]
        """``model.decode(z, scale)`` with z normalised; scale: mean and one over the standard deviation."""
        mean, inverse = (torch.as_tensor(x, dtype=z.dtype, device=z.device) for x in scale)
        if mean.ndim:
            mean, inverse = (x.view(1, -1, 1, 1, 1) for x in (mean, inverse))
        return decode(z / inverse + mean)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is None:
            raise ValueError(
                "This model does not know the statistics of its latents: pass the object around it to decoder_for, or "
                "set decoder.statistics = mean, std ([channels] each)."
            )
        mean, std = (x.to(like).view(1, -1, 1, 1, 1) for x in self.statistics)
        return mean, std


def inner(vae: Any) -> Any:
    """The original model inside the object that knows its latents' statistics, or ``vae`` itself."""
    model = getattr(vae, "model", None)
    return model if hasattr(vae, "scale") and is_original_wan(model) else vae


def is_original_wan(vae: Any) -> bool:
    """Whether it has the structure of the original classes."""
    decoder: Any = getattr(vae, "decoder", None)
    parts = ("conv1", "middle", "upsamples", "head")
    if not isinstance(vae, nn.Module) or not hasattr(vae, "conv2") or not all(hasattr(decoder, p) for p in parts):
        return False
    middle, head = decoder.middle, decoder.head
    return len(middle) == 3 and len(head) == 3 and all(hasattr(block, "residual") for block in (middle[0], middle[2]))


def named_residual(block: Any) -> Any:
    """A residual block under the names that diffusers gives its parts."""
    norm1, activation, conv1, norm2, _, dropout, conv2 = block.residual
    return SimpleNamespace(
        norm1=norm1, nonlinearity=activation, conv1=conv1, norm2=norm2, dropout=dropout, conv2=conv2,
        conv_shortcut=block.shortcut,
    )  # fmt: skip


def _up_blocks(upsamples: Any) -> Iterator[Any]:
    """Wan 2.2 has blocks; Wan 2.1 has one flat list, where an upsampler ends a block."""
    if all(hasattr(block, "upsamples") for block in upsamples):
        for block in upsamples:
            resnets, upsampler = _split(block.upsamples)
            yield SimpleNamespace(resnets=resnets, upsampler=upsampler, avg_shortcut=block.avg_shortcut)
        return
    flat: list[Any] = []
    for layer in upsamples:
        flat.append(layer)
        if not hasattr(layer, "residual"):
            resnets, upsampler = _split(flat)
            yield SimpleNamespace(resnets=resnets, upsamplers=[upsampler])
            flat = []
    if flat:
        yield SimpleNamespace(resnets=_split(flat)[0], upsamplers=None)


def _split(layers: Any) -> tuple[list[Any], Any]:
    """Residual blocks, and the upsampler behind them."""
    blocks = [layer for layer in layers if hasattr(layer, "residual")]
    others = [layer for layer in layers if not hasattr(layer, "residual")]
    if len(others) > 1 or not all(hasattr(layer, "resample") for layer in others):
        raise ValueError(
            "This Wan decoder has attention between its upsampling blocks (attn_scales), which no published one has: "
            "write a decoder for it (a subclass of chopgrad.CausalDecoder)."
        )
    return [named_residual(block) for block in blocks], others[0] if others else None
