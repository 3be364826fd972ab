"""Supported decoders, by VAE class name."""

from __future__ import annotations

from copy import copy

from torch import nn

from chopgrad.decoders.allegro import AllegroDecoder
from chopgrad.decoders.base import CausalDecoder, Checkpoint, FrameGroup, State
from chopgrad.decoders.cogvideox import CogVideoXDecoder
from chopgrad.decoders.hunyuan_video import HunyuanVideoDecoder
from chopgrad.decoders.kandinsky6 import Kandinsky6Decoder
from chopgrad.decoders.kvae import KVAEDecoder
from chopgrad.decoders.ltx import LTX2Decoder, LTXDecoder
from chopgrad.decoders.magvit import MagvitDecoder
from chopgrad.decoders.minimax_h3 import MiniMaxH3Decoder
from chopgrad.decoders.mochi import MochiDecoder
from chopgrad.decoders.original_wan import OriginalWanDecoder, inner, is_original_wan
from chopgrad.decoders.qwen21 import QwenImage21Decoder
from chopgrad.decoders.taehv import TAEHVDecoder, is_taehv
from chopgrad.decoders.unsupported import UNSUPPORTED
from chopgrad.decoders.vidtok import VidTokDecoder
from chopgrad.decoders.wan import WanDecoder
from chopgrad.own import SINGLE_FILE, bare, check_by_trial, check_source

DECODERS: dict[str, type[CausalDecoder]] = {
    "AutoencoderKLWan": WanDecoder,
    "AutoencoderKLQwenImage": WanDecoder,
    "AutoencoderKLCogVideoX": CogVideoXDecoder,
    "AutoencoderKLAllegro": AllegroDecoder,
    "AutoencoderKLHunyuanVideo": HunyuanVideoDecoder,
    "AutoencoderKLKVAEVideo": KVAEDecoder,
    "AutoencoderKLLTX2Video": LTX2Decoder,
    "AutoencoderKLLTXVideo": LTXDecoder,
    "AutoencoderKLMagvit": MagvitDecoder,
    "AutoencoderKLMochi": MochiDecoder,
    "AutoencoderKLQwenImage21": QwenImage21Decoder,
    "AutoencoderVidTok": VidTokDecoder,
    "AutoencoderKLMiniMaxH3": MiniMaxH3Decoder,
    "Kandinsky6SRVAE": Kandinsky6Decoder,
}


def register_decoder(class_name: str, decoder: type[CausalDecoder]) -> None:
    """Let ``decoder_for`` take VAEs of a class, and of its subclasses.

    Args:
        class_name: of the VAE.
        decoder: made as ``decoder(vae, clamp=..., checkpoint=...)``.

    Raises:
        TypeError: it is no ``CausalDecoder``.
    """
    if not (isinstance(decoder, type) and issubclass(decoder, CausalDecoder)):
        raise TypeError(f"decoder must be a subclass of chopgrad.CausalDecoder, got {decoder!r}.")
    DECODERS[class_name] = decoder


def decoder_for(
    vae: nn.Module, clamp: bool = True, checkpoint: Checkpoint = "auto", check: bool = True
) -> CausalDecoder:
    """The recurrence behind a video VAE's decoder.

    Args:
        vae: a model of a supported class (``DECODERS``), of a subclass, or a PeftModel or compiled module around one;
            used in place. Or Wan's VAE in the original repositories' or DiffSynth's classes: the object that knows the
            latents' statistics, or the model in it. Or a TAEHV.
        clamp: keep the clamp to [-1, 1] with which Wan's and Qwen-Image's decode end (TAEHV's: to [0, 1]), and which
            has no gradient for pixels beyond. The others have none, nor has an original Wan model without the object
            around it.
        checkpoint: recompute each ``"block"``, each ``"residual"`` unit, or what works ``"frame"`` by frame, in the
            backward pass of every graph through this decoder: less memory, up to one more forward pass, the same
            gradient (see ``CausalDecoder``). diffusers has none for Wan and Qwen-Image: their cache changes in place.
            ``"auto"``: ``"frame"`` where a strategy walks pieces, else nothing.
        check: compare with the VAE's own decode on a tiny latent, and refuse code and hooks of its own that would not
            be called.

    Raises:
        ValueError: the class is not supported (the message lists those that are), the VAE was changed in a way that a
            step would pass by, or an unknown ``checkpoint``.

    Cost: two decodes of two frame groups of 2x2 latents, unless ``check=False``: for a published VAE some seconds on a
    CPU. Call it once, not in every step.
    """
    around, vae = vae, bare(inner(vae))
    if is_original_wan(vae):
        return _checked(OriginalWanDecoder(vae, clamp, checkpoint, around), check)
    if is_taehv(vae):
        return _checked(TAEHVDecoder(vae, clamp, checkpoint), check)
    name = next((cls.__name__ for cls in type(vae).__mro__ if cls.__name__ in DECODERS), None)
    if name is None:
        known = next((cls.__name__ for cls in type(vae).__mro__ if cls.__name__ in UNSUPPORTED), None)
        if known is not None:
            raise ValueError(f"{known} has no frame groups: {UNSUPPORTED[known]}")
        raise ValueError(
            f"No causal decoder is known for {type(vae).__name__}. Supported: {', '.join(DECODERS)}. To add one, "
            "subclass chopgrad.CausalDecoder and pass it to chopgrad.register_decoder. Wan's VAE is also taken in "
            f"the original repositories' classes, or with their weights: {SINGLE_FILE}."
        )
    cls = DECODERS[name]
    if check and cls.package is not None:
        check_source(vae, cls)
    return _checked(cls(vae, clamp=clamp, checkpoint=checkpoint), check)


def _checked(decoder: CausalDecoder, check: bool) -> CausalDecoder:
    if check:
        as_vae = copy(decoder)
        as_vae.clamp = True
        decoder.passed_by = check_by_trial(as_vae)
        decoder.prepare()
    return decoder


__all__ = [
    "DECODERS",
    "AllegroDecoder",
    "CausalDecoder",
    "Checkpoint",
    "CogVideoXDecoder",
    "FrameGroup",
    "HunyuanVideoDecoder",
    "KVAEDecoder",
    "Kandinsky6Decoder",
    "LTX2Decoder",
    "LTXDecoder",
    "MagvitDecoder",
    "MiniMaxH3Decoder",
    "MochiDecoder",
    "OriginalWanDecoder",
    "QwenImage21Decoder",
    "State",
    "TAEHVDecoder",
    "VidTokDecoder",
    "WanDecoder",
    "decoder_for",
    "register_decoder",
]
