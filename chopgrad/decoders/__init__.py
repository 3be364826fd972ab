"""Supported decoders, by VAE class name."""

from __future__ import annotations

from torch import nn

from chopgrad.decoders.base import CausalDecoder, Checkpoint, FrameGroup, State
from chopgrad.decoders.cogvideox import CogVideoXDecoder
from chopgrad.decoders.wan import WanDecoder

DECODERS: dict[str, type[CausalDecoder]] = {
    "AutoencoderKLWan": WanDecoder,
    "AutoencoderKLQwenImage": WanDecoder,
    "AutoencoderKLCogVideoX": CogVideoXDecoder,
}


def decoder_for(vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = None) -> CausalDecoder:
    """The recurrence behind a diffusers video VAE.

    Args:
        vae: a model of a supported class (``DECODERS``), or of a subclass; used in place.
        clamp: keep the clamp to [-1, 1] with which Wan's and Qwen-Image's decode end. CogVideoX has none.
        checkpoint: recompute each ``"block"``, each ``"residual"`` unit, or what works ``"frame"`` by frame, in the
            backward pass of every graph through this decoder: less memory, up to one more forward pass, the same
            gradient (see ``CausalDecoder``). diffusers has none for Wan and Qwen-Image: their cache changes in place.

    Raises:
        ValueError: the class is not supported (the message lists those that are), or an unknown ``checkpoint``.
    """
    for cls in type(vae).__mro__:
        if cls.__name__ in DECODERS:
            return DECODERS[cls.__name__](vae, clamp=clamp, checkpoint=checkpoint)
    raise ValueError(
        f"No causal decoder is known for {type(vae).__name__}. Supported: {', '.join(DECODERS)}. "
        "To add one, subclass chopgrad.CausalDecoder and register it in chopgrad.decoders.DECODERS."
    )


__all__ = [
    "DECODERS",
    "CausalDecoder",
    "Checkpoint",
    "CogVideoXDecoder",
    "FrameGroup",
    "State",
    "WanDecoder",
    "decoder_for",
]
