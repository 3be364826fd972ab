"""The encoders of Wan's VAE in the original repositories' classes, and of those that derive from them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from chopgrad.decoders.original_wan import named_residual
from chopgrad.encoders.wan import WanEncoder
from chopgrad.recurrence import unpatched


class OriginalWanEncoder(WanEncoder):
    """The recurrence of an original Wan VAE's encoder.

    Its own ``encode(x, scale)`` gives normalised means alone; here come the moments, in the VAE's own space, as
    diffusers' class gives them. Means in the diffusion model's space: ``(mean - m) / s`` with the latents' statistics,
    as ``decoder.normalize`` has them.
    """

    @property
    def named(self) -> Any:
        model = self.vae
        encoder = model.encoder
        return SimpleNamespace(
            quant_conv=model.conv1,
            config=SimpleNamespace(
                temperal_downsample=model.temperal_downsample, patch_size=2 if encoder.conv1.in_channels == 12 else None
            ),
            encoder=SimpleNamespace(
                conv_in=encoder.conv1,
                down_blocks=list(_layers(encoder.downsamples)),
                mid_block=SimpleNamespace(
                    resnets=[named_residual(encoder.middle[0]), named_residual(encoder.middle[2])],
                    attentions=[encoder.middle[1]],
                ),
                norm_out=encoder.head[0],
                nonlinearity=encoder.head[1],
                conv_out=encoder.head[2],
            ),
        )

    def modules(self) -> list[nn.Module]:
        return [self.vae.encoder, self.vae.conv1]

    def own_encode(self, video: Tensor) -> Tensor:
        """Its means, and the log-variances that it computes and drops."""
        model, moments = self.vae, list[Tensor]()
        handle = model.conv1.register_forward_hook(lambda module, args, out: moments.append(out))
        unscaled = [video.new_zeros(model.z_dim), video.new_ones(model.z_dim)]
        try:
            means = unpatched(model, "encode")(video, unscaled)
        finally:
            handle.remove()
            model.clear_cache()  # DiffSynth's would keep the last features
        return torch.cat([means, moments[-1].chunk(2, dim=1)[1]], dim=1)


def _layers(downsamples: Any) -> Iterator[Any]:
    """Residual blocks under the names of diffusers, and downsamplers; Wan 2.2 has blocks of these."""
    for layer in downsamples:
        if hasattr(layer, "downsamples"):
            inside = list(_layers(layer.downsamples))
            last = inside.pop() if hasattr(inside[-1], "resample") else None
            yield SimpleNamespace(resnets=inside, downsampler=last, avg_shortcut=layer.avg_shortcut)
        else:
            yield named_residual(layer) if hasattr(layer, "residual") else layer
