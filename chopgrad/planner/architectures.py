"""VAEs without weights: the published architectures by name, and those of a config; and which videos they decode to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from chopgrad.decoders import DECODERS, CausalDecoder

_WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", {}),
    "wan2.2": ("AutoencoderKLWan", _WAN22),
    "qwen-image": ("AutoencoderKLQwenImage", {"dim_mult": [1, 2, 4, 4]}),  # diffusers 0.36 fails on its own default
    "cogvideox": ("AutoencoderKLCogVideoX", {}),
}
"""The published architectures: class, and what differs from its defaults."""


def build(vae: str, dtype: torch.dtype, subfolder: str | None, supported: Mapping[str, Any] = DECODERS) -> nn.Module:
    """The VAE, on the default device.

    Args:
        vae: a name in ``ARCHITECTURES``, a folder with a config.json, or a hub id.
        subfolder: where the VAE lies inside a pipeline's folder or hub id.
        supported: by class name.

    Raises:
        ValueError: unknown VAE.
    """
    if vae in ARCHITECTURES:
        name, config = ARCHITECTURES[vae]
    else:
        config = config_of(vae, subfolder)
        name = config.get("_class_name", "")
        if name not in supported:
            raise ValueError(f"'{vae}' is a {name or 'model of unknown class'}; supported are {', '.join(supported)}.")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(diffusers, name).from_config(config)
    finally:
        torch.set_default_dtype(previous)


def config_of(vae: str, subfolder: str | None) -> dict[str, Any]:
    """The config.json of a folder or hub id."""
    folder = Path(vae)
    names = f"pass {', '.join(ARCHITECTURES)}, a folder with a config.json, or a hub id"
    try:
        if folder.is_dir():
            config = json.loads((folder / (subfolder or "") / "config.json").read_text())
        else:
            config = diffusers.AutoencoderKLWan.load_config(vae, subfolder=subfolder)
    except (OSError, ValueError) as error:
        inside = f" in its subfolder '{subfolder}'" if subfolder else ""
        raise ValueError(
            f"No config was found for '{vae}'{inside}: {names} (a pipeline's with --subfolder vae)."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"The config of '{vae}' is not one of a model: {names}.")
    return config


def latent_frames_of(decoder: CausalDecoder, frames: int) -> int:
    """How many latents decode to so many frames.

    Raises:
        ValueError: none do; the message says what fits.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}.")
    latent_frames = next(n for n in range(1, frames + 1) if decoder.frame_count(n) >= frames)
    if decoder.frame_count(latent_frames) != frames:
        near = sorted({decoder.frame_count(n) for n in (max(1, latent_frames - 1), latent_frames)})
        raise ValueError(f"No number of latents decodes to {frames} frames: pass {' or '.join(map(str, near))}.")
    return latent_frames


def spatial_factor(decoder: CausalDecoder, dtype: torch.dtype) -> int:
    """Pixels per latent along height and width, measured: configs name it differently."""
    with torch.no_grad():
        return decoder.decode(torch.zeros(1, decoder.latent_channels, 1, 2, 2, dtype=dtype)).shape[-1] // 2
