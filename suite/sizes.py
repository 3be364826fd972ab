"""Whether a VAE takes clips of a shape: asked before any work, and answered with what to pass instead."""

from __future__ import annotations

from typing import Any

import torch

from chopgrad import CausalDecoder


def latent_frames(decoder: CausalDecoder, frames: int) -> int:
    """How many latents decode to so many frames.

    Raises:
        ValueError: none does; the message names the nearest numbers that do.
    """
    latent = next((n for n in range(1, frames + 1) if decoder.frame_count(n) >= frames), 1)
    if decoder.frame_count(latent) != frames:
        near = sorted({decoder.frame_count(n) for n in (max(1, latent - 1), latent)})
        raise ValueError(f"{frames} frames fit no number of latents of this VAE: pass {' or '.join(map(str, near))}.")
    return latent


def decoded_size(vae: Any, decoder: CausalDecoder, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of a picture of ``size`` that was encoded and decoded.

    Raises:
        ValueError: this size cannot be encoded.

    Cost: one frame.
    """
    like = next(vae.parameters())
    try:
        with torch.no_grad():
            decoded = decoder.decode(vae.encode(like.new_zeros(1, 3, 1, *size)).latent_dist.mode())
    except RuntimeError as error:
        raise ValueError(
            f"This VAE cannot encode {size[0]}x{size[1]} pixels ({error}): pass another --size."
        ) from error
    height, width = decoded.shape[-2:]
    return height, width


def check_size(vae: Any, decoder: CausalDecoder, size: tuple[int, int]) -> None:
    """Raises ValueError: pictures of this height and width come back as others."""
    height, width = decoded_size(vae, decoder, size)
    if (height, width) != size:
        raise ValueError(
            f"Crops of {size[0]}x{size[1]} pixels come back from this VAE as {height}x{width}: "
            f"pass --size {height} {width}."
        )
