"""Video VAEs for experiments: the embedded ones, a local folder, or a hub id, by the ordinary ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from chopgrad import DECODERS
from suite.records import ROOT

EMBEDDED = {name: ROOT / "weights" / f"tiny-{name}" for name in ("wan2.1", "cogvideox")}
"""Small decoders trained by ``weights/train.py``; their model cards say what they are good for."""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format. A larger number means that the file is not of this format."""


def load_vae(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, subfolder: str | None = None
) -> Any:
    """A frozen VAE in evaluation mode.

    Args:
        source: ``wan2.1`` or ``cogvideox`` (embedded), a folder that ``save_pretrained`` wrote (one file of weights, or
            shards with an index), or a hub id.
        subfolder: where the VAE lies inside a pipeline (``vae`` for the published pipelines).

    Raises:
        ValueError: not a usable VAE; the message says what is missing.
    """
    folder = EMBEDDED.get(source, Path(source))
    if folder.is_file():
        raise ValueError(
            f"'{source}' is a file: pass the folder that holds the weights together with their config.json."
        )
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
    _check_weights(folder, source)


def _check_weights(folder: Path, source: str) -> None:
    """The files are there and whole, which their headers tell without reading them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"'{source}' has a config.json but no .safetensors file: the weights are missing.")
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(placed.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{source}/{index.name}' is not an index of shards ({error!r}).") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"'{source}' lacks {len(missing)} of the {len(shards)} shards in its index, the first is {missing[0]}: "
                "download it again."
            )
        files = [folder / name for name in shards]
    elif any("-of-" in file.name for file in files):
        raise ValueError(f"'{source}' has shards but no {index.name}, which tells what lies where: download it again.")
    for file in files:
        names = _tensors_in(file, source)
        if index.is_file() and names is not None:
            absent = [name for name, shard in placed.items() if shard == file.name and name not in names]
            if absent:
                raise ValueError(
                    f"'{source}/{file.name}' lacks {absent[0]}, which the index places there: shards and index are not "
                    "from the same download."
                )


def _tensors_in(file: Path, source: str) -> set[str] | None:
    """Names in the header of a .safetensors file; None where it has none, which ``from_pretrained`` will report.

    Raises:
        ValueError: the file is shorter than its header says, or stands for one that was not fetched.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"'{source}/{file.name}' is a git-lfs pointer and not the weights: run 'git lfs pull'.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > LARGEST_HEADER:
            return None
        header = stream.read(length)
    needed = 8 + length
    if size >= needed:
        try:
            tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            needed += max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    if size < needed:
        raise ValueError(f"'{source}/{file.name}' is cut off: {size} bytes of {needed} or more. Download it again.")
    return set(tensors)
