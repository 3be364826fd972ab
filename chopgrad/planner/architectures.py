"""VAEs without weights: the published architectures by name, and those of a config; and which videos they decode to."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from torch import nn

from chopgrad.decoders import DECODERS, CausalDecoder
from chopgrad.published import ARCHITECTURES


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
            config = json.loads(Path(_looked_up(vae, subfolder)).read_text())
    except (OSError, ValueError) as error:
        inside = f" in its subfolder '{subfolder}'" if subfolder else ""
        raise ValueError(
            f"No config was found for '{vae}'{inside}: {names} (a pipeline's with --subfolder vae)."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"The config of '{vae}' is not one of a model: {names}.")
    return config


def _looked_up(vae: str, subfolder: str | None) -> str:
    """The path of a hub id's config.json; the hub is asked once where huggingface_hub would ask again and again.

    Raises:
        OSError, ValueError: there is none.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", vae):
        raise ValueError("a hub id is owner/name")
    known = huggingface_hub.try_to_load_from_cache(vae, "/".join([*([subfolder] if subfolder else []), "config.json"]))
    if isinstance(known, str):
        return known
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _one_look(vae)
    return huggingface_hub.hf_hub_download(vae, "config.json", subfolder=subfolder)


def _one_look(vae: str) -> None:
    """Raises:
    OSError: the hub cannot be reached, or does not have it.
    """
    url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{vae}"
    headers = huggingface_hub.utils.build_hf_headers()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10):
        pass  # urllib's errors are OSError


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
