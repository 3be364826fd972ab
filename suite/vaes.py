"""Video VAEs for experiments: the embedded ones, a local folder, or a hub id, by the ordinary ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel

from chopgrad import DECODERS
from suite.records import ROOT

EMBEDDED = {name: ROOT / "weights" / f"tiny-{name}" for name in ("wan2.1", "cogvideox")}
"""Small decoders trained by ``weights/train.py``; their model cards say what they are good for."""


def load_vae(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, subfolder: str | None = None
) -> Any:
    """A frozen VAE in evaluation mode.

    Args:
        source: ``wan2.1`` or ``cogvideox`` (embedded), a folder that ``save_pretrained`` wrote, or a hub id.
        subfolder: where the VAE lies inside a pipeline (``vae`` for the published pipelines).

    Raises:
        ValueError: not a usable VAE; the message says what is missing.
    """
    folder = EMBEDDED.get(source, Path(source))
    if folder.is_dir():
        _check_folder(folder / (subfolder or ""), source)
        source = str(folder)
    try:
        vae = AutoModel.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype)
        absent = [name for name, tensor in vae.state_dict().items() if tensor.is_meta]
        if absent:
            raise ValueError(f"its weights lack {len(absent)} of the model's tensors, the first is {absent[0]}.")
        vae = vae.to(device)
    except (OSError, ValueError, TypeError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"No VAE could be loaded from '{source}': {reason}") from error
    return vae.eval().requires_grad_(False)


def _check_folder(folder: Path, source: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            f"'{source}' has no config.json: pass a folder written by save_pretrained, or a pipeline's folder "
            "together with --subfolder vae."
        )
    try:
        name = str(json.loads(config.read_text())["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{source}/config.json' is not the config of a diffusers model ({error!r}).") from error
    if name not in DECODERS:
        raise ValueError(f"'{source}' holds a {name}, but the supported VAEs are {', '.join(DECODERS)}.")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"'{source}' has a config.json but no .safetensors file: the weights are missing.")
