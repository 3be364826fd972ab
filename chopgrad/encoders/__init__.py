"""Supported encoders, by VAE class name."""

from __future__ import annotations

from torch import nn

from chopgrad.decoders.original_wan import inner, is_original_wan
from chopgrad.encoders.base import CausalEncoder, LatentGroup
from chopgrad.encoders.cogvideox import CogVideoXEncoder
from chopgrad.encoders.original_wan import OriginalWanEncoder
from chopgrad.encoders.wan import WanEncoder
from chopgrad.own import SINGLE_FILE, bare, check_by_trial, check_source
from chopgrad.recurrence import Checkpoint

ENCODERS: dict[str, type[CausalEncoder]] = {
    "AutoencoderKLCogVideoX": CogVideoXEncoder,
    "AutoencoderKLQwenImage": WanEncoder,
    "AutoencoderKLWan": WanEncoder,
}


def register_encoder(class_name: str, encoder: type[CausalEncoder]) -> None:
    """Let ``encoder_for`` take VAEs of a class, and of its subclasses.

    Args:
        class_name: of the VAE.
        encoder: made as ``encoder(vae, checkpoint=...)``.

    Raises:
        TypeError: it is no ``CausalEncoder``.
    """
    if not (isinstance(encoder, type) and issubclass(encoder, CausalEncoder)):
        raise TypeError(f"encoder must be a subclass of chopgrad.CausalEncoder, got {encoder!r}.")
    ENCODERS[class_name] = encoder


def encoder_for(vae: nn.Module, checkpoint: Checkpoint = "auto", check: bool = True) -> CausalEncoder:
    """The recurrence behind a video VAE's encoder.

    Args:
        vae: a model of a supported class (``ENCODERS``), of a subclass, or a PeftModel or compiled module around one;
            used in place. Or Wan's VAE in the original repositories' or DiffSynth's classes, or the object around it.
        checkpoint: what is recomputed inside a group in the backward pass, as in ``decoder_for``.
        check: compare with the VAE's own encode on a tiny video, and refuse code and hooks of its own that would not be
            called.

    Raises:
        ValueError: the class is not supported (the message lists those that are), the VAE was changed in a way that a
            step would pass by, or an unknown ``checkpoint``.

    Cost: two encodes of two groups of frames of 2x2 latents, unless ``check=False``: for a published VAE some seconds
    on a CPU. Call it once, not in every step.
    """
    vae = bare(inner(vae))
    original = is_original_wan(vae)
    name = next((cls.__name__ for cls in type(vae).__mro__ if cls.__name__ in ENCODERS), None)
    if name is None and not original:
        raise ValueError(
            f"No causal encoder is known for {type(vae).__name__}. Supported: {', '.join(ENCODERS)}. To add one, "
            "subclass chopgrad.CausalEncoder and pass it to chopgrad.register_encoder. Wan's VAE is also taken in "
            f"the original repositories' classes, or with their weights: {SINGLE_FILE}."
        )
    if getattr(vae, "encoder", None) is None:
        raise ValueError(f"This {type(vae).__name__} has no encoder (vae.encoder): load the whole VAE.")
    cls = OriginalWanEncoder if original or name is None else ENCODERS[name]
    if check and not original and cls.package is not None:
        check_source(vae, cls)
    return _checked(cls(vae, checkpoint=checkpoint), check)


def _checked(encoder: CausalEncoder, check: bool) -> CausalEncoder:
    if check:
        encoder.passed_by = check_by_trial(encoder)
        encoder.prepare()
    return encoder


__all__ = [
    "ENCODERS",
    "CausalEncoder",
    "CogVideoXEncoder",
    "LatentGroup",
    "OriginalWanEncoder",
    "WanEncoder",
    "encoder_for",
    "register_encoder",
]
