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


def check_size(vae: Any, decoder: CausalDecoder, size: tuple[int, int] | int) -> None:
    """Whether pictures come back from the VAE as large as they went in.

    Args:
        size: height and width in pixels, or the one number that ``--size`` is for squares.

    Raises:
        ValueError: they come back otherwise, or cannot be encoded.

    Cost: one frame.
    """
    height, width = (size, size) if isinstance(size, int) else size
    like = next(vae.parameters())
    try:
        with torch.no_grad():
            decoded = decoder.decode(vae.encode(like.new_zeros(1, 3, 1, height, width)).latent_dist.mode())
    except RuntimeError as error:
        raise ValueError(f"This VAE cannot encode {height}x{width} pixels ({error}): pass another --size.") from error
    found = decoded.shape[-2:]
    if found != (height, width):
        advice = found[:1] if isinstance(size, int) else found
        raise ValueError(
            f"Crops of {height}x{width} pixels come back from this VAE as {found[0]}x{found[1]}: "
            f"pass --size {' '.join(map(str, advice))}."
        )
