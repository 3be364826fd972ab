"""What ``frame_loss``, ``decode`` and ``patch`` are given, checked before any work: one sentence says what to pass."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from chopgrad.decoders.base import CausalDecoder, FrameGroup
from chopgrad.strategies import Sampled, Strategy

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_inputs(decoder: CausalDecoder, latents: Tensor, strategy: Strategy) -> list[FrameGroup]:
    """The frame groups of latents that fit the decoder."""
    if not isinstance(decoder, CausalDecoder):
        raise TypeError(f"decoder must come from chopgrad.decoder_for(vae), got {type(decoder).__name__}.")
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be Full(), Chop(distance=...), Exact() or Sampled(...), got {strategy!r}.")
    if not isinstance(latents, Tensor) or latents.ndim != 5:
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        image = " For an image pass latents.unsqueeze(2)." if isinstance(latents, Tensor) and latents.ndim == 4 else ""
        raise ValueError(f"latents must be a tensor [batch, channels, latent_frames, h, w], got {got}.{image}")
    if latents.shape[1] != decoder.latent_channels:
        raise ValueError(
            f"latents have {latents.shape[1]} channels, but this decoder takes {decoder.latent_channels}: pass them as "
            f"[batch, {decoder.latent_channels}, latent_frames, h, w]; got {list(latents.shape)}."
        )
    if not latents.is_floating_point():
        raise TypeError(f"latents must be floating point, got {latents.dtype}.")
    decoder.prepare()
    weight = next(iter(decoder.parameters()))
    # Weights that wait on meta are brought by hooks of accelerate, to where they are needed.
    if latents.device != weight.device and not weight.is_meta:
        raise ValueError(f"latents are on {latents.device}, but the decoder is on {weight.device}: move one of them.")
    dtype = getattr(decoder.vae, "dtype", weight.dtype)  # where weights are stored in another, the one they work in
    if latents.dtype != dtype and not torch.is_autocast_enabled(latents.device.type):
        raise TypeError(f"latents are {latents.dtype}, but the decoder is {dtype}: cast one of them, or use autocast.")
    groups = decoder.frame_groups(latents.shape[2])
    if not latents.numel():
        raise ValueError(f"latents are empty: {list(latents.shape)}.")
    return groups


def check_dropout(decoder: CausalDecoder, strategy: Strategy) -> None:
    """For what runs steps more than once."""
    if any(isinstance(m, _Dropout) and m.training and m.p for m in decoder.vae.modules()):
        raise ValueError(f"{strategy} runs steps twice, and active dropout would differ between them: call vae.eval().")


def check_tangent(latents: Tensor) -> None:
    """For what is not one graph."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(latents).tangent is not None:
        raise TypeError("Forward-mode derivatives need chopgrad.decode(decoder, latents, Full()), which is one graph.")


def trained_parameters(decoder: CausalDecoder, latents: Tensor) -> list[nn.Parameter]:
    """The decoder's parameters that get a gradient; said once where latents get one too."""
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    if parameters and latents.requires_grad and torch.is_grad_enabled() and decoder.vae not in _told:
        _told.add(decoder.vae)
        millions = sum(p.numel() for p in parameters) / 1e6
        warnings.warn(
            f"{len(parameters)} parameters of the decoder ({millions:.1f} million numbers) get gradients beside the "
            "latents. If only the latents are meant, freeze it: vae.requires_grad_(False).",
            stacklevel=4,
        )
    return parameters


def check_sampled(strategy: Strategy) -> None:
    if isinstance(strategy, Sampled):
        raise TypeError(
            f"{strategy} draws losses of frame groups, and decode hands out frames: pass {strategy.strategy} and "
            "groups=slice(...), or use chopgrad.frame_loss."
        )


_Dropout = nn.modules.dropout._DropoutNd
